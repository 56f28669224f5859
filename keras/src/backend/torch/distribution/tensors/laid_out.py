"""Shards of a layout: how they are cut, gathered and added up.

Gradients: the loss of a data shard counts with the weight of its rows. What
the data axis cuts has one gradient for all data shards, the weighted mean of
theirs, of which each holds its part. What it does not cut has the gradient of
each data shard's own loss here, and is reduced later (see `gradients`). Along
model axes all processes compute the same.
"""

import contextlib
import typing

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded


class Layout(typing.NamedTuple):
    """How a tensor is cut.

    Attributes:
        kind: the class of the tensor, `DTensor` or a subclass.
        mesh: torch mesh.
        placements: one for each axis of `mesh`.
        shape: tuple, the global shape.
        context: the `Context` whose data axis it may be cut over, or None.
    """

    kind: type
    mesh: object
    placements: tuple
    shape: tuple
    context: object = None

    @property
    def data_axis(self):
        """The axis that splits rows, None if it does not cut the tensor."""
        context = self.context
        if context is None or context.data_size == 1:
            return None
        axis = context.data_axis
        return axis if cuts.is_cut(self.placements[axis]) else None

    @property
    def is_partial(self):
        """Whether it is a sum that is not taken yet."""
        return any(p.is_partial() for p in self.placements)

    def wrap(self, local):
        """A tensor around our shard, without autograd."""
        x = sharded.wrap(
            local, self.mesh, self.placements, self.shape, self.kind
        )
        if self.context is not None:
            x.context = self.context
        return x

    def carry(self, local):
        """A tensor around our shard, which may ask for a gradient."""
        if local.requires_grad:
            if torch.is_grad_enabled():
                return Carry.apply(local, self)
            local = local.detach()
        return self.wrap(local)

    def is_laid_out(self, x):
        """Whether a tensor is cut like this."""
        return (
            isinstance(x, DTensor)
            and x._spec.placements == self.placements
            and x._spec.mesh == self.mesh
        )


def layout_of(x):
    """The `Layout` of a DTensor."""
    spec = x._spec
    shape = tuple(spec.tensor_meta.shape)
    context = getattr(x, "context", None)
    return Layout(type(x), spec.mesh, spec.placements, shape, context)


def levels(layout):
    """How our shard was cut: triples of a dim, a mesh axis, and the size
    that the dim had here before the axis cut it.

    Args:
        layout: a `Layout`, or a DTensor.
    """
    if isinstance(layout, DTensor):
        layout = layout_of(layout)
    mesh, sizes, result = layout.mesh, list(layout.shape), []
    for dim, axis in cuts.from_placements(layout.placements, tuple(mesh.shape)):
        result.append((dim, axis, sizes[dim]))
        start, stop = collectives.shard_range(
            sizes[dim], mesh.size(axis), mesh.get_local_rank(axis)
        )
        sizes[dim] = stop - start
    return result


def fits(x, shape):
    """Whether a plain tensor may be broadcast to a shape."""
    offset = len(shape) - x.ndim
    return offset >= 0 and all(
        size in (1, shape[offset + dim]) for dim, size in enumerate(x.shape)
    )


def cut(x, layout):
    """Our part (a view) of a plain tensor that is equal on all processes, and
    has the layout's shape or may be broadcast to it. Does not communicate."""
    offset = len(layout.shape) - x.ndim
    is_cut = [
        size == layout.shape[offset + dim] for dim, size in enumerate(x.shape)
    ]
    for dim, axis, _ in levels(layout):
        own = dim - offset
        if own >= 0 and is_cut[own]:
            x = collectives.shard_of(x, own, layout.mesh.get_group(axis))
    return x


def sliced(x, layout):
    """As `cut`, of the layout's shape, for autograd to differentiate."""
    for dim, axis, _ in levels(layout):
        x = collectives.Slice.apply(x, dim, layout.mesh.get_group(axis))
    return x


def outside_of_transforms():
    """Within it, no transformation sees what is computed."""
    if not private.is_in_transform():
        return contextlib.nullcontext()
    return private.outside_of_transforms()


def whole(x):
    """The whole of a DTensor, plain; for autograd to differentiate, too.

    Collective: every process of the DTensor's mesh calls it.
    """
    with outside_of_transforms():
        layout = layout_of(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return gathered(x)
        return gather_shards(Local.apply(x), layout).contiguous()


def gather_shards(local, layout):
    """The whole of what a layout cuts, from our shard, for autograd to
    differentiate.

    Collective along the axes that cut it.
    """
    # The axis that cuts a dim finest is undone first.
    for dim, axis, size in reversed(levels(layout)):
        if axis == layout.data_axis:
            local = GatherOverData.apply(local, dim, size, layout.context)
        else:
            group = layout.mesh.get_group(axis)
            local = collectives.AllGather.apply(local, dim, size, group)
    return local


def gathered(x):
    """The whole of a DTensor, plain, without autograd.

    Collective: every process of the DTensor's mesh calls it.
    """
    layout, stored = layout_of(x), x._local_tensor
    if layout.is_partial:
        x = layout._replace(kind=DTensor, context=None).wrap(stored.detach())
        with torch.no_grad():
            x = sharded.summed(x)
    local = x._local_tensor.detach()
    for dim, axis, size in reversed(levels(x)):
        group = layout.mesh.get_group(axis)
        local = collectives.all_gather(local, dim, size, group)
    if same_memory(local, stored):
        # Nobody may write into what is stored by writing into a copy of it.
        return local.clone()
    return local.contiguous()


def same_memory(a, b):
    """Whether two plain tensors share what they store."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


class Local(torch.autograd.Function):
    """A DTensor -> our shard of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.layout = layout_of(x)
        local = x._local_tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad).contiguous()
        return ctx.layout.carry(grad)


class Carry(torch.autograd.Function):
    """Our shard -> the DTensor that carries it."""

    @staticmethod
    def forward(ctx, local, layout):
        ctx.layout = layout
        return layout.wrap(local.view_as(local).detach())

    @staticmethod
    def backward(ctx, grad):
        return local_gradient(grad, ctx.layout), None


def local_gradient(grad, layout):
    """Our shard of a gradient.

    Collective along the data axis for a plain gradient, which is that of our
    own loss, of what the data axis cuts.

    Args:
        grad: laid out as it should be, or whole and plain.
        layout: the `Layout` of what it is the gradient of.
    """
    if layout.is_laid_out(grad):
        if torch.is_grad_enabled() and grad.requires_grad:
            return Local.apply(grad)
        return sharded.local_of(grad).detach()
    grad = collectives.whole_gradient(grad)
    for dim, axis, _ in levels(layout):
        group = layout.mesh.get_group(axis)
        if axis == layout.data_axis:
            grad = scattered(grad, dim, layout.context)
        elif torch.is_grad_enabled():
            grad = collectives.Slice.apply(grad, dim, group)
        else:
            grad = collectives.shard_of(grad, dim, group)
    return grad.contiguous()


def lay_out(grad, layout):
    """A gradient, laid out as what it is the gradient of.

    Collective as `local_gradient` is.
    """
    if type(grad) is layout.kind and layout.is_laid_out(grad):
        return grad
    return layout.carry(local_gradient(grad, layout))


class GatherOverData(torch.autograd.Function):
    """Shards of the data axis -> what they were cut of. Backward: the
    weighted mean of the data shards' gradients, scattered."""

    @staticmethod
    def forward(ctx, local, dim, size, context):
        ctx.dim, ctx.context = dim, context
        if context.data_size == 1:
            return local.view_as(local)
        return collectives.all_gather(local, dim, size, context.data_group)

    @staticmethod
    def backward(ctx, grad):
        context = ctx.context
        grad = collectives.whole_gradient(grad)
        if context.data_size > 1:
            grad = scattered(grad, ctx.dim, context)
        return grad, None, None, None


def scattered(grad, dim, context):
    """Our shard of the weighted mean of the data shards' gradients.

    Collective: every process of the data axis calls it.
    """
    # A variable of a mixed policy is wider than what layers see of it: half
    # precision is not added up in half precision.
    dtype = torch.promote_types(grad.dtype, torch.float32)
    weight, group = rows.weight(context), context.data_group
    if torch.is_grad_enabled():
        return ScatterMean.apply(grad.to(dtype), dim, context).to(grad.dtype)
    weighted = collectives.weighted(grad.to(dtype), weight)
    return collectives.reduce_scatter(weighted, dim, group).to(grad.dtype)


class ScatterMean(torch.autograd.Function):
    """As `scattered`, for `create_graph=True`. Backward is the gather: what
    it gives on shard i is going to be weighted with weight_i."""

    @staticmethod
    def forward(ctx, grad, dim, context):
        ctx.dim, ctx.context, ctx.size = dim, context, grad.shape[dim]
        return scattered(grad, dim, context).clone()

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad)
        grad = GatherOverData.apply(grad, ctx.dim, ctx.size, ctx.context)
        return grad, None, None


class SumOfShards(torch.autograd.Function):
    """What processes have computed, each from its own shard, added up.

    Each data shard's loss has its own gradient of the sum. Where the data axis
    cuts, the weighted mean of them is that of every shard.

    Collective: every process of the axes that cut. Backward: of the data axis,
    if it cuts.
    """

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return reduce_over_shards(x, layout, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad)
        return MeanOverData.apply(grad, ctx.layout), None


class MeanOverData(torch.autograd.Function):
    """Weighted mean over data shards, where the data axis cuts."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        if layout.data_axis is None:
            return x.view_as(x)
        x = collectives.weighted(x, rows.weight(layout.context)).clone()
        dist.all_reduce(x, group=layout.context.data_group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad)
        return SumOfShards.apply(grad, ctx.layout), None


def reduce_over_shards(x, layout, op):
    """What all shards give for a plain tensor that each has computed of its
    own, without autograd.

    Collective: every process of the axes that cut.
    """
    x = x.clone(memory_format=torch.contiguous_format)
    for axis, placement in enumerate(layout.placements):
        if cuts.is_cut(placement) and layout.mesh.size(axis) > 1:
            dist.all_reduce(x, op, group=layout.mesh.get_group(axis))
    return x
