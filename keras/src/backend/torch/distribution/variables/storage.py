"""Variables: what of them this process stores, and what layers see of it.

A variable whose layout shards it over an axis of size > 1 is stored as an
`nn.Parameter` around a DTensor on the whole mesh. Any other variable stays the
plain tensor that it is on one device.
"""

import logging

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.common import global_state
from keras.src.backend.torch.distribution.mesh.context import logger
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import drawing
from keras.src.backend.torch.distribution.variables import weights


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


def is_slot():
    """Whether a variable that is being made is an optimizer's."""
    from keras.src.optimizers.base_optimizer import BaseOptimizer

    return isinstance(_owner(), BaseOptimizer)


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
    layout = laid_out.Layout(
        DTensor, mesh, tuple(placements), tuple(value.shape)
    )
    local = laid_out.cut(value, layout)
    # A copy: a view would keep the whole alive, or share its memory.
    local = local.detach().clone(memory_format=torch.contiguous_format)
    for axis, placement in enumerate(placements):
        if placement.is_partial() and mesh.get_local_rank(axis):
            local.zero_()
    return layout.wrap(local)


def parameter(value, context, placements, trainable):
    """An `nn.Parameter` that stores our part of a whole value.

    Integers and booleans never ask for a gradient.

    Args:
        value: plain tensor of the global shape, equal on all processes.
        context: the `Context`.
        placements: one for each axis of `context.mesh`.
        trainable: whether a floating-point value asks for a gradient.
    """
    value = shard(value.detach(), context.mesh, placements)
    return _parameter(value, context, trainable)


def parameter_of_shard(local, shape, context, placements, trainable):
    """As `parameter`, of our part alone.

    Args:
        local: plain tensor, our shard, that nobody else writes into.
        shape: tuple, the global shape.
    """
    value = sharded.wrap(local.detach(), context.mesh, placements, shape)
    return _parameter(value, context, trainable)


def _parameter(value, context, trainable):
    asks = trainable and (value.is_floating_point() or value.is_complex())
    return torch.nn.Parameter(
        weights.stored(value, context), requires_grad=asks
    )


def part_of(shape, context, placements):
    """The `Part` of a variable that this process stores."""
    layout = laid_out.Layout(DTensor, context.mesh, tuple(placements), shape)
    return drawing.Part(shape, laid_out.ranges(layout))


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
