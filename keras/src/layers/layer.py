"""Overlay: a built layer that is handed one tensor is called at once.

What `Layer.__call__` finds out before it runs a layer (how the arguments bind
to the signature, which of them are tensors, what is nested, masked, symbolic,
to be built or cast) takes some five hundred calls of Python's. Of a layer that
is built, with one tensor of its own dtype and no mask (or a list of such, as
layers that merge have), the answers are known.
Then what is left is done here, in the same order; all else, and what fails a
check, goes Keras's way.
"""

import functools

from keras.src import backend
from keras.src.api_export import keras_export
from keras.src.backend.common.name_scope import current_path
from keras.src.distribution import distribution_lib
from keras.src.dtype_policies import DTypePolicy
from keras.src.layers import layer as upstream
from keras.src.layers.input_spec import InputSpec
from keras.src.utils import python_utils
from keras.src.utils import traceback_utils

__all__ = ["Layer"]

ReleasedLayer = upstream.Layer

# A class with other ways in one of these is called Keras's way.
STEPS_OF_A_CALL = (
    "_assert_input_compatibility",
    "_check_super_called",
    "_get_call_context",
    "_maybe_build",
    "_maybe_reset_call_context",
    "_open_name_scope",
    "_resolve_and_populate_arg",
    "_set_mask_metadata",
    "compute_dtype",
    "input_dtype",
    "input_spec",
    "variable_dtype",
)


@keras_export(["keras.Layer", "keras.layers.Layer"])
class Layer(upstream.Layer):
    __doc__ = upstream.Layer.__doc__

    # Whether its class and the signature of `call` allow for `_call_at_once`.
    _takes_one_tensor = False

    @functools.wraps(ReleasedLayer.__init__)
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._takes_one_tensor = _has_no_other_way(type(self)) and (
            _binds_one_tensor(self._call_signature)
        )

    @traceback_utils.filter_traceback
    def __call__(self, *args, **kwargs):
        if len(args) == 1 and self._is_called_at_once(args[0], kwargs):
            return self._call_at_once(args[0], kwargs)
        return super().__call__(*args, **kwargs)

    def _is_called_at_once(self, x, kwargs):
        return (
            self._takes_one_tensor
            and self.built
            and self._called
            and not self._lock
            and self._parent_path is not None
            and (not kwargs or (len(kwargs) == 1 and "training" in kwargs))
            and len(self._call_context_args) == 1
            and self.activity_regularizer is None
            and type(self._dtype_policy) is DTypePolicy
            and self._needs_no_scope()
            and self._takes_as_it_is(x)
        )

    def _needs_no_scope(self):
        """Whether the layer's weights are cast as the scope that holds says."""
        policy = self._dtype_policy
        scope = backend.get_autocast_scope()
        if scope is None:
            return policy.compute_dtype == policy.variable_dtype
        return self.autocast and scope.dtype == policy.compute_dtype

    def _takes_as_it_is(self, x):
        """Whether `x` is a tensor, or a list or tuple of some, without a mask,
        that need not be cast and is what the layer expects."""
        if type(x) in (list, tuple):
            return (
                not self._call_has_mask_arg
                and self._input_spec is None
                and all(map(self._takes_tensor, x))
            )
        return self._takes_tensor(x) and (
            self._input_spec is None or _is_met(self._input_spec, x.shape)
        )

    def _takes_tensor(self, x):
        if not backend.is_tensor(x) or backend.get_keras_mask(x) is not None:
            return False
        if not (self._convert_input_args and self.autocast):
            return True
        dtype = backend.standardize_dtype(x.dtype)
        return dtype == self._dtype_policy.compute_dtype or (
            # What is no float is not cast.
            not dtype.startswith(("float", "bfloat"))
        )

    def _call_at_once(self, x, kwargs):
        mask = None
        if type(x) in (list, tuple):
            mask = [None] * len(x)
            if self._convert_input_args:
                # What `call` does with the list, it does with its own.
                x = type(x)(x)
        call_context = self._get_call_context()
        takes_training = self._call_has_context_arg["training"]
        if "training" in kwargs:
            training = kwargs["training"]
            if not takes_training:
                kwargs = {}
        else:
            training = call_context.get_value("training")
            if training is None:
                training = _default_of(self._call_signature, "training")
        call_context.set_value("training", training)
        if takes_training and training is not None:
            kwargs["training"] = training
        try:
            with backend.name_scope(self.name, caller=self):
                # The backend's own, that Keras's comes to.
                outputs = super(ReleasedLayer, self).__call__(x, **kwargs)
                distribution = distribution_lib.distribution()
                if distribution is not None:
                    path = f"{current_path()}/output"
                    layout = distribution.get_tensor_layout(path)
                    if layout:
                        outputs = distribution_lib.distribute_tensor(
                            outputs, layout
                        )
            if self.supports_masking and not python_utils.is_default(
                self.compute_mask
            ):
                self._set_mask_metadata(x, outputs, mask)
        finally:
            self._maybe_reset_call_context()
        return outputs


def _has_no_other_way(cls):
    """Whether a class takes the steps of a call as Keras's own does."""
    return all(
        getattr(cls, name) is getattr(ReleasedLayer, name)
        for name in STEPS_OF_A_CALL
    )


def _binds_one_tensor(signature):
    """Whether `call` can do with one tensor, and has no other by default."""
    first, *others = signature.parameters.values() or [None]
    if first is None or first.name in ("training", "mask"):
        return False
    if first.kind not in (
        first.POSITIONAL_ONLY,
        first.POSITIONAL_OR_KEYWORD,
    ):
        return False
    return all(
        each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        or each.default is None
        or (
            each.name != "mask"
            and isinstance(each.default, (bool, int, float, str))
        )
        for each in others
    )


def _default_of(signature, name):
    parameter = signature.parameters.get(name)
    return None if parameter is None else parameter.default


def _is_met(spec, shape):
    """Whether a shape is what an `InputSpec` asks for, as far as that can be
    told at once."""
    if type(spec) is not InputSpec or spec.shape or spec.dtype:
        return False
    ndim = len(shape)
    if (
        (spec.ndim is not None and ndim != spec.ndim)
        or (spec.max_ndim is not None and ndim > spec.max_ndim)
        or (spec.min_ndim is not None and ndim < spec.min_ndim)
    ):
        return False
    if spec.axes:
        for axis, value in spec.axes.items():
            if value is not None and shape[axis] != value:
                return False
    return True
