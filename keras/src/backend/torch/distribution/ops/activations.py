"""What layers hand each other: plain, or sharded over the model axes.

A sharded activation is a DTensor of the model mesh, never partial, in shards of
one size.
"""

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate

from keras.src.backend.common.name_scope import current_path
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded


def map_rows(x, function, *args):
    """`function` of the rows that a `GlobalTensor` holds; they stay rows."""
    if x.pending is not None:
        return x
    y = GlobalTensor(function(x.local, *args), x.at, x.rows)
    return sharded.keep_mask(y, x)


def enter(x, mesh):
    """A tensor as a DTensor of the model mesh, not partial."""
    if type(x) is GlobalTensor:
        return map_rows(x, enter, mesh)
    if isinstance(x, DTensor):
        y = sharded.reduced(x)
    elif isinstance(x, torch.Tensor) and x.is_floating_point():
        if x.device.type != mesh.device_type:
            # As Keras's own operations take what a program hands them.
            x = x.to(mesh.device_type)
        y = sharded.Enter.apply(
            x, mesh, sharded.replicate(mesh), tuple(x.shape)
        )
    else:
        return x
    return sharded.keep_mask(y, x)


def leave(x):
    """What a layer hands on: never partial, plain if whole."""
    if type(x) is GlobalTensor:
        return map_rows(x, leave)
    if not isinstance(x, DTensor):
        return x
    y = sharded.reduced(x)
    if sharded.is_whole(y):
        y = sharded.Leave.apply(y)
    return sharded.keep_mask(y, x)


def whole(x):
    """What a program outside of layers sees: plain, whole tensors.

    But for outputs whose layout the user's layout map asks for.
    """
    if type(x) is GlobalTensor:
        return map_rows(x, whole) if isinstance(x.local, DTensor) else x
    if getattr(x, marks.REQUESTED, False):
        return x
    return plain(x)


def plain(x):
    """As `whole`, whatever the layout map asks for: of what becomes arrays."""
    if type(x) is GlobalTensor:
        return map_rows(x, plain) if isinstance(x.local, DTensor) else x
    if not isinstance(x, DTensor):
        return x
    return sharded.keep_mask(sharded.whole(x), x, sharded.whole)


def local(x, mesh):
    """Local tensor and placements of what a layer is handed.

    Collective along the axes where `x` is partial.
    """
    if not isinstance(x, DTensor):
        return x, sharded.replicate(mesh)
    x = sharded.reduced(x)
    return sharded.Leave.apply(x), tuple(x.placements)


def placements(x, mesh):
    """The placements of what a layer is handed."""
    if not isinstance(x, DTensor):
        return sharded.replicate(mesh)
    return x.placements


def requested(context, ndim):
    """The placements that the layout map asks for, of what the layer under way
    returns; None if it asks for none.

    Args:
        context: the `Context`.
        ndim: int, how many dims the output has.
    """
    distribution = context.distribution
    layout = distribution.get_tensor_layout(f"{current_path()}/output")
    if layout is None:
        return None
    shape = (1,) * ndim
    placements = context.placements(layout, shape, current_path())
    return context.model_placements(placements)


def carry(local, mesh, placements, shape):
    """A local result as what the next layer is handed.

    Collective along an axis whose shards would be of different sizes: there
    the result is gathered, since most code fails on such shards.
    """
    for axis, placement in enumerate(placements):
        size = mesh.size(axis)
        if placement.is_shard() and shape[placement.dim] % size:
            local = collectives.AllGather.apply(
                local,
                placement.dim,
                shape[placement.dim],
                mesh.get_group(axis),
            )
            placements = [*placements]
            placements[axis] = Replicate()
    if all(p.is_replicate() for p in placements):
        return local
    return sharded.Enter.apply(local, mesh, placements, shape)
