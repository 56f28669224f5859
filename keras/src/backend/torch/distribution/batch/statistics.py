"""Sums over all rows of a global batch, where a layer or a loss needs them.

What is no mean over rows (batch statistics, ratios of sums) is computed from
sums over the data shards, that autograd differentiates.
"""

from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded


def context_over_rows(x, axes, synchronized=False):
    """The `Context` if statistics of `x` go over rows of several data shards.

    Outside of layers and of steps nobody knows whether dim 0 counts rows, nor
    that all processes get here: there, `synchronized` says so.

    Args:
        x: tensor of a data shard.
        axes: tuple of the dims that are reduced, None for all.
        synchronized: bool, whether the program asks for global statistics.
    """
    context = current()
    if context is None or context.data_size == 1 or x.device.type == "meta":
        return None
    if axes is not None and not any(axis % x.ndim == 0 for axis in axes):
        return None
    if synchronized or (rows.get_current_rows() is not None and modes.calls):
        return context
    return None


def sum_over_data(x, context):
    """The sum of a tensor over data shards; one without rows adds nothing.

    Its gradient fits losses that are weighted with the rows of their shard.

    Collective along the data axis, forward and backward: every process of it
    calls it.
    """
    weight, group = rows.weight(context), context.data_group
    counts = rows.has_rows()
    if not isinstance(x, DTensor):
        return collectives.SumOverData.apply(x, weight, group, counts)
    x = sharded.reduced(x)
    mesh, placements, shape = x.device_mesh, x.placements, tuple(x.shape)
    local = sharded.Leave.apply(x)
    local = collectives.SumOverData.apply(local, weight, group, counts)
    return sharded.Enter.apply(local, mesh, placements, shape)
