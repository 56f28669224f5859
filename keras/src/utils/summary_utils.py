"""Overlay: a summary says what a process stores."""

import functools
import math

from keras.src import backend
from keras.src.distribution import processes
from keras.src.utils import dtype_utils
from keras.src.utils import io_utils
from keras.src.utils import summary_utils as upstream

__all__ = ["print_summary"]

released_print_summary = upstream.print_summary


@functools.wraps(released_print_summary)
def print_summary(
    model, line_length=None, positions=None, print_fn=None, *args, **kwargs
):
    released_print_summary(
        model, line_length, positions, print_fn, *args, **kwargs
    )
    if not processes.is_distributed():
        return
    variables = {id(v): v for v in model.variables}
    if model.compiled and model.optimizer and model.optimizer.built:
        variables.update((id(v), v) for v in model.optimizer.variables)
    count = size = 0
    for v in variables.values():
        numbers = math.prod(processes.stored_shape(v))
        bits = dtype_utils.dtype_size(backend.standardize_dtype(v.dtype))
        count += numbers
        size += numbers * bits / 8
    line = (
        f" Stored by a process: {count:,} "
        f"({upstream.readable_memory_size(size)})"
    )
    (print_fn or io_utils.print_msg)(line)
