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
        context: the `Context` whose data axes it may be cut over, or None.
    """

    kind: type
    mesh: object
    placements: tuple
    shape: tuple
    context: object = None

    @property
    def data_axes(self):
        """Those of the data axes that cut the tensor."""
        context = self.context
        return () if context is None else context.cuts_data(self.placements)

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


def ranges(layout):
    """Pairs of the start and stop of our shard, for each dim of the whole."""
    result = [(0, size) for size in layout.shape]
    for dim, axis, size in levels(layout):
        start, stop = collectives.shard_range(
            size, layout.mesh.size(axis), layout.mesh.get_local_rank(axis)
        )
        first = result[dim][0]
        result[dim] = (first + start, first + stop)
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


def gather_shards(local, layout, undone=None):
    """The whole of what a layout cuts, from our shard, for autograd to
    differentiate.

    Collective along the axes that cut it; backward along all data axes, if one
    of them does.

    Args:
        local: our shard.
        layout: the `Layout`.
        undone: those of its `levels` to undo, the coarsest first; or all.
    """
    undone = levels(layout) if undone is None else undone
    data_axes = layout.data_axes
    if any(axis in data_axes for _, axis, _ in undone):
        return GatherOverData.apply(local, undone, layout.context)
    # The axis that cuts a dim finest is undone first.
    for dim, axis, size in reversed(undone):
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
    local = gather_levels(x._local_tensor.detach(), levels(x), layout.mesh)
    if same_memory(local, stored):
        # Nobody may write into what is stored by writing into a copy of it.
        return local.clone()
    return local.contiguous()


def gather_levels(local, levels, mesh):
    """What our shard was cut of, by these axes of `levels`.

    Collective: every process of these axes calls it.
    """
    for dim, axis, size in reversed(levels):
        local = collectives.all_gather(local, dim, size, mesh.get_group(axis))
    return local


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

    Collective along all data axes for a plain gradient, which is that of our
    own loss, of what some data axis cuts.

    Args:
        grad: laid out as it should be, or whole and plain.
        layout: the `Layout` of what it is the gradient of.
    """
    if layout.is_laid_out(grad):
        if torch.is_grad_enabled() and grad.requires_grad:
            return Local.apply(grad)
        return sharded.local_of(grad).detach()
    grad = collectives.whole_gradient(grad)
    if layout.data_axes:
        return scattered(grad, levels(layout), layout.context).contiguous()
    for dim, axis, _ in levels(layout):
        group = layout.mesh.get_group(axis)
        if torch.is_grad_enabled():
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
    """Shards -> what they were cut of, by data axes and perhaps model axes.

    Backward: the weighted mean of the data shards' gradients, scattered.

    Args:
        local: our shard.
        cuts: triples of `levels`, in order, a data axis among them.
        context: the `Context`.
    """

    @staticmethod
    def forward(ctx, local, cuts, context):
        ctx.cuts, ctx.context = cuts, context
        return gather_levels(local, cuts, context.mesh)

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad)
        return scattered(grad, ctx.cuts, ctx.context), None, None


def scattered(grad, cuts, context):
    """Our shard of the weighted mean of the data shards' gradients.

    It is scattered over the data axes that cut, and then, small as it is,
    added up over those that do not (hybrid sharding, as torch's FSDP has it).
    Along model axes all have the same gradient, and take their part.

    Collective: every process of the data axes calls it.

    Args:
        grad: of what was cut.
        cuts: triples of `levels`, in order, a data axis among them.
        context: the `Context`.
    """
    # A variable of a mixed policy is wider than what layers see of it: half
    # precision is not added up in half precision.
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if torch.is_grad_enabled():
        return ScatterMean.apply(grad.to(dtype), cuts, context).to(grad.dtype)
    mean = collectives.weighted(grad.to(dtype), rows.weight(context))
    for dim, axis, _ in cuts:
        group = context.mesh.get_group(axis)
        if axis in context.data_axes:
            mean = collectives.reduce_scatter(mean, dim, group)
        else:
            mean = collectives.shard_of(mean, dim, group)
    others = set(context.data_axes) - {axis for _, axis, _ in cuts}
    for axis in sorted(others):
        mean = mean.contiguous()
        dist.all_reduce(mean, group=context.mesh.get_group(axis))
    return mean.to(grad.dtype)


class ScatterMean(torch.autograd.Function):
    """As `scattered`, for `create_graph=True`. Backward is the gather: what
    it gives on shard i is going to be weighted with weight_i."""

    @staticmethod
    def forward(ctx, grad, cuts, context):
        ctx.cuts, ctx.context = cuts, context
        return scattered(grad, cuts, context).clone()

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad)
        return GatherOverData.apply(grad, ctx.cuts, ctx.context), None, None


class SumOfShards(torch.autograd.Function):
    """What processes have computed, each from its own shard, added up.

    Each data shard's loss has its own gradient of the sum. Where a data axis
    cuts, the weighted mean of them is that of every shard.

    Collective: every process of the axes that cut. Backward: of all data axes,
    if one of them cuts.
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
    """Weighted mean over data shards, where a data axis cuts."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        if not layout.data_axes:
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
