"""Overlay: process 0 alone writes the file, which goes on with a training that
goes on.

This callback communicates with nobody, so that one process alone may have it.
"""

import os
import types
import warnings

from keras.src.api_export import keras_export
from keras.src.callbacks import csv_logger as upstream
from keras.src.distribution import files
from keras.src.utils import file_utils as released

__all__ = ["CSVLogger", "file_utils"]

file_utils = types.SimpleNamespace(**{**vars(released), "File": files.File})


@keras_export("keras.callbacks.CSVLogger")
class CSVLogger(upstream.CSVLogger):
    __doc__ = upstream.CSVLogger.__doc__

    # Whether a callback follows that may restore what this one has written.
    is_followed = False
    # Whether what is in the file is of another training, and to be removed.
    _begins_anew = False

    def on_train_begin(self, logs=None):
        self._begins_anew = False
        if (
            self.append
            or not self.is_followed
            or file_utils.is_remote_path(self.filename)
        ):
            super().on_train_begin(logs)
            return
        # Only when it is known that no training goes on, the file is emptied:
        # with the first row.
        self.append = True
        try:
            super().on_train_begin(logs)
        finally:
            self.append = False
        self._begins_anew = self.append_header = True

    def on_epoch_end(self, epoch, logs=None):
        self._begin_anew()
        super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs=None):
        self._begin_anew()
        super().on_train_end(logs)

    def _begin_anew(self):
        if self._begins_anew:
            self._begins_anew = False
            self._cut(0)

    def _cut(self, size):
        # The others write nowhere.
        if not files.is_other():
            self.csv_file.truncate(size)
            self.csv_file.seek(0, os.SEEK_END)

    def state_dict(self):
        """What rows the file has, for a training that goes on."""
        is_open = self.csv_file is not None and not self.csv_file.closed
        if not is_open or file_utils.is_remote_path(self.filename):
            return {"keys": self.keys, "size": None}
        size = 0 if self._begins_anew else self._size()
        return {"keys": self.keys, "size": size}

    def load_state_dict(self, state):
        """Removes the rows of epochs that are trained again."""
        size = state["size"]
        if size is None or file_utils.is_remote_path(self.filename):
            return
        found = 0 if files.is_other() else self._size()
        if not files.is_other() and found < size:
            warnings.warn(
                f"The file of a CSVLogger has {found} bytes and had {size} "
                "when the training was saved that goes on: rows are missing. "
                f"Received: filename={self.filename}",
                stacklevel=2,
            )
            size = found
        self._begins_anew = False
        self._cut(size)
        self.keys = state["keys"]
        self.append_header = not size

    def _size(self):
        self.csv_file.flush()
        return os.fstat(self.csv_file.fileno()).st_size
