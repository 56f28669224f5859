"""Overlay: what one process's callbacks raise or stop, they do on all.

What nobody does for a batch costs nothing, and waits for no logs. Those that
save a training come last. Both under a distribution or not.
"""

import functools

from keras.src import utils
from keras.src.api_export import keras_export
from keras.src.callbacks import callback_list as upstream
from keras.src.callbacks.csv_logger import CSVLogger
from keras.src.callbacks.history import History
from keras.src.callbacks.progbar_logger import ProgbarLogger
from keras.src.distribution import processes

__all__ = ["CallbackList"]

BEGINS = ("on_train_begin", "on_test_begin", "on_predict_begin")
SELDOM = (
    "on_epoch_begin",
    "on_epoch_end",
    "on_train_end",
    "on_test_end",
    "on_predict_end",
)
# What is called for each batch, and what it calls unless it is overridden.
OFTEN = {
    "on_train_batch_begin": "on_batch_begin",
    "on_train_batch_end": "on_batch_end",
    "on_test_batch_begin": None,
    "on_test_batch_end": None,
    "on_predict_batch_begin": None,
    "on_predict_batch_end": None,
}
ENDS = ("on_train_batch_end", "on_test_batch_end", "on_predict_batch_end")


@keras_export("keras.callbacks.CallbackList")
class CallbackList(upstream.CallbackList):
    __doc__ = upstream.CallbackList.__doc__

    # In which methods all processes learn of what one of them wants.
    _agreed = frozenset()

    def __init__(self, callbacks=None, *args, **kwargs):
        super().__init__(callbacks, *args, **kwargs)
        self._put_last()

    def append(self, callback):
        super().append(callback)
        self._put_last()

    def _put_last(self):
        """Lets those that save a training see what all others have done, and
        restore what these have counted."""
        last = [c for c in self.callbacks if getattr(c, "comes_last", False)]
        if last:
            others = [c for c in self.callbacks if c not in last]
            self.callbacks = others + last
            for callback in last:
                callback.others = others
        for callback in self.callbacks:
            if isinstance(callback, CSVLogger):
                callback.is_followed = bool(last)

    def _is_taken(self, name):
        """Whether a callback has something to do in a method for batches, but
        for a progress bar that is not due."""
        for callback in self.callbacks:
            kind = type(callback)
            if kind is ProgbarLogger:
                if name in ENDS and callback.is_due(name):
                    return True
            elif kind is not History and _overrides(
                callback, name, OFTEN[name]
            ):
                return True
        return False

    def _leave_out(self, name, batch):
        """In place of a method in which nobody has anything to do."""
        if name in ENDS:
            for callback in self.callbacks:
                if type(callback) is ProgbarLogger:
                    callback.count(name, batch)

    # Under a distribution collective if any process has a callback: every
    # process calls its list's methods, though callbacks may differ.

    def _agree_on_methods(self):
        """Finds out in which methods any process has something to do.

        Collective: every process calls it.
        """
        own = [
            callback
            for callback in self.callbacks
            if type(callback) not in (History, ProgbarLogger)
        ]
        used = [
            any(_overrides(c, name, inner) for c in own)
            for name, inner in OFTEN.items()
        ]
        has_any, *used = processes.any_of_each([bool(own), *used])
        self._agreed = frozenset()
        if has_any:
            # What another thread asks for, the next step tells all.
            self._agreed = {*BEGINS, *SELDOM}
            self._agreed.update(n for n, is_used in zip(OFTEN, used) if is_used)
            # What communicates must not run in a thread of the list.
            self._async_train = self._async_test = self._async_predict = False


def _overrides(callback, name, inner):
    return any(
        not utils.is_default(getattr(callback, each))
        for each in (name, inner)
        if each is not None
    )


def _of_batches(name):
    """A method of the list that is called for each batch.

    Released Keras hands each of them to a thread, which reads all logs, also
    where no callback asks for any.
    """
    released = getattr(upstream.CallbackList, name)

    @functools.wraps(released)
    def method(self, batch, logs=None):
        if not self._is_taken(name):
            self._leave_out(name, batch)
            return
        if hasattr(logs, "settled"):
            # They are being reduced: the thread that trains waits for them.
            logs = logs.settled()
        released(self, batch, logs)

    return method


def _agreeing(name):
    """A method of the list in which all processes fail and stop together."""
    released = (
        _of_batches(name)
        if name in OFTEN
        else getattr(upstream.CallbackList, name)
    )

    @functools.wraps(released)
    def method(self, *args, **kwargs):
        if not processes.is_distributed():
            return released(self, *args, **kwargs)
        if name in BEGINS and not self._in_begin_end_block_count:
            self._agree_on_methods()
        if name not in self._agreed:
            return released(self, *args, **kwargs)
        with processes.work(f"`{name}` of the callbacks") as work:
            released(self, *args, **kwargs)
            work.flag = bool(getattr(self.model, "stop_training", False))
        if work.flag:
            self.model.stop_training = True

    return method


for _name in (*BEGINS, *SELDOM, *OFTEN):
    setattr(CallbackList, _name, _agreeing(_name))
