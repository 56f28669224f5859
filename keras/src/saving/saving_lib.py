"""Overlay: process 0 alone writes a file, after all have gathered it."""

import functools
import os
import pathlib
import shutil
import tempfile

from keras.src.backend.torch.distribution import files
from keras.src.backend.torch.distribution import process_group
from keras.src.backend.torch.distribution.context import current
from keras.src.saving import saving_lib as upstream
from keras.src.utils import file_utils

__all__ = ["save_model", "save_weights_only"]


def _written_once(save):
    """Wraps a function that saves a model to a path.

    All processes gather the weights and write them into a folder of their own;
    process 0 then puts its files where they belong. Where it cannot, all
    raise; when it returns, the files are there.

    Collective under a distribution: every process calls it.
    """

    @functools.wraps(save)
    def save_once(model, filepath, *args, **kwargs):
        if current() is None or file_utils.is_remote_path(filepath):
            return save(model, filepath, *args, **kwargs)
        path = pathlib.Path(os.fspath(filepath))
        is_first = not process_group.process_id()
        # Next to the file, so that moving it there is one rename.
        folder = files.on_all(
            tempfile.mkdtemp, path, dir=path.parent if is_first else None
        )
        try:
            save(model, pathlib.Path(folder) / path.name, *args, **kwargs)
            files.on_all(_move_files, path, folder, path.parent, is_first)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return save_once


def _move_files(folder, destination, is_first):
    if not is_first:
        return
    for name in os.listdir(folder):
        target = destination / name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(os.path.join(folder, name), target)


save_model = _written_once(upstream.save_model)
save_weights_only = _written_once(upstream.save_weights_only)
