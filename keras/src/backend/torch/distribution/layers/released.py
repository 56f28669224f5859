"""A layer's own code, as released Keras runs it."""

import functools

from keras.src.ops.concrete import any_symbolic_tensors
from keras.src.ops.operation import Operation
from keras.src.utils import traceback_utils


def call(layer, args, kwargs):
    """The outputs of a layer's own code: `Operation.__call__`.

    That looks for symbolic tensors in all that is nested, and wraps `call` for
    the words of an error, each time. Here tensors are told at once, and an
    error is given its words where there is one.
    """
    if (
        layer._remat_mode
        or layer.quantization_mode is not None
        or any_symbolic_tensors(args, kwargs)
    ):
        return Operation.__call__(layer, *args, **kwargs)
    try:
        return layer.call(*args, **kwargs)
    except Exception as error:
        return _raise_with_arguments(layer, error, args, kwargs)


def _raise_with_arguments(layer, error, args, kwargs):
    """Raises an error of a layer's code as Keras does, with what the layer was
    called with."""

    # The signature of `call`, for the names of the arguments.
    @functools.wraps(layer.call)
    def fail(*args, **kwargs):
        raise error

    traceback_utils.inject_argument_info_in_traceback(
        fail, object_name=f"{type(layer).__name__}.call()"
    )(*args, **kwargs)
