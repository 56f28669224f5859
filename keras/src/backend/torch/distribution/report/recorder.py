"""What training communicates, for which layer, and what memory it takes.

Nothing that trains knows of it. Within a `Recorder`, operators are seen at
torch's dispatcher, layers as they are called, and in backward the layer that
has made a node of autograd's graph: each node that leads to a layer's outputs,
and to no layer's before, bears its path.
"""

import contextlib
import sys
import weakref

import torch
from torch.distributed.tensor import DTensor

from keras.src import tree
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import local_of
from keras.src.backend.torch.distribution.gradients import reducer
from keras.src.backend.torch.distribution.layers import execution
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.modes import swapped
from keras.src.backend.torch.distribution.report import collectives
from keras.src.backend.torch.distribution.training import logs
from keras.src.backend.torch.distribution.variables import in_flight
from keras.src.optimizers.base_optimizer import BaseOptimizer

LAYER = "keras_layer"  # in a node's metadata

# What is communicated for: activations of a layer, weights that the data axis
# cuts and their gradients, other gradients, and what is none of these.
ACTIVATIONS, WEIGHTS, GRADIENTS, OTHERS = (
    "activations",
    "weights",
    "gradients",
    "others",
)
FILES = {
    in_flight.__file__: WEIGHTS,
    reducer.__file__: GRADIENTS,
    reducer.__file__.replace("reducer.py", "buckets.py"): GRADIENTS,
    logs.__file__: OTHERS,
}
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
        self._stack.enter_context(_Mode(self))
        self._stack.enter_context(self._layers())
        self._stack.enter_context(self._updates())
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def cut(self):
        """Ends a step, and begins another."""
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
        inputs = [x for x in _tensors((args, kwargs)) if x.ndim]
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
        kind, part = _reason()
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
        if kind in (GRADIENTS, OTHERS):
            layer = None
        elif kind is None:
            kind = OTHERS if layer is None else ACTIVATIONS
        size, axes = _axes_of(call.group)
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


def _tensors(values):
    """The tensors of nested lists, tuples and dicts. (Keras's `tree` leaves
    cycles behind, which would keep them.)"""
    found, todo = [], [values]
    while todo:
        x = todo.pop()
        if isinstance(x, (torch.Tensor, GlobalTensor)):
            found.append(x)
        elif isinstance(x, dict):
            todo.extend(x.values())
        elif isinstance(x, (list, tuple)):
            todo.extend(x)
    return found[::-1]


def _is_global(x):
    return type(x) is GlobalTensor


def _mark(outputs, path):
    """Writes a layer's path on the nodes that lead to its outputs."""
    nodes = [getattr(local_of(x), "grad_fn", None) for x in _tensors(outputs)]
    while nodes:
        node = nodes.pop()
        if node is None or LAYER in node.metadata:
            continue
        node.metadata[LAYER] = path
        nodes += [following for following, _ in node.next_functions]


def _reason():
    """What this project communicates for, and the first of the weights."""
    frame = sys._getframe(3)
    for _ in range(40):
        if frame is None:
            break
        kind = FILES.get(frame.f_code.co_filename)
        if kind is WEIGHTS and "self" not in frame.f_locals:
            frame = frame.f_back
            continue
        if kind is not None:
            what = frame.f_locals.get("self")
            parts = getattr(what, "parts", getattr(what, "_parts", None))
            return kind, parts[0] if kind is WEIGHTS and parts else None
        frame = frame.f_back
    return None, None


def _axes_of(name):
    """The size of a process group, and the names of its mesh axes."""
    size = private.group_of(name).size()
    context = context_lib.current()
    if context is None:
        return size, "all"
    if context.data_axes and context.data_group.group_name == name:
        return size, ", ".join(context.axis_names[i] for i in context.data_axes)
    for axis, axis_name in enumerate(context.axis_names):
        if context.mesh.get_group(axis).group_name == name:
            return size, axis_name
    return size, "all"


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


class Memory:
    """The memory of tensors that operators have made, from here on.

    Attributes:
        live, peak: ints, bytes now, and the most.
    """

    def __init__(self):
        self.live = self.peak = 0
        self._sizes, self._references, self._last = {}, {}, []

    def reset_peak(self):
        self.peak = self.live

    def before(self):
        """To be called before an operator: what was resized since the last
        one has its size by now."""
        for reference in self._last:
            memory = reference()
            if memory is not None:
                self._set(memory._cdata, memory.nbytes())
        self._last = []
        self.peak = max(self.peak, self.live)

    def see(self, result, args, kwargs):
        """To be called with what an operator returns, and was handed."""
        # What was there before is written into, or viewed.
        there = {memory._cdata for memory in _memories((args, kwargs))}
        for memory in _memories(result):
            if memory._cdata in self._references or memory._cdata not in there:
                self._see(memory)

    def _see(self, memory):
        key = memory._cdata
        if key not in self._references:

            def freed(_, key=key):
                self._set(key, 0)
                self._sizes.pop(key, None)
                self._references.pop(key, None)

            self._references[key] = weakref.ref(memory, freed)
        self._last.append(self._references[key])
        self._set(key, memory.nbytes())

    def _set(self, key, size):
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size


def _memories(values):
    return [
        x.untyped_storage()
        for x in _tensors(values)
        if x.layout is torch.strided
    ]
