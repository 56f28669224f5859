"""Overlay: what KerasHub writes beside a model's weights, process 0 writes.

All files of a preset take the place of the old ones together.
"""

import contextlib
import functools
import pathlib
import threading

from keras_hub.src.utils import preset_utils as upstream

from keras.src.distribution import files
from keras.src.distribution import processes
from keras.src.distribution import replacing
from keras.src.distribution import saving

__all__ = ["KerasPresetSaver"]


def _by_one(save):
    """Wraps a method that communicates with nobody and writes files.

    Collective under a distribution: every process calls it.
    """

    @functools.wraps(save)
    def save_once(self, *args, **kwargs):
        files.on_all(
            lambda: files.is_other() or save(self, *args, **kwargs),
            self.preset_dir,
        )

    return save_once


def _of_a_model(save):
    """Wraps a method that saves a model, with its weights.

    Collective under a distribution: every process calls it.
    """

    @functools.wraps(save)
    def save_together(self, model, *args, **kwargs):
        with processes.distribution_of(model), _at_once(self):
            save(self, model, *args, **kwargs)

    return save_together


# A task saves its backbone, to the same folder.
_state = threading.local()


@contextlib.contextmanager
def _at_once(saver):
    """Within it a saver writes into a folder beside its own, whose files go
    there at the end.

    Collective under a distribution: every process enters it.
    """
    if not processes.is_distributed() or getattr(_state, "is_saving", False):
        yield
        return
    preset_dir, path = saver.preset_dir, pathlib.Path(saver.preset_dir)
    with contextlib.ExitStack() as stack:

        def begin():
            folder = stack.enter_context(saving.folder_beside(path))
            (folder / path.name).mkdir()
            return folder

        folder = files.on_all(
            lambda: None if files.is_other() else begin(), path
        )
        _state.is_saving = True
        try:
            if folder is not None:
                saver.preset_dir = str(folder / path.name)
            yield
        finally:
            _state.is_saving, saver.preset_dir = False, preset_dir

        def end():
            replacing.move(folder, path.absolute().parent)
            # When all go on, it is gone.
            stack.close()

        files.on_all(lambda: files.is_other() or end(), path)


class KerasPresetSaver(upstream.KerasPresetSaver):
    def __init__(self, preset_dir):
        self.preset_dir = preset_dir
        files.on_all(
            lambda: files.is_other() or self._make_folder(), preset_dir
        )

    def _make_folder(self):
        super().__init__(self.preset_dir)

    save_backbone = _of_a_model(upstream.KerasPresetSaver.save_backbone)
    save_task = _of_a_model(upstream.KerasPresetSaver.save_task)
    save_tokenizer = _by_one(upstream.KerasPresetSaver.save_tokenizer)
    _save_metadata = _by_one(upstream.KerasPresetSaver._save_metadata)
    _save_serialized_object = _by_one(
        upstream.KerasPresetSaver._save_serialized_object
    )
