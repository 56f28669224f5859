"""Cross-entropy of logits whose classes are sharded, without gathering them.

With z_j the local classes, a step needs of the other processes the maximum, the
sum of exponentials and the logit of the target: three numbers for each row
(Shoeybi et al., 2019, section 3).
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

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
        logits: DTensor of shape `(..., classes)`, for which `class_axis_of` is
            not None.

    Returns:
        Plain tensor of shape `(...)`, equal on all processes of the mesh.

    Raises:
        IndexError: on CPU, for a target that is no class, on all processes.
    """
    mesh, axis = logits.device_mesh, class_axis_of(logits)
    classes = logits.shape[-1]
    start, _ = collectives.shard_range(
        classes, mesh.size(axis), mesh.get_local_rank(axis)
    )
    if target.device.type == "cpu":
        wrong = ((target < 0) & (target != IGNORED)) | (target >= classes)
        if wrong.any():
            raise IndexError(
                f"Target {int(target[wrong][0])} is out of bounds: there are "
                f"{classes} classes."
            )
    local = sharded.Leave.apply(logits)
    losses = _CrossEntropy.apply(
        # Not -1: a process may hold no class.
        local.reshape(target.numel(), local.shape[-1]),
        target.reshape(-1),
        start,
        mesh.get_group(axis),
    )
    return losses.view(target.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, start, group):
        rows, width = logits.shape
        largest = logits.amax(1) if width else logits.new_full((rows,), -1e30)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        exponentials = torch.exp(logits - largest.unsqueeze(1))
        is_local = (target >= start) & (target < start + width)
        index = torch.where(is_local, target - start, 0)
        sums = logits.new_zeros((2, rows))
        torch.sum(exponentials, 1, out=sums[0])
        if width:
            at_target = logits.gather(1, index.unsqueeze(1)).squeeze(1)
            sums[1] = torch.where(is_local, at_target - largest, 0.0)
        dist.all_reduce(sums, group=group)
        valid = target != IGNORED
        ctx.save_for_backward(exponentials, sums[0], index, is_local, valid)
        return torch.where(valid, sums[0].log() - sums[1], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # d/dz_j = softmax_j - [j is the target]
        exponentials, total, index, is_local, valid = ctx.saved_tensors
        grad = torch.where(valid, collectives.whole_gradient(grad), 0.0)
        result = exponentials * (grad / total).unsqueeze(1)
        if result.shape[1]:
            result.scatter_add_(
                1,
                index.unsqueeze(1),
                torch.where(is_local, -grad, 0.0).unsqueeze(1),
            )
        return result, None, None, None
