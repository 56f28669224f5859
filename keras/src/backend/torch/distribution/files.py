"""Files that every process asks for, and process 0 writes.

Stands in for Keras's `file_utils` in the callbacks that write files; what is
not here is Keras's own.
"""

import os

from keras.src.backend.torch.distribution import logs
from keras.src.backend.torch.distribution import process_group
from keras.src.backend.torch.distribution.context import current
from keras.src.utils import file_utils


def File(path, mode="r"):
    """As Keras's; what other processes than the first write goes nowhere."""
    if set(mode) & set("wa+") and _is_other():
        path = os.devnull
    return file_utils.File(path, mode)


def exists(path):
    """As Keras's; what process 0 sees.

    Collective under a distribution: every process calls it.
    """
    if current() is None:
        return file_utils.exists(path)
    return logs.any_process(not _is_other() and file_utils.exists(path))


def makedirs(path):
    _on_first(file_utils.makedirs, path)


def copy(src, dst):
    _on_first(file_utils.copy, src, dst)


def remove(path):
    _on_first(file_utils.remove, path)


def rmtree(path):
    _on_first(file_utils.rmtree, path)


def on_all(function, path, *args, errors=OSError, **kwargs):
    """Calls a function; raises on all processes if one of them fails.

    Collective under a distribution: every process calls it.

    Args:
        path: what is written, for the error of the other processes.
        errors: the class of what may go wrong.
    """
    error = result = None
    try:
        result = function(*args, **kwargs)
    except errors as e:
        error = e
    if logs.any_process(error is not None):
        raise error or OSError(
            f"Another process could not write {path}; its own error says why."
        )
    return result


def _on_first(function, *paths):
    """Calls a function on process 0; all wait until it is done."""
    if current() is None:
        function(*paths)
    else:
        on_all(lambda: _is_other() or function(*paths), paths[-1])


def _is_other():
    return current() is not None and not process_group.is_first()


def __getattr__(name):
    return getattr(file_utils, name)
