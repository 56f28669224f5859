"""From what is stored of a weight to what a layer computes with.

Data axes are gathered, which is FSDP; model axes stay cut, which is tensor
parallelism. Backward is the reduce-scatter of the gradient.
"""

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate

from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded


def operand(value, context):
    """What a layer computes with: whole on the data axes, our model shards.

    Autograd then gives what belongs to it: the reduce-scatter of the gradient
    over the data axes. FSDP when only these shard, tensor parallelism when only
    model axes do, and both at once.

    Collective along the data axes that shard the variable; backward along all
    of them, if one does.

    Args:
        value: the stored value, a DTensor on the whole mesh or plain.
        context: the `Context`.

    Returns:
        Plain local tensor, and its placements on `context.model_mesh`.
    """
    if not isinstance(value, DTensor):
        return value, context.model_placements_whole
    if cuts.has_several_on_a_dim(value.placements):
        return _operand_of_several_cuts(value, context)
    placements = context.model_placements(value.placements)
    if torch.is_grad_enabled() and value.requires_grad:
        return Unshard.apply(value, context), placements
    return _gathered(value, context), placements


def _operand_of_several_cuts(value, context):
    """As `operand`, where several axes cut one dim.

    The data axes, and what was cut after one of them, are gathered; then the
    model axes cut anew. Where their order is not that of the model mesh, they
    stay gathered.
    """
    placements = list(context.model_placements(value.placements))
    axes_of = {}
    for dim, axis, size in laid_out.levels(value):
        if context.mesh.size(axis) > 1:
            axes_of.setdefault(dim, []).append((axis, size))
    gathered, anew = [], []
    for dim, axes in axes_of.items():
        order = [axis for axis, _ in axes]
        model = [axis for axis in order if axis not in context.data_axes]
        again = model == sorted(model)
        data = [i for i, axis in enumerate(order) if axis in context.data_axes]
        first = 0
        if again:
            first = data[0] if data else len(order)
        gathered += [(dim, axis, size) for axis, size in axes[first:]]
        for axis in order[first:]:
            if axis in context.data_axes:
                continue
            if again:
                anew.append((dim, axis))
            else:
                placements[context.model_axes.index(axis)] = Replicate()
    layout = laid_out.layout_of(value)._replace(context=context)
    local = laid_out.Local.apply(value)
    local = laid_out.gather_shards(local, layout, gathered)
    for dim, axis in anew:
        group = context.mesh.get_group(axis)
        local = collectives.Slice.apply(local, dim, group)
    return local, tuple(placements)


def is_model_sharded(value, context):
    """Whether a stored value is sharded over an axis of the model mesh."""
    return is_laid_out_by(value, context) and any(
        cuts.is_cut(value.placements[axis]) for axis in context.model_axes
    )


def is_laid_out_by(value, context):
    """Whether a stored value is cut as a layout map says.

    A torch module's own DTensors, of a plan written by hand, are not: they lie
    on a mesh of that plan. (Meshes are compared by value: DTensor's caches may
    hand out an equal mesh in place of the one that went in.)
    """
    return isinstance(value, DTensor) and value.device_mesh == context.mesh


def _gathered(value, context):
    return laid_out.gather_levels(
        sharded.local_of(value), _data_cuts(value, context), context.mesh
    )


def _data_cuts(value, context):
    """Those of `laid_out.levels` that are of data axes, where each dim is cut
    once."""
    return [
        (
            value.placements[axis].dim,
            axis,
            value.shape[value.placements[axis].dim],
        )
        for axis in context.cuts_data(value.placements)
    ]


class Unshard(torch.autograd.Function):
    """Stored DTensor -> the local tensor that a layer computes with."""

    @staticmethod
    def forward(ctx, value, context):
        ctx.layout, ctx.context = laid_out.layout_of(value), context
        ctx.cuts = _data_cuts(value, context)
        local = _gathered(value, context)
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad)
        if ctx.cuts:
            grad = laid_out.scattered(grad, ctx.cuts, ctx.context)
        return ctx.layout.carry(grad.contiguous()), None


def gather_model_axes(local, placements, shape, context):
    """The whole of an operand, from model shards.

    Collective along the model axes that cut it.
    """
    layout = laid_out.Layout(
        DTensor, context.model_mesh, tuple(placements), tuple(shape)
    )
    return laid_out.gather_shards(local, layout)
