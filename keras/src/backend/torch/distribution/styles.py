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
from keras.src.backend.torch.distribution import activations
from keras.src.backend.torch.distribution import process_group
from keras.src.backend.torch.distribution.context import logger
from keras.src.backend.torch.distribution.modes import on_dtensors
from keras.src.backend.torch.distribution.modes import on_weights_gathered_once
from keras.src.backend.torch.distribution.modes import on_whole_weights
from keras.src.ops.operation import Operation

STYLE = "_parallel_style"
RUNS_SHARDED = "_keras_runs_sharded"
RUNS_WHOLE = "_keras_runs_whole"


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
        module.__dict__[STYLE] = self
        module.__dict__.pop("_keras_style_decision", None)
        return module

    def call(self, layer, context, args, kwargs):
        """The layer's outputs.

        Code that DTensor has no rule for, forward or backward, runs on whole
        weights and inputs: that is found out, and said, at the first call.

        Collective along the model axes, as the layer's shards ask for.
        """
        if RUNS_WHOLE in layer.__dict__:
            return self.call_whole(layer, args, kwargs)
        wanted = "backward" if torch.is_grad_enabled() else "forward"
        if layer.__dict__.get(RUNS_SHARDED) not in (wanted, "backward"):
            why = _why_not_sharded(layer, context, args, kwargs)
            if why is not None:
                outputs = self.call_whole(layer, args, kwargs)
                # If it is the layer that is wrong, it has failed again now,
                # in its own words.
                _run_whole(layer, why)
                return outputs
            layer.__dict__[RUNS_SHARDED] = wanted
        return _call_sharded(layer, context, args, kwargs)

    def call_whole(self, layer, args, kwargs):
        """The layer's outputs, computed whole on every process."""
        args, kwargs = tree.map_structure(activations.whole, (args, kwargs))
        with on_whole_weights():
            return Operation.__call__(layer, *args, **kwargs)

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
            return Operation.__call__(layer, *args, **kwargs)


GENERAL = ShardedStyle()
RECURRENT = RecurrentStyle()


def log_call(layer, style, args, outputs):
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
    tensors = [v._value for v in weights] + tree.flatten((args, kwargs))
    return any(isinstance(x, DTensor) and _has_empty_shard(x) for x in tensors)


def _has_empty_shard(x):
    sizes = {}  # of the smallest shard, by dim
    for axis, placement in enumerate(x.placements):
        if placement.is_shard():
            shards = x.device_mesh.size(axis)
            size = sizes.get(placement.dim, x.shape[placement.dim])
            # Shards have a size of ceil(size / shards) but for the last ones.
            sizes[placement.dim] = size - (shards - 1) * -(-size // shards)
            if size and sizes[placement.dim] <= 0:
                return True
    return False


def _call_sharded(layer, context, args, kwargs):
    args, kwargs = tree.map_structure(
        lambda x: activations.enter(x, context.model_mesh), (args, kwargs)
    )
    with on_dtensors():
        outputs = Operation.__call__(layer, *args, **kwargs)
    return tree.map_structure(activations.leave, outputs)


def _why_not_sharded(layer, context, args, kwargs):
    """Tries a layer's code on DTensors, forward and backward.

    Some operators have a rule for DTensors, and their gradients none: that
    must be found out before the program's own backward pass. What the trial
    changes is put back.

    Collective along the model axes, and along the data axis if it shards the
    layer's variables.

    Returns:
        String, why it cannot run so; None if it can.
    """
    if has_empty_shards(layer, args, kwargs):
        # Such a shard may fail where the others do not, and they would wait
        # for it.
        return "a shard of a weight or an input is empty"
    states = [
        *layer._non_trainable_variables,
        *(generator.state for generator in layer._seed_generators),
    ]
    saved = [(v, v._value.detach().clone()) for v in states]
    losses = list(layer._losses)
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        # Not under the hooks of a checkpoint, which would count the trial in.
        with torch.random.fork_rng(_random_devices()), keep:
            args, kwargs = tree.map_structure(_detach, (args, kwargs))
            outputs = _call_sharded(layer, context, args, kwargs)
            _backward(layer, (args, kwargs), outputs)
    except Exception as error:
        return (
            f"sharded, its code failed with {type(error).__name__}: "
            f"{_reason(error)}"
        )
    finally:
        for v, value in saved:
            v._direct_assign(value)
        layer._losses[:] = losses
    return None


def _random_devices():
    is_cuda = process_group.device_type() == "cuda"
    return [torch.cuda.current_device()] if is_cuda else []


def _detach(x):
    if not isinstance(x, torch.Tensor) or not x.requires_grad:
        return x
    y = x.detach().requires_grad_()
    mask = getattr(x, "_keras_mask", None)
    if mask is not None:
        y._keras_mask = mask
    return y


def _backward(layer, inputs, outputs):
    outputs = [x for x in tree.flatten(outputs) if _asks(x)]
    inputs = [x for x in tree.flatten(inputs) if _asks(x)]
    inputs += [v._value for v in layer._trainable_variables if _asks(v._value)]
    if outputs and inputs:
        ones = [torch.ones_like(x) for x in outputs]
        torch.autograd.grad(outputs, inputs, ones, allow_unused=True)


def _asks(x):
    return isinstance(x, torch.Tensor) and x.requires_grad


def _run_whole(layer, why):
    """Decides for the whole way, and says once what it costs."""
    layer.__dict__[RUNS_WHOLE] = True
    if process_group.is_first():
        logger.warning(
            "Layer '%s' (%s) runs on whole weights and inputs, gathered for "
            "each call: %s",
            layer.path,
            type(layer).__name__,
            why,
        )


def _reason(error):
    """The first line of an error, without what Keras puts around it."""
    text = str(error).partition("\x1b[1m")[2] or str(error)
    return text.strip().splitlines()[0][:200]
