"""All rows of a batch, from those of each process."""

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.mesh.rows import counts
from keras.src.backend.torch.distribution.mesh.rows import get_current_rows
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded


def gather(x, context):
    """All rows, in order, of a tensor that holds local rows.

    Collective: every process of the data axis calls it, with the rows of
    `current_rows`.

    Args:
        x: tensor of shape `(local rows, ...)`.

    Returns:
        Tensor of shape `(global rows, ...)`.
    """
    return gather_parts(x, get_current_rows(), context.data_group)


def gather_parts(x, rows, group):
    """All rows of a tensor in whose dim 0 are those of `rows`.

    Collective: every process of `group` calls it.
    """
    sizes = [stop - start for start, stop in rows.ranges()]
    x, most = x[: sizes[rows.index]], max(sizes)
    if x.shape[0] < most:
        padded = x.new_zeros((most, *x.shape[1:]))
        padded[: x.shape[0]] = x
        x = padded
    if min(sizes) == most:
        result = x.new_empty((most * len(sizes), *x.shape[1:]))
        collectives.gather_into(result, x, group)
        return result
    pieces = collectives.gather_each(x, group)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes)])


class GatherForLoss(torch.autograd.Function):
    """All rows, for a loss that looks at those of other shards.

    Collective, forward and backward. A gradient on shard i belongs to the loss
    of shard i: as in `collectives.SumOverData`, local rows get
    (sum of weight_i * gradient_i) / (our weight).
    """

    @staticmethod
    def forward(ctx, x, context):
        ctx.context, ctx.size = context, len(x)
        ctx.rows = get_current_rows()
        return gather(x, context)

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad)
        grad = collectives.MeanOfLosses.apply(
            grad, ctx.rows.weight, ctx.context.data_group
        )
        if ctx.rows.local:
            return ctx.rows.cut(grad, 0), None
        # Without rows it is zero, for what was computed on instead.
        return grad[: ctx.size] * 0, None


def assemble(batch, mesh, axes, placements):
    """A global batch, as a DTensor, from the rows of each process.

    Collective: every process of the axes calls it.

    Args:
        batch: the rows of this process, whole in other dims.
        mesh: torch mesh.
        axes: indices of its axes that split rows, the first one first.
        placements: of the result, one for each axis of `mesh`.
    """
    cut_by = cuts.from_placements(tuple(placements), tuple(mesh.shape))
    rows_by = [axis for dim, axis in cut_by if dim == 0]
    total = None
    if len(axes) == 1 and rows_by[:1] == list(axes):
        total = _total_of_shards(len(batch), mesh.get_group(axes[0]))
    if total is None:
        for axis in reversed(axes):
            batch = _all_rows(batch, mesh.get_group(axis))
        total = len(batch)
    else:
        cut_by = [(dim, axis) for dim, axis in cut_by if axis != axes[0]]
    shape = (total, *batch.shape[1:])
    for dim, axis in cut_by:
        batch = collectives.shard_of(batch, dim, mesh.get_group(axis))
    return sharded.wrap(batch.contiguous(), mesh, placements, shape)


def _total_of_shards(rows, group):
    """How many rows a group has, None if they are not in shards of
    `torch.chunk`'s sizes."""
    sizes = counts(rows, group)
    total = sum(sizes)
    ranges = [
        collectives.shard_range(total, len(sizes), i) for i in range(len(sizes))
    ]
    return total if sizes == [b - a for a, b in ranges] else None


def _all_rows(batch, group):
    everything = [None] * dist.get_world_size(group)
    dist.all_gather_object(everything, batch.cpu(), group=group)
    return torch.cat(everything).to(batch.device)
