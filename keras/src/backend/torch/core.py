"""Overlay: variables that are sharded as their layout says."""

import functools

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from keras.src import tree
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.variables import get_autocast_scope
from keras.src.backend.torch import core as upstream
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.gradients.reducer import keep_plain
from keras.src.backend.torch.distribution.mesh import agreement
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.mesh import together
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.ops import operators
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.training import checks
from keras.src.backend.torch.distribution.training import metric_states
from keras.src.backend.torch.distribution.variables import drawing
from keras.src.backend.torch.distribution.variables import reading
from keras.src.backend.torch.distribution.variables import storage
from keras.src.backend.torch.distribution.variables import streams
from keras.src.backend.torch.distribution.variables import unshard

__all__ = [
    "Variable",
    "convert_to_numpy",
    "convert_to_tensor",
    "remat",
    "to_torch_dtype",
    "vectorized_map",
]

TENSORS = (torch.Tensor, torch.nn.Parameter, DTensor)

released_convert_to_numpy = upstream.convert_to_numpy
released_convert_to_tensor = upstream.convert_to_tensor
released_remat = upstream.remat
released_to_torch_dtype = upstream.to_torch_dtype
released_vectorized_map = upstream.vectorized_map
released_variable = upstream.Variable


class Variable(upstream.Variable):
    # What a sharded one was cut of, until it is assigned: how the whole was
    # drawn, or its checksum.
    _origin = None
    # A few entries of the whole value that was last written into a sharded one.
    written = None
    # By which the reducer knows it; see `gradients`.
    _gradient_number = None

    def __init__(self, *args, **kwargs):
        # Its value may be made when its maker is done.
        self._is_made_later = current() is not None and storage.is_made_later()
        super().__init__(*args, **kwargs)

    @modes.direct()
    def _initialize(self, value):
        context = current()
        if context is None:
            super()._initialize(value)
            return
        self._shape = tuple(value.shape)
        if isinstance(value, torch.nn.Parameter):
            super()._initialize(value)
            setattr(value, marks.TAKEN, True)
        else:
            placements = self._lay_out(context)
            if context.is_sharded(placements):
                value = upstream.convert_to_tensor(value, dtype=self._dtype)
                value = sharded.whole(value)
                if not storage.is_slot():
                    self._origin = checks.checksum(value)
                self._value = storage.parameter(
                    value, context, placements, self.trainable
                )
            else:
                super()._initialize(value)
        self._was_initialized(context)

    def _lay_out(self, context):
        """Finds the layout of the variable; returns its placements."""
        layout = self._layout
        if layout is None:
            distribution = context.distribution
            layout = distribution.get_variable_layout(self)
            layout = storage.fitting(layout, self, distribution)
        self._layout = layout
        placements = context.placements(layout, self._shape, self.path)
        if metric_states.is_state(self):
            placements = metric_states.placements(placements, context)
        return placements

    def _was_initialized(self, context):
        self._context = context
        storage.log(self.path, self._value)
        if self._value.requires_grad:
            self._hook()

    @modes.direct()
    def _hook(self):
        """Lets backward reduce the gradient; done once, when it is needed."""
        context = self._context
        self._is_hooked = True
        value = self._value
        if not isinstance(value, DTensor) and context.model_mesh is not None:
            keep_plain(value)
        if context.reducer is not None and not (
            unshard.is_laid_out_by(value, context)
            and context.cuts_data(value.placements)
        ):
            self._gradient_number = context.reducer.register(value, self.path)
        elif sharded.is_weight(value):
            value.register_hook(
                functools.partial(laid_out.lay_out, layout=value.sharding)
            )

    def _deferred_initialize(self):
        # Keras comes again to those that are done where another one raises,
        # as where a layout does not fit: that error is the one to be seen.
        if self._value is None or current() is None:
            super()._deferred_initialize()

    def _initialize_with_initializer(self, initializer):
        with modes.drawing_initial_values():
            context = current()
            if context is not None and drawing.knows(initializer):
                placements = self._lay_out(context)
                if context.is_sharded(placements):
                    self._draw(initializer, context, placements)
                    return
            super()._initialize_with_initializer(initializer)

    @modes.direct()
    def _draw(self, initializer, context, placements):
        """Makes our part of the initial value, without the whole where that
        can be."""
        part = storage.part_of(self._shape, context, placements)
        value = drawing.draw(initializer, part, self._dtype)
        if part.origin is None:
            self._initialize(value)
            return
        self._origin = part.origin
        value = upstream.convert_to_tensor(value, dtype=self._dtype)
        self._value = storage.parameter_of_shard(
            value, self._shape, context, placements, self.trainable
        )
        self._was_initialized(context)

    def assign(self, value):
        if isinstance(self._value, DTensor):
            if isinstance(value, np.ndarray):
                self.written = agreement.sample(value)
            elif self._takes_part_of(value):
                return self._assign_part_of(value)
        return super().assign(value)

    def assign_add(self, value):
        stored = self._value
        if not (
            type(stored) is torch.nn.Parameter
            and _adds_in_kind(stored, value)
            and get_autocast_scope() is None
            and not in_stateless_scope()
            and not (
                _code_sees_global_batch()
                and metric_states.state_in_step(self) is not None
            )
        ):
            return super().assign_add(value)
        # As Keras's, which asks of the sum what is known of the addends.
        if modes.modes.settle is not None:
            modes.modes.settle()
        with torch.no_grad():
            value = stored + value
            stored.copy_(value)
        return value

    def _takes_part_of(self, value):
        """Whether a value is in a file, whose part is all that is needed."""
        return (
            hasattr(value, "read_part")
            and value.shape == self._shape
            and not in_stateless_scope()
            and not _code_sees_global_batch()
        )

    @modes.direct()
    def _assign_part_of(self, value):
        """Reads our shard of a value from a file, and nothing else of it."""
        self.written = agreement.sample_of_file(value)
        self._origin = None
        layout = laid_out.layout_of(self._value)
        part = value.read_part(laid_out.ranges(layout))
        local = sharded.local_of(self._value)
        if part.dtype.isbuiltin == 1 and part.dtype == streams.numpy_dtype(
            local.dtype
        ):
            part = torch.from_numpy(part)
        else:
            part = upstream.convert_to_tensor(part, dtype=self._dtype)
        with torch.no_grad():
            local.copy_(part)
        return self._value

    @modes.direct()
    def _direct_assign(self, value):
        if _code_sees_global_batch():
            state = metric_states.state_in_step(self)
            if state is not None:
                metric_states.assign(self, state, value)
                return
        value = carrier.whole(value)
        if isinstance(self._value, DTensor):
            self._origin = None
            storage.assign(self._value, value)
        else:
            super()._direct_assign(sharded.whole(value))

    @property
    def value(self):
        # As released Keras's, which makes a function at each read.
        if modes.modes.settle is not None:
            modes.modes.settle()
        value = self._value
        if (
            value is None
            or in_stateless_scope()
            or upstream.get_device() == "meta"
        ):
            return released_variable.value.fget(self)
        return self._maybe_autocast(value)

    def _maybe_autocast(self, value):
        value = super()._maybe_autocast(value)
        if _code_sees_global_batch():
            state = metric_states.state_in_step(self)
            if state is not None:
                return metric_states.as_addend(
                    value, state, modes.modes.step.shards
                )
        return reading.present(value, self)

    @property
    def trainable(self):
        return self._trainable

    @trainable.setter
    def trainable(self, value):
        released_variable.trainable.fset(self, value)
        if value and getattr(self, "_context", None) is not None:
            if not getattr(self, "_is_hooked", False):
                self._hook()

    def __repr__(self):
        # Printing must not communicate: often only one process prints.
        if not isinstance(self._value, DTensor):
            return super().__repr__()
        return (
            f"<Variable path={self.path}, shape={self.shape}, "
            f"dtype={self.dtype}, placements={self._value.placements}, "
            f"local shape={tuple(sharded.local_of(self._value).shape)}>"
        )


def _adds_in_kind(stored, value):
    """Whether a sum has the dtype, device and shape of its first addend."""
    if stored.requires_grad or torch.compiler.is_compiling():
        return False
    kind = type(value)
    if kind is torch.Tensor:
        return (
            value.dtype == stored.dtype
            and value.device == stored.device
            and (not value.ndim or value.shape == stored.shape)
        )
    if kind is float:
        return stored.is_floating_point()
    return kind is int and stored.dtype != torch.bool


def _code_sees_global_batch():
    return modes.modes.step is not None and not modes.modes.known


def convert_to_tensor(x, dtype=None, sparse=None, ragged=None):
    """As Keras's, which asks a tensor three times where it is, and moves it
    there. Each question passes the modes that torch's functions pass."""
    if isinstance(x, released_variable) and not (sparse or ragged):
        x = x.value
    if (
        type(x) in TENSORS
        and not (sparse or ragged)
        and not torch.compiler.is_compiling()
    ):
        with private.without_torch_functions():
            device, own = str(x.device), x.dtype
        if device == upstream.get_device() and (
            dtype is None or own == to_torch_dtype(dtype)
        ):
            return x
    return released_convert_to_tensor(x, dtype, sparse, ragged)


# By names and dtypes, as they have been asked for.
_dtypes = {}


def to_torch_dtype(dtype):
    """As Keras's, which takes a dtype's text apart each time."""
    if type(dtype) not in (str, torch.dtype):
        return released_to_torch_dtype(dtype)
    found = _dtypes.get(dtype)
    if found is None:
        found = _dtypes[dtype] = released_to_torch_dtype(dtype)
    return found


def convert_to_numpy(x):
    """As Keras's; a DTensor becomes the whole array, and what is going to be
    written in pieces stays as it is.

    Collective if `x` holds DTensors: every process of their mesh calls it.
    """
    if isinstance(x, streams.Absent):
        return x
    stored = [getattr(e, "_value", e) for e in (x if _is_list(x) else [x])]
    if any(isinstance(e, DTensor) for e in stored):
        # Others may be on the mesh of a data shard alone.
        is_weight = any(sharded.is_weight(each) for each in stored)
        together.go_on("weights that are read" if is_weight else None)
    if isinstance(x, DTensor):
        x = laid_out.gathered(x)
    elif _is_list(x):
        x = [laid_out.gathered(e) if isinstance(e, DTensor) else e for e in x]
    return released_convert_to_numpy(x)


def _is_list(x):
    return isinstance(x, (list, tuple))


def vectorized_map(function, elements):
    """As Keras's; `function` sees whole weights, and parts of whole elements.

    Collective along the axes that cut them.
    """
    elements = tree.map_structure(sharded.whole, elements)
    return released_vectorized_map(function, elements)


def remat(f):
    """As Keras's; in backward, `f` sees variables as it did in forward."""

    def wrapped(*args, **kwargs):
        again = modes.as_now()
        local_rows = rows.get_current_rows()
        context = current()

        @again
        def function(*args, **kwargs):
            if context is None:
                return f(*args, **kwargs)
            with (
                operators.on_shards(context),
                rows.current_rows(local_rows),
                unshard.reading_again(context),
            ):
                return f(*args, **kwargs)

        return released_remat(function)(*args, **kwargs)

    return wrapped
