"""Overlay: logs that are not shown are not waited for.

A progress bar is drawn every 0.05 s at most, and shows the last logs alone.
"""

import time

from keras.src.api_export import keras_export
from keras.src.callbacks import progbar_logger as upstream

__all__ = ["ProgbarLogger"]


@keras_export("keras.callbacks.ProgbarLogger")
class ProgbarLogger(upstream.ProgbarLogger):
    __doc__ = upstream.ProgbarLogger.__doc__

    _counted = 0

    def is_due(self, method):
        """Whether a method for a batch may draw its logs, if called now."""
        if self.verbose != 1 or self._is_silent_in(method):
            return False
        bar = self.progbar
        # Private: Keras has no public name for when it has drawn last (3.15).
        return bar is None or time.time() - bar._last_update >= bar.interval

    def _is_silent_in(self, method):
        return method == "on_test_batch_end" and self._called_in_fit

    def count(self, method, batch):
        """Takes note of a batch whose logs are not drawn."""
        if not self._is_silent_in(method):
            self._counted = batch + 1

    def _reset_progbar(self):
        super()._reset_progbar()
        self._counted = 0

    def _finalize_progbar(self, logs):
        # A thread of Keras's may have drawn an earlier one since.
        self.seen = max(self.seen, self._counted)
        super()._finalize_progbar(logs)
