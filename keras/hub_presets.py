"""Overlay: what KerasHub writes beside a model's weights, process 0 writes."""

import functools

from keras_hub.src.utils import preset_utils as upstream

from keras.src.distribution import files
from keras.src.distribution import processes

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
    """Wraps a method that saves a model, with its weights."""

    @functools.wraps(save)
    def save_together(self, model, *args, **kwargs):
        with processes.distribution_of(model):
            save(self, model, *args, **kwargs)

    return save_together


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
