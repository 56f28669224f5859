"""Variables: what of them this process stores, and what layers see of it.

A variable whose layout shards it over an axis of size > 1 is stored as an
`nn.Parameter` around a DTensor on the whole mesh. Any other variable stays the
plain tensor that it is on one device.
"""

import logging

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate

from keras.src.backend.common import global_state
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.mesh.context import logger
from keras.src.backend.torch.distribution.modes import Shows
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.modes import stored_values
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import weights

# Marks a torch module's parameter that is a Keras variable too.
TAKEN = "_keras_variable_of"


def fitting(layout, variable, distribution):
    """The layout that a key of the layout map gives to a variable.

    Keys are written for the weights that a layer is built with, and must have
    an entry for each of their dims. What is made of those later may match too,
    and have other dims: slots of an optimizer, states of a metric, what a layer
    is quantized or adapted with. That, and what is no weight (a scalar, a state
    that is not trained), stays whole. An empty layout says so of a weight.

    Args:
        layout: `TensorLayout`.
        variable: of known shape and path.
        distribution: the `Distribution` that gives the layout.

    Raises:
        ValueError: if a weight of a layer has another number of dims.
    """
    shape = variable._shape
    if len(layout.axes) in (0, len(shape)):
        return layout
    key_of = getattr(distribution, "key_of", lambda path: None)
    said = (
        f"key='{key_of(variable.path)}', layout={tuple(layout.axes)}, "
        f"path='{variable.path}', shape={shape}: {len(layout.axes)} entries "
        f"for {len(shape)} dims"
    )
    if shape and variable.trainable and not variable._is_made_later:
        raise ValueError(
            "A layout has an entry for each dim of its variable, an axis of "
            f"the mesh or None. Received: {said}"
        )
    logger.info("variable '%s' stays whole: %s", variable.path, said)
    return type(layout)([None] * len(shape), layout.device_mesh)


def is_made_later():
    """Whether a variable that is being made is none of those that a layer is
    built with."""
    # They are imported after variables.
    from keras.src.layers import Layer
    from keras.src.metrics import Metric
    from keras.src.optimizers.base_optimizer import BaseOptimizer

    owner = _owner()
    if isinstance(owner, Layer):
        return owner.built or owner.quantization_mode is not None
    return isinstance(owner, (BaseOptimizer, Metric))


def is_in_layer():
    """Whether a layer builds itself, is called, or lays out what its call has
    returned."""
    from keras.src.layers import Layer

    return isinstance(_owner(), Layer)


def _owner():
    """The layer, optimizer or metric whose name is the innermost scope."""
    scopes = global_state.get_global_attribute("name_scope_stack")
    return scopes[-1].caller if scopes else None


def shard(value, mesh, placements):
    """Cuts a whole value, equal on all processes, into a DTensor.

    Does not communicate.

    Args:
        value: plain tensor of the global shape.
        mesh: torch mesh.
        placements: one for each axis of `mesh`. Where it is `Partial`, the
            first process of the axis has the value, the others zero.
    """
    local = value
    for dim, axis in cuts.from_placements(tuple(placements), tuple(mesh.shape)):
        local = collectives.shard_of(local, dim, mesh.get_group(axis))
    # A copy: a view would keep the whole alive, or share its memory.
    local = local.detach().clone(memory_format=torch.contiguous_format)
    for axis, placement in enumerate(placements):
        if placement.is_partial() and mesh.get_local_rank(axis):
            local.zero_()
    return sharded.wrap(local, mesh, placements, tuple(value.shape))


def parameter(value, context, placements, trainable):
    """An `nn.Parameter` that stores our part of a whole value.

    Integers and booleans never ask for a gradient.

    Args:
        value: plain tensor of the global shape, equal on all processes.
        context: the `Context`.
        placements: one for each axis of `context.mesh`.
        trainable: whether a floating-point value asks for a gradient.
    """
    value = value.detach()
    asks = trainable and (value.is_floating_point() or value.is_complex())
    return torch.nn.Parameter(
        weights.stored(shard(value, context.mesh, placements), context),
        requires_grad=asks,
    )


def assign(stored, value):
    """Writes a whole value, or a DTensor, into a stored DTensor.

    Collective if `value` is a DTensor with other placements.
    """
    with torch.no_grad():
        if not isinstance(value, DTensor):
            value = shard(
                value.to(stored.dtype), stored.device_mesh, stored.placements
            )
        elif value.device_mesh != stored.device_mesh:
            value = shard(
                laid_out.gathered(value).to(stored.dtype),
                stored.device_mesh,
                stored.placements,
            )
        elif tuple(value.placements) != tuple(stored.placements):
            value = value.redistribute(placements=stored.placements)
        sharded.local_of(stored).copy_(sharded.local_of(value))


def local_gradients(grads, variables):
    """Gradients as the local shards that their variables store.

    Collective for a gradient that is laid out unlike its variable.
    """
    local = []
    for grad, variable in zip(grads, variables):
        stored = variable._value
        if isinstance(grad, DTensor):
            if isinstance(stored, DTensor):
                if tuple(grad.placements) != tuple(stored.placements):
                    grad = grad.redistribute(placements=stored.placements)
                grad = grad.to_local()
            else:
                grad = grad.full_tensor()
        elif isinstance(stored, DTensor):
            if not isinstance(grad, torch.Tensor):
                grad = torch.as_tensor(
                    grad, dtype=stored.dtype, device=stored.device
                )
            grad = shard(grad, stored.device_mesh, stored.placements)
            grad = grad.to_local()
        local.append(grad)
    return local


def read_stored(variable):
    """The stored value of a variable, cast if its layer is of mixed dtype."""
    with stored_values():
        return variable.value


def present(value, variable):
    """What a reader sees of the value of a variable; see `modes`.

    Collective inside a layer's call if the data axis shards the variable.

    Args:
        value: the stored value, perhaps cast to another dtype.
        variable: whose value it is.
    """
    if not isinstance(value, DTensor):
        return _enter(value) if modes.shows is Shows.DTENSORS else value
    if modes.shows is Shows.LOCAL:
        return sharded.local_of(value)
    if not modes.calls or modes.shows is Shows.STORED:
        return value
    context = current()
    if context is None or value.device_mesh != context.mesh:
        return value
    if modes.gathered is None:
        return _operand_of_a_layer(value, context)
    key = (id(variable), value.dtype, torch.is_grad_enabled())
    if key not in modes.gathered:
        modes.gathered[key] = _operand_of_a_layer(value, context)
    return modes.gathered[key]


def _operand_of_a_layer(value, context):
    if private.is_in_transform():
        return laid_out.whole(value)
    local, placements = operand(value, context)
    if not any(p.is_shard() for p in placements):
        return _enter(local) if modes.shows is Shows.DTENSORS else local
    if modes.shows is Shows.WHOLE:
        return _gather_model_axes(local, placements, value.shape, context)
    shape = tuple(value.shape)
    return sharded.Enter.apply(local, context.model_mesh, placements, shape)


def _enter(value):
    context = current()
    if not value.is_floating_point():
        return value
    return sharded.Enter.apply(
        value,
        context.model_mesh,
        context.model_placements_whole,
        tuple(value.shape),
    )


def _gather_model_axes(local, placements, shape, context):
    value = sharded.wrap(
        local.detach(), context.model_mesh, placements, tuple(shape)
    )
    # The axis that cuts a dim finest is undone first.
    for dim, axis, size in reversed(laid_out.levels(value)):
        group = context.model_mesh.get_group(axis)
        local = collectives.AllGather.apply(local, dim, size, group)
    return local


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


def log(path, value):
    """Tells the debug log how a variable is stored."""
    if logger.isEnabledFor(logging.DEBUG):
        placements, local = "whole", tuple(value.shape)
        if isinstance(value, DTensor):
            placements, local = value.placements, tuple(value.to_local().shape)
        logger.debug(
            "variable %s: global shape %s, placements %s, local shape %s",
            path,
            tuple(value.shape),
            placements,
            local,
        )
