"""A machine that is taken away says so by SIGTERM, some seconds before.

The signal comes to each process at another step. A step's reduction of logs
tells all of them whether any has had it, at the same step.
"""

import contextlib
import signal
import threading

from keras.src.backend.torch.distribution import marks


class Preemption:
    """Whether this program has been asked to end, while a model is trained.

    Attributes:
        asked: bool, whether this process has.
        agreed: bool, whether all know that one of them has.
    """

    def __init__(self):
        self.asked = self.agreed = False
        self._before = None
        self._is_set = False

    def listen(self):
        """Listens from now on, where Python lets it: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
            self._is_set = True

    def _hear(self, number, frame):
        self.asked = True

    def leave(self):
        """Puts back what was done at the signal before."""
        if self._is_set:
            self._is_set = False
            # None stands for a handler that is not Python's.
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


@contextlib.contextmanager
def of_fit(model):
    """Within it, a model is trained by `fit`, whose callbacks may `listen`."""
    before = of(model)
    try:
        yield
    finally:
        if before is None and of(model) is not None:
            model.__dict__.pop(marks.PREEMPTION).leave()


def listen(model):
    """Listens until the `fit` of a model ends. Returns the `Preemption`."""
    if of(model) is None:
        model.__dict__[marks.PREEMPTION] = Preemption()
        of(model).listen()
    return of(model)


def of(model):
    """The `Preemption` of a model, None where nobody listens."""
    return model.__dict__.get(marks.PREEMPTION)
