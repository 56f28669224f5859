"""Who asks a `fit` to stop, and when all of its processes do.

A flag that a thread sets on one process, at any moment, would stop that process
alone. So while a model is trained under a distribution, what another thread
writes into `stop_training` is a question, that the reduction of a step's logs
puts to all; the training thread alone sees to it that the flag is set.
"""

import contextlib
import threading

from keras.src.backend.torch.distribution import marks


class _Stop:
    """Attributes:
    flag: bool, `stop_training`.
    is_asked: bool, whether another thread wants it to be set.
    thread: the identity of the thread that trains, None outside of `fit`.
    """

    def __init__(self):
        self.flag = self.is_asked = False
        self.thread = None


class StopTraining:
    """The attribute `stop_training` of a model."""

    def __get__(self, model, owner=None):
        return self if model is None else _of(model).flag

    def __set__(self, model, value):
        stop = _of(model)
        if stop.thread in (None, threading.get_ident()):
            stop.flag = value
        else:
            stop.is_asked = bool(value)


def _of(model):
    if marks.STOP not in model.__dict__:
        model.__dict__[marks.STOP] = _Stop()
    return model.__dict__[marks.STOP]


@contextlib.contextmanager
def of_fit(model):
    """Within it, this thread trains a model under a distribution."""
    stop = _of(model)
    before = stop.thread
    stop.thread = threading.get_ident()
    try:
        yield
    finally:
        stop.thread = before
        if before is None:
            stop.is_asked = False


def is_wanted(model):
    """Whether this process wants `fit` to stop."""
    stop = _of(model)
    return bool(stop.flag or stop.is_asked)


def agree(model, value):
    """To be called by the thread that trains with what all have agreed on."""
    stop = _of(model)
    stop.flag = value
    if value:
        stop.is_asked = False
