"""What training communicates, for which layer, and what memory it takes.

Nothing that trains knows of it. Within a `Recorder`, operators are seen at
torch's dispatcher, layers as they are called, and in backward the layer that
has made a node of autograd's graph: each node that leads to a layer's outputs,
and to no layer's before, bears its path.
"""

import contextlib
import gc

import torch
from torch.distributed.tensor import DTensor

from keras.src import tree
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import local_of
from keras.src.backend.torch.distribution.layers import execution
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.modes import swapped
from keras.src.backend.torch.distribution.report import collectives
from keras.src.backend.torch.distribution.report import reasons
from keras.src.backend.torch.distribution.report.memory import Memory
from keras.src.backend.torch.distribution.report.memory import tensors_of
from keras.src.optimizers.base_optimizer import BaseOptimizer

LAYER = "keras_layer"  # in a node's metadata

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"

# The recorder that writes down, of those that are open: the innermost.
_recording = [None]


class Recorder:
    """Within it, what this process communicates is written down.

    Args:
        updated: function that is called after each update by an optimizer of
            Keras's, with the optimizer; or None.

    Attributes:
        steps: list of lists of dicts, one a collective: see `record`.
        memory: `Memory`, from the third step on, when the optimizer's slots
            have been made.
        peak: int, bytes of what the last step has made, at the most; None
            before the third.
        model: of the outermost layers that were called, the one with most
            variables, or None.
        rows: int, of the global batch that it was called with, or None.
        inputs: what it was called with first, as tensors without memory that
            have all rows; None if it was called with no tensor.
    """

    def __init__(self, updated=None):
        self.steps = [[]]
        self.memory = self.peak = self.model = self.rows = self.inputs = None
        self._updated, self._phase = updated, None
        self._paths = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self._stack.callback(_recording.__setitem__, 0, _recording[0])
        _recording[0] = self
        # Keras's `tree` leaves cycles that keep tensors: what is live must not
        # depend on when they are looked for.
        if gc.isenabled():
            gc.disable()
            self._stack.callback(gc.enable)
        self._stack.enter_context(_Mode(self))
        self._stack.enter_context(self._layers())
        self._stack.enter_context(self._updates())
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def cut(self):
        """Ends a step, and begins another."""
        gc.collect()
        self.steps.append([])
        if self.memory is not None:
            self.peak = self.memory.peak
        if self.model is not None:
            # For what their weights are known by.
            for v in self.model.variables:
                self._paths[id(v._value)] = v.path
        if len(self.steps) > 2:
            # The slots of the optimizer have been made.
            self.memory = self.memory or Memory()
            self.memory.reset_peak()

    def is_steady(self):
        """Whether the last two steps that have ended were alike."""
        return len(self.steps) > 4 and self.steps[-2] == self.steps[-3]

    def _layers(self):
        released = execution._call

        def call(layer, context, args, kwargs):
            is_outermost = not modes.calls
            outputs = released(layer, context, args, kwargs)
            if _recording[0] is not self:
                return outputs
            _mark(outputs, layer.path)
            if is_outermost:
                self._called(layer, context, args, kwargs)
            return outputs

        return swapped([(execution, "_call", call)])

    def _updates(self):
        released = BaseOptimizer.apply

        def apply(optimizer, grads, trainable_variables=None):
            if _recording[0] is not self:
                return released(optimizer, grads, trainable_variables)
            if trainable_variables is not None:
                trainable_variables = list(trainable_variables)
            self._phase = UPDATE
            try:
                return released(optimizer, grads, trainable_variables)
            finally:
                self._phase = None
                if self._updated is not None:
                    self._updated(optimizer)

        return swapped([(BaseOptimizer, "apply", apply)])

    def _called(self, layer, context, args, kwargs):
        if self.model is not None:
            if len(layer.variables) < len(self.model.variables):
                return
        self.model, self.rows, self.inputs = layer, None, None
        current = rows.get_current_rows()
        inputs = [x for x in tensors_of((args, kwargs)) if x.ndim]
        if current is not None:
            self.rows = sum(current.counts)
        elif inputs and (context.data_size == 1 or _is_global(inputs[0])):
            self.rows = int(inputs[0].shape[0])
        if args and inputs and self.rows is not None:
            self.inputs = tree.map_structure(self._without_memory, args[0])

    def _without_memory(self, x):
        if not isinstance(x, (torch.Tensor, GlobalTensor)):
            return x
        shape = (self.rows, *x.shape[1:])
        return torch.empty(shape, dtype=x.dtype, device="meta")

    def record(self, call):
        kind, part = reasons.reason()
        layer = modes.layer and modes.layer.path
        direction = self._phase or FORWARD
        if private.is_in_backward():
            direction = BACKWARD
            node = private.current_node()
            if layer is None and node is not None:
                layer = node.metadata.get(LAYER)
        if part is not None:
            path = self._paths.get(id(part.weight))
            layer = layer if path is None else path.rpartition("/")[0]
        if kind in (reasons.GRADIENTS, reasons.OTHERS):
            layer = None
        elif kind is None:
            kind = reasons.OTHERS if layer is None else reasons.ACTIVATIONS
        size, axes = reasons.axes_of(call.group)
        self.steps[-1].append(
            {
                "op": call.op,
                "axes": axes,
                "for": kind,
                "layer": layer,
                "direction": direction,
                "shapes": [list(x) for x in call.sizes],
                "dtype": str(call.inputs[0].dtype).removeprefix("torch."),
                "bytes": call.bytes,
                "sent": collectives.sent_bytes(call.op, call.bytes, size),
            }
        )


def _is_global(x):
    return type(x) is GlobalTensor


def _mark(outputs, path):
    """Writes a layer's path on the nodes that lead to its outputs."""
    nodes = [getattr(local_of(x), "grad_fn", None) for x in tensors_of(outputs)]
    while nodes:
        node = nodes.pop()
        if node is None or LAYER in node.metadata:
            continue
        node.metadata[LAYER] = path
        nodes += [following for following, _ in node.next_functions]


class _Mode(private.DispatchMode):
    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if _recording[0] is not self.recorder:
            return func(*args, **(kwargs or {}))
        call = collectives.call_of(func, args, kwargs)
        if call is not None:
            self.recorder.record(call)
        memory = self.recorder.memory
        if memory is not None:
            memory.before()
        result = func(*args, **(kwargs or {}))
        if memory is not None:
            memory.see(result, args, kwargs)
        return result
