"""Cross-entropy of logits whose classes may be sharded, without gathering them.

With z_j the local classes, a step needs of the other processes the maximum, the
sum of exponentials and the logit of the target: three numbers for each row
(Shoeybi et al., 2019, section 3).

Where backward runs once (`modes.runs_backward_once`), one tensor as large as
the logits is made and written over. torch's own makes three.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded

IGNORED = -100  # as torch's own cross-entropy


def class_axis_of(logits):
    """The mesh axis that alone shards the last dim, and nothing else does.

    None if the DTensor is laid out otherwise.
    """
    axes = [i for i, p in enumerate(logits.placements) if not p.is_replicate()]
    if len(axes) == 1 and logits.placements[axes[0]].is_shard(logits.ndim - 1):
        return axes[0]
    return None


def sparse_cross_entropy(target, logits):
    """-log softmax(logits)[target], for each row.

    Collective along the mesh axis that shards the classes.

    Args:
        target: plain integer tensor of shape `(...)`, equal on all processes
            of the mesh.
        logits: tensor of shape `(..., classes)`: plain, or a DTensor for which
            `class_axis_of` is not None.

    Returns:
        Plain tensor of shape `(...)`, equal on all processes of the mesh.

    Raises:
        IndexError: on CPU, for a target that is no class, on all processes.
    """
    classes, start, group = logits.shape[-1], 0, None
    local = logits
    if isinstance(logits, DTensor):
        mesh, axis = logits.device_mesh, class_axis_of(logits)
        start, _ = collectives.shard_range(
            classes, mesh.size(axis), mesh.get_local_rank(axis)
        )
        group = mesh.get_group(axis)
        local = sharded.Leave.apply(logits)
    if target.device.type == "cpu":
        wrong = ((target < 0) & (target != IGNORED)) | (target >= classes)
        if wrong.any():
            raise IndexError(
                f"Target {int(target[wrong][0])} is out of bounds: there are "
                f"{classes} classes."
            )
    losses = _CrossEntropy.apply(
        # Not -1: a process may hold no class.
        local.reshape(target.numel(), local.shape[-1]),
        target.reshape(-1),
        start,
        group,
        modes.runs_backward_once,
    )
    return losses.view(target.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, start, group, once):
        rows, width = logits.shape
        largest = logits.amax(1) if width else logits.new_full((rows,), -1e30)
        if group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        exponentials = torch.sub(logits, largest.unsqueeze(1)).exp_()
        valid = target != IGNORED
        is_local = valid
        if group is not None:
            is_local = (target >= start) & (target < start + width)
        index = torch.where(is_local, target - start, 0)
        sums = logits.new_zeros((2, rows))
        torch.sum(exponentials, 1, out=sums[0])
        if width:
            at_target = logits.gather(1, index.unsqueeze(1)).squeeze(1)
            sums[1] = torch.where(is_local, at_target - largest, 0.0)
        if group is not None:
            dist.all_reduce(sums, group=group)
        saved = sums[0], index, is_local, valid
        # What is written over is nothing that autograd may hand out again.
        ctx.exponentials = exponentials if once else None
        ctx.save_for_backward(*saved, *(() if once else (exponentials,)))
        return torch.where(valid, sums[0].log() - sums[1], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # d/dz_j = softmax_j - [j is the target]
        total, index, is_local, valid, *kept = ctx.saved_tensors
        grad = torch.where(valid, collectives.whole_gradient(grad), 0.0)
        scale = (grad / total).unsqueeze(1)
        if kept:
            result = kept[0] * scale
        else:
            result, ctx.exponentials = ctx.exponentials.mul_(scale), None
        if result.shape[1]:
            result.scatter_add_(
                1,
                index.unsqueeze(1),
                torch.where(is_local, -grad, 0.0).unsqueeze(1),
            )
        return result, None, None, None, None
