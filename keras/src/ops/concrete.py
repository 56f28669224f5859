"""Whether arguments are symbolic, told without a look into all that is nested.

Each operation of Keras asks it, of a tensor and a shape most times, for which
`any_symbolic_tensors` flattens them as trees: up to two hundred calls of
Python's for a reshape.
"""

from keras.src import backend
from keras.src.backend.common.keras_tensor import (
    any_symbolic_tensors as released,
)

PLAIN = frozenset((bool, int, float, str, type(None)))


def any_symbolic_tensors(args=None, kwargs=None):
    """As Keras's."""
    if all(map(is_concrete, args or ())) and (
        not kwargs or all(map(is_concrete, kwargs.values()))
    ):
        return False
    return released(args, kwargs)


def is_concrete(x):
    """Whether `x` is a tensor, a number, a string, None, or a list or tuple of
    such. False where that takes a longer look."""
    kind = type(x)
    if kind is list or kind is tuple:
        return all(map(is_concrete, x))
    return kind in PLAIN or backend.is_tensor(x)
