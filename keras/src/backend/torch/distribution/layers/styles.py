"""How a layer with sharded weights runs: torch's `ParallelStyle` contract.

`ShardedStyle` is the general way: the layer's own code on DTensors. Its
subclasses know their layer, compute on local shards with plain torch, and only
carry the result to the next layer in a DTensor.
"""

import logging

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from keras.src import tree
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.global_rows.carrier import local_of
from keras.src.backend.torch.distribution.layers import released
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.mesh.context import logger
from keras.src.backend.torch.distribution.modes import on_dtensors
from keras.src.backend.torch.distribution.modes import on_weights_gathered_once
from keras.src.backend.torch.distribution.modes import on_whole_weights
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.tensors import sharded


class ShardedStyle(ParallelStyle):
    """Runs a Keras layer on DTensors of the model mesh.

    Plain tensors enter as `Replicate`, weights as their model shards, DTensor
    propagates the shards through the layer's own code. What leaves is never
    partial, and plain when it is whole.

    Args:
        layouts: dict, the `TensorLayout` of each of the layer's own variables
            (or of a torch module's own parameters), by name.
    """

    def __init__(self, layouts=None):
        self.layouts = layouts or {}

    def _apply(self, module, device_mesh):
        # What torch's `parallelize_module` calls. A Keras layer's variables
        # are sharded where they are stored: only its way to run is set here.
        module.__dict__[marks.STYLE] = self
        module.__dict__.pop(marks.STYLE_DECISION, None)
        return module

    def call(self, layer, context, args, kwargs):
        """The layer's outputs.

        What its code does with shards: see `operators`.

        Collective along the model axes, as the layer's shards ask for.
        """
        if has_empty_shards(layer, args, kwargs):
            # Such a shard may fail where the others do not, and they would
            # wait for it.
            _say_whole(
                layer, context, "a shard of a weight or an input is empty"
            )
            return self.call_whole(layer, args, kwargs)
        return _call_sharded(layer, context, args, kwargs)

    def call_whole(self, layer, args, kwargs):
        """The layer's outputs, computed whole on every process."""
        args, kwargs = tree.map_structure(activations.whole, (args, kwargs))
        with on_whole_weights():
            return released.call(layer, args, kwargs)

    def __repr__(self):
        axes = {name: layout.axes for name, layout in self.layouts.items()}
        return f"{type(self).__name__}({axes})"


class RecurrentStyle(ShardedStyle):
    """Runs a recurrent layer on whole weights, gathered once for all steps.

    Its cell is called for every step of a sequence: on shards it would
    communicate as often.
    """

    def call(self, layer, context, args, kwargs):
        args, kwargs = tree.map_structure(activations.whole, (args, kwargs))
        with on_weights_gathered_once():
            return released.call(layer, args, kwargs)


def reads_as_released(layer):
    """Whether a layer runs the code of its class, and reads its weights in no
    other way: LoRA, quantisation and checkpointing have ways of their own."""
    return (
        "call" not in layer.__dict__
        and layer.quantization_mode is None
        and not layer.lora_enabled
        and not layer._remat_mode
    )


GENERAL = ShardedStyle()
RECURRENT = RecurrentStyle()


def log_call(layer, style, args, outputs):
    """Tells the debug log what a layer is handed and hands on."""
    if logger.isEnabledFor(logging.DEBUG):

        def describe(x):
            if isinstance(x, DTensor):
                return f"{tuple(x.shape)} {x.placements}"
            return tuple(x.shape) if isinstance(x, torch.Tensor) else x

        logger.debug(
            "layer %s (%s): inputs %s -> outputs %s",
            layer.path,
            type(style).__name__,
            tree.map_structure(describe, args),
            tree.map_structure(describe, outputs),
        )


def has_empty_shards(layer, args, kwargs):
    """Whether some process holds nothing of a weight or an input."""
    weights = layer._trainable_variables + layer._non_trainable_variables
    tensors = [v._value for v in weights]
    tensors += map(local_of, tree.flatten((args, kwargs)))
    return any(
        isinstance(x, DTensor) and sharded.has_empty_shard(x) for x in tensors
    )


def _call_sharded(layer, context, args, kwargs):
    args, kwargs = tree.map_structure(
        lambda x: activations.enter(x, context.model_mesh), (args, kwargs)
    )
    with on_dtensors():
        outputs = released.call(layer, args, kwargs)
    return tree.map_structure(activations.leave, outputs)


def _say_whole(layer, context, why):
    """Says once that a layer runs the whole way, and what that costs."""
    if context.says_first("whole way", layer.path) and process_group.is_first():
        logger.warning(
            "Layer '%s' (%s) runs on whole weights and inputs, gathered for "
            "each call: %s",
            layer.path,
            type(layer).__name__,
            why,
        )
