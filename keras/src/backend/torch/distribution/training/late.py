"""Logs of a step that are reduced while the next one runs.

A step of Keras's own, in Keras's own loop, has nobody who reads its logs but
callbacks, and on most processes there are none that do. To wait for them is to
wait for the slowest process once more a step. So the reduction stays under way,
and

- its numbers are waited for by who reads them: a callback's logs, or a variable
  that a program reads between two steps, as a metric's may be (`settle`);
- what processes have said (who wants to stop, whether they differ) all act on
  at one place: as the next step ends, or the epoch (`Step.conclude`).
"""

import contextlib
import dataclasses

from keras.src import callbacks
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.training import metric_states


@dataclasses.dataclass(eq=False)
class Pending:
    """A step whose logs are being reduced.

    Attributes:
        reduction: `logs.Reduction`.
        ballot: `agreement.Ballot`.
        context: the `Context`.
        is_settled: bool, whether metrics hold the states after it.
    """

    reduction: object
    ballot: object
    context: object
    is_settled: bool = False

    def settle(self):
        """The logs; metrics hold their whole states. Waits for all processes,
        the first time."""
        modes.settle_before_reads(None)
        self.is_settled = True
        return self.reduction.logs()


class Logs(dict):
    """Logs of a step, which whoever reads them waits for.

    Args:
        pending: `Pending`.
    """

    def __init__(self, pending):
        super().__init__()
        self._pending = pending

    def settled(self):
        """A dict of them. Waits for all processes, the first time.

        Raises:
            RuntimeError: if the next step is over.
        """
        if self._pending is not None:
            logs, self._pending = self._pending.settle(), None
            if logs is None:
                raise RuntimeError(
                    "The logs of a step were kept, and are read when the next "
                    "step is over. Copy them as they come: `dict(logs)`."
                )
            super().update(logs)
        return dict(super().items())


def _settling(name):
    released = getattr(dict, name)

    def method(self, *args, **kwargs):
        if self._pending is not None:
            self.settled()
        return released(self, *args, **kwargs)

    return method


for _name in (
    *("__contains__", "__eq__", "__getitem__", "__iter__", "__len__", "__ne__"),
    *("__or__", "__repr__", "__reversed__", "__ror__", "__setitem__"),
    *("copy", "get", "items", "keys", "pop", "setdefault", "update", "values"),
):
    setattr(Logs, _name, _settling(_name))


@contextlib.contextmanager
def in_loop(model, arguments):
    """Within it, logs of steps are handed to a list of callbacks of Keras's.

    Args:
        model: that is trained or evaluated.
        arguments: dict, of `fit` or `evaluate`.
    """
    process_group.before_leaving(_leave)
    before = vars(model).get(marks.LOOP)
    # A list of the program's own may keep them. That of `fit` comes with its
    # evaluations.
    is_own = isinstance(arguments.get("callbacks"), callbacks.CallbackList)
    is_own &= not arguments.get("_use_cached_eval_dataset")
    model.__dict__[marks.LOOP] = False if is_own else before is not False
    try:
        yield
    finally:
        model.__dict__[marks.LOOP] = before


def _leave():
    """Lets go of what a step has left under way where an exception ends the
    program: nobody waits for it, and it keeps the process group."""
    settle = modes.modes.settle
    if settle is not None:
        modes.settle_before_reads(None)
        settle.__self__.reduction.abandon()


def may_wait(model, states):
    """Whether the logs of a step of Keras's own may be reduced later.

    Args:
        model: whose step it is.
        states: list of the states of its metrics.
    """
    return vars(model).get(marks.LOOP) and metric_states.may_wait(states)


def begin(pending):
    """To be called as a step begins, with what the last one has left."""
    settle = modes.modes.settle
    if settle is None:
        return
    if pending is None or settle != pending.settle:
        settle()  # Of another function, that may count the same metrics.
    modes.settle_before_reads(None)


def end(pending):
    """To be called as a step ends, with what it has left."""
    if pending is not None and not pending.is_settled:
        modes.settle_before_reads(pending.settle)
