"""One call of a layer under a distribution."""

import functools

import torch
from torch.distributed.tensor import DTensor

from keras.src import tree
from keras.src.backend.torch import core
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.global_rows import borders
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import local_of
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.gradients import reducer
from keras.src.backend.torch.distribution.layers import plan
from keras.src.backend.torch.distribution.layers import projection
from keras.src.backend.torch.distribution.layers import released
from keras.src.backend.torch.distribution.layers import styles
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.mesh import trail
from keras.src.backend.torch.distribution.modes import layer_call
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.modes import on_plain_tensors
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.ops import operators
from keras.src.backend.torch.distribution.variables import unshard
from keras.src.ops.concrete import any_symbolic_tensors
from keras.src.ops.operation import Operation


def call(layer, context, args, kwargs):
    """The outputs of `layer`, whole if nobody but the program called it.

    Runs on DTensors: a layer that owns a sharded variable, and a layer without
    sublayers that is handed a sharded activation. Any other layer runs as
    released Keras has it. In a step in which code sees the global batch, layers
    of Keras's own run on local rows of it.

    Collective along the axes that shard the layer's variables and inputs, and
    along the data axis where its code needs all rows.
    """
    if core.get_device() == "meta" or any_symbolic_tensors(args, kwargs):
        return Operation.__call__(layer, *args, **kwargs)
    function = functools.partial(_call, layer, context)
    if not modes.calls and context.has_layouts:
        function = functools.partial(_call_outermost, context, function)
    if borders.is_seen():
        return borders.call_layer(layer, function, args, kwargs)
    if (
        not modes.calls
        and context.data_size > 1
        and rows.get_current_rows() is None
        and borders.rows_of((args, kwargs)) is not None
    ):
        # The global batch of a program outside of steps.
        with borders.step(context):
            return borders.call_layer(layer, function, args, kwargs)
    return function(args, kwargs)


def _call_outermost(context, function, args, kwargs):
    with operators.on_shards(context), unshard.forward_pass(context):
        return function(args, kwargs)


def _call(layer, context, args, kwargs):
    caller = modes.layer
    with layer_call(layer), unshard.reading(layer, context):
        if modes.gathered is not None or (
            context.model_mesh is None and not plan.is_recurrent(layer)
        ):
            if context.model_mesh is None and projection.is_plain(layer, args):
                return projection.project_plain(layer, *args)
            return released.call(layer, args, kwargs)
        style = plan.style_of(layer, context)
        if style is not None:
            trail.note(layer.__dict__.get(marks.NAME))
        elif not layer._layers and _handed_shards(args, kwargs):
            # Of how many rows a data shard has, it may depend what is cut.
            style = styles.GENERAL
        if style is None:
            with on_plain_tensors():
                outputs = released.call(layer, args, kwargs)
        else:
            if type(style) is not styles.ShardedStyle and borders.is_seen():
                # They know rows in dim 0 alone: see `borders.call_layer`.
                args, kwargs = tree.map_structure(whole, (args, kwargs))
            outputs = style.call(layer, context, args, kwargs)
            styles.log_call(layer, style, args, outputs)
            if layer.activity_regularizer is not None:
                # Keras's own code, and the user's, on what leaves the layer.
                outputs = _map(activations.whole, outputs)
        if not layer._layers and _may_meet_shards(caller, context):
            _map(_keep_gradient_plain, outputs)
    if not modes.calls and not modes.sharded_outputs:
        outputs = _map(activations.whole, outputs)
    return outputs


def _map(function, outputs):
    if isinstance(outputs, torch.Tensor):
        return function(outputs)
    return tree.map_structure(function, outputs)


def _may_meet_shards(caller, context):
    """Whether code that is not Keras's may have an output meet a DTensor in a
    way that `operators` does not see: a user's function of autograd's, or any
    function outside of layers."""
    return (
        not type(caller).__module__.startswith("keras.src.")
        or context.distribution.lays_out_outputs
    )


def _keep_gradient_plain(x):
    """Makes the gradient of a layer's plain output plain.

    Where the output meets a DTensor in some other layer's own code, its
    gradient arrives as a DTensor, which the code that made the output need
    not understand.
    """
    x = local_of(x)
    if type(x) is torch.Tensor and x.requires_grad:
        x.register_hook(reducer.to_plain)


def _handed_shards(args, kwargs):
    # Keras's `tree` cannot be compiled where it meets tuples.
    values = [*args, *kwargs.values()]
    while values:
        x = values.pop()
        if type(x) is GlobalTensor:
            x = x.local
        if isinstance(x, DTensor):
            return True
        if isinstance(x, dict):
            values.extend(x.values())
        elif isinstance(x, (list, tuple)):
            values.extend(x)
    return False
