"""From what is stored of a weight to what a layer computes with.

The data axis is gathered, which is FSDP; model axes stay cut, which is tensor
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
    """What a layer computes with: whole on the data axis, our model shards.

    Autograd then gives what belongs to it: the reduce-scatter of the gradient
    over the data axis. FSDP when only the data axis shards, tensor parallelism
    when only model axes do, and both at once.

    Collective along the data axis if it shards the variable.

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

    The data axis, and what it was cut by after it, is gathered; then the model
    axes cut anew. Where their order is not that of the model mesh, they stay
    gathered.
    """
    placements = list(context.model_placements(value.placements))
    axes_of = {}
    for dim, axis, size in laid_out.levels(value):
        axes_of.setdefault(dim, []).append((axis, size))
    local = laid_out.Local.apply(value)
    for dim, axes in axes_of.items():
        model = [axis for axis, _ in axes if axis != context.data_axis]
        again = model == sorted(model)
        order = [axis for axis, _ in axes]
        if again and context.data_axis not in order:
            continue
        first = order.index(context.data_axis) if again else 0
        for axis, size in reversed(axes[first:]):
            group = context.mesh.get_group(axis)
            if axis == context.data_axis:
                local = laid_out.GatherOverData.apply(local, dim, size, context)
            else:
                local = collectives.AllGather.apply(local, dim, size, group)
        for axis, _ in axes[first:]:
            if axis == context.data_axis or axis not in context.model_axes:
                continue
            if again:
                group = context.mesh.get_group(axis)
                local = collectives.Slice.apply(local, dim, group)
            else:
                placements[context.model_axes.index(axis)] = Replicate()
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
    local = sharded.local_of(value)
    placement = value.placements[context.data_axis]
    if placement.is_shard() and context.data_size > 1:
        size = value.shape[placement.dim]
        return collectives.all_gather(
            local, placement.dim, size, context.data_group
        )
    return local


class Unshard(torch.autograd.Function):
    """Stored DTensor -> the local tensor that a layer computes with."""

    @staticmethod
    def forward(ctx, value, context):
        ctx.layout, ctx.context = laid_out.layout_of(value), context
        local = _gathered(value, context)
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad):
        context = ctx.context
        grad = collectives.whole_gradient(grad)
        placement = ctx.layout.placements[context.data_axis]
        if placement.is_shard() and context.data_size > 1:
            grad = laid_out.scattered(grad, placement.dim, context)
        return ctx.layout.carry(grad.contiguous()), None


def gather_model_axes(local, placements, shape, context):
    """The whole of an operand, from model shards.

    Collective along the model axes that cut it.
    """
    layout = laid_out.Layout(
        DTensor, context.model_mesh, tuple(placements), tuple(shape)
    )
    return laid_out.gather_shards(local, layout)
