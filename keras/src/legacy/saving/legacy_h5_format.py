"""Overlay: process 0 alone writes a file, after all have gathered it."""

import os

from keras.src.distribution import hdf5
from keras.src.distribution import processes
from keras.src.distribution import saving
from keras.src.legacy.saving import legacy_h5_format as upstream

__all__ = ["save_model_to_hdf5"]

released_save = upstream.save_model_to_hdf5


def save_model_to_hdf5(model, filepath, overwrite=True, include_optimizer=True):
    """As Keras's.

    Collective under a distribution: every process calls it.
    """
    _save_once(model, filepath, overwrite, include_optimizer)


def _save(model, file, overwrite, include_optimizer):
    # The caller may have opened it.
    is_open = not isinstance(file, (str, os.PathLike))
    if is_open or not processes.is_distributed():
        released_save(model, file, overwrite, include_optimizer)
        return
    with hdf5.written(file) as opened:
        released_save(model, opened, overwrite, include_optimizer)


_save_once = saving.written_once(_save, makes_folders=True)
