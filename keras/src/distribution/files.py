"""Files that every process asks for, and process 0 writes.

Stands in for Keras's `file_utils` in the callbacks that write files; what is
not here is Keras's own.
"""

import contextlib
import os
import threading

from keras.src.distribution import processes
from keras.src.utils import file_utils


class _State(threading.local):
    is_saving = False


_state = _State()


@contextlib.contextmanager
def save(path):
    """Within it a whole model is saved: as one piece of work.

    Collective under a distribution: every process enters it.

    Args:
        path: what is written, for errors.
    """
    before = _state.is_saving
    _state.is_saving = True
    try:
        with processes.work(f"saving to {path}", by_writer=True):
            yield
    finally:
        _state.is_saving = before


def is_saving():
    """Whether a whole model is being saved."""
    return _state.is_saving


def File(path, mode="r"):
    """As Keras's; what other processes than the first write goes nowhere."""
    if set(mode) & set("wa+") and is_other():
        path = os.devnull
    return file_utils.File(path, mode)


def exists(path):
    """As Keras's; what process 0 sees.

    Collective under a distribution: every process calls it.
    """
    return processes.any_process(
        not is_other() and file_utils.exists(path), by_writer=True
    )


def makedirs(path):
    """As Keras's, by process 0.

    Collective under a distribution: every process calls it.
    """
    _on_first(file_utils.makedirs, path)


def copy(src, dst):
    """As Keras's, by process 0.

    Collective under a distribution: every process calls it.
    """
    _on_first(file_utils.copy, src, dst)


def remove(path):
    """As Keras's, by process 0.

    Collective under a distribution: every process calls it.
    """
    _on_first(file_utils.remove, path)


def rmtree(path):
    """As Keras's, by process 0.

    Collective under a distribution: every process calls it.
    """
    _on_first(file_utils.rmtree, path)


def on_all(function, path, *args, **kwargs):
    """Calls a function; raises on all processes if one of them fails.

    Collective under a distribution: every process calls it.

    Args:
        path: what is written, for errors.
    """
    with processes.work(f"writing {path}", by_writer=True):
        return function(*args, **kwargs)


def is_other():
    """Whether another process is the one that writes."""
    return processes.is_distributed() and not processes.is_writer()


def _on_first(function, *paths):
    """Calls a function on process 0; all wait until it is done."""
    on_all(lambda: is_other() or function(*paths), paths[-1])


def __getattr__(name):
    return getattr(file_utils, name)
