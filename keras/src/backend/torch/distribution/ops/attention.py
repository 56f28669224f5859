"""Attention on local shards: of heads, or of rows."""

from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate

from keras.src.backend.torch.distribution.global_rows import borders
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import (
    whole as whole_rows,
)
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded


def attend(released, tensors, bias, mask, settings):
    """Attention, with sharded heads (or rows) computed where they are.

    torch has no sharding rule for attention on CPU. Heads need nothing of each
    other, so no rule is needed.

    Collective along the model axes if query, key and value are not sharded
    alike.

    Args:
        released: the function of whole tensors, or of equal shards.
        tensors: tuple of query, key and value, of shape
            `(batch, length, heads, dim)`.
        bias, mask: tensors that broadcast to
            `(batch, heads, query length, key length)`, or None.
        settings: tuple, what else `released` takes.
    """
    query, _, value = tensors
    if all(is_rows(x) and x.at == 0 for x in tensors):
        return _attend_rows(released, tensors, bias, mask, settings)
    if not any(isinstance(x, DTensor) for x in tensors):
        return released(
            *tensors,
            sharded.whole(bias),
            sharded.whole(mask),
            *settings,
        )
    mesh = next(x.device_mesh for x in tensors if isinstance(x, DTensor))
    tensors = [_enter(x, mesh) for x in tensors]
    placements = [
        _common_placement(axis, mesh, *tensors) for axis in range(mesh.ndim)
    ]
    if len({p.dim for p in placements if p.is_shard()}) < sum(
        p.is_shard() for p in placements
    ):
        placements = list(sharded.replicate(mesh))
    local = [
        sharded.Leave.apply(
            x
            if list(x.placements) == placements
            else x.redistribute(placements=placements)
        )
        for x in tensors
    ]
    output = released(
        *local,
        _cut(bias, mesh, placements, query.shape),
        _cut(mask, mesh, placements, query.shape),
        *settings,
    )
    shape = (*query.shape[:3], value.shape[3])
    return sharded.Enter.apply(output, mesh, tuple(placements), shape)


def _attend_rows(released, tensors, bias, mask, settings):
    rows = tensors[0].rows

    def local_of(x):
        if x is not None and x.ndim == 4 and x.shape[0] > 1:
            return borders.local_rows(x, rows)
        return whole_rows(x)

    def attend_local(query, key, value, bias, mask):
        return attend(released, (query, key, value), bias, mask, settings)

    return borders.on_rows_of(
        attend_local, *tensors, local_of(bias), local_of(mask), tensors=3
    )


def _enter(x, mesh):
    if isinstance(x, DTensor):
        return sharded.reduced(x)
    return sharded.Enter.apply(x, mesh, sharded.replicate(mesh), tuple(x.shape))


def _common_placement(axis, mesh, query, key, value):
    """How query, key and value can all be cut along a mesh axis."""
    placement = query.placements[axis]
    size = mesh.size(axis)
    if placement.is_shard() and placement.dim == 0:
        return placement
    if placement.is_shard() and placement.dim == 2:
        heads, shared = query.shape[2], key.shape[2]
        # Each group of query heads must lie with its key and value head.
        if heads == shared or (shared % size == 0 and heads % size == 0):
            return placement
    return Replicate()


def _cut(x, mesh, placements, query_shape):
    """Our part of a bias or mask that broadcasts over batch and heads."""
    if x is None:
        return None
    x = sharded.whole(x)
    for axis, placement in enumerate(placements):
        if not placement.is_shard():
            continue
        # (batch, length, heads, dim) -> (batch, heads, query, key)
        dim = {0: 0, 2: 1}[placement.dim] - 4 + x.ndim
        group = mesh.get_group(axis)
        if dim >= 0 and x.shape[dim] > 1:
            x = collectives.Slice.apply(x, dim, group)
        elif x.requires_grad:
            # Times one: the gradient of a product is a tensor of its own,
            # that may be summed in place.
            x = collectives.AllReduceGradient.apply(x, group) * 1
    return x
