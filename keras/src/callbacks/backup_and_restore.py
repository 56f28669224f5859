"""Overlay: a backup is complete or not there, and has the random states and
what other callbacks count too.

Process 0 alone makes and removes files; all wait for it.
"""

import json
import os

import numpy as np

from keras.src.api_export import keras_export
from keras.src.callbacks import backup_and_restore as upstream
from keras.src.distribution import callback_states
from keras.src.distribution import files as file_utils
from keras.src.distribution import processes
from keras.src.distribution import replacing

__all__ = ["BackupAndRestore", "file_utils"]

ARRAYS = "callbacks-"


@keras_export("keras.callbacks.BackupAndRestore")
class BackupAndRestore(upstream.BackupAndRestore):
    __doc__ = upstream.BackupAndRestore.__doc__

    # It follows the others: what it saves is what they have left.
    comes_last = True
    others = ()

    # Weights and what is said of them are two files. Both are written under
    # other names; from the moment when the second has its name, both are to
    # be moved, now or, where the program is killed, at the next start.

    @property
    def _new_paths(self):
        return (
            file_utils.join(self.backup_dir, "new.weights.h5"),
            file_utils.join(self.backup_dir, "new_training_metadata.json"),
        )

    def _load_model(self):
        if not self._is_remote():
            self._move()
        super()._load_model()
        if file_utils.exists(self._training_metadata_path):
            with file_utils.File(self._training_metadata_path, "r") as f:
                said = json.loads(f.read())
            if "random_states" in said:
                processes.set_random_states(self.model, said["random_states"])
            self._restore_others(said)

    def _save_model(self):
        if self._is_remote():
            super()._save_model()
            return
        if not file_utils.exists(self.backup_dir):
            file_utils.makedirs(self.backup_dir)
        if self.double_checkpoint:
            for path, previous in (
                (self._weights_path, self._prev_weights_path),
                (
                    self._training_metadata_path,
                    self._prev_training_metadata_path,
                ),
            ):
                if file_utils.exists(path):
                    file_utils.copy(path, previous)
        weights, metadata = self._new_paths
        self.model.save_weights(filepath=weights, overwrite=True)
        said = {"epoch": self._current_epoch, "batch": self._last_batch_seen}
        # From within an epoch, Keras begins the epoch again.
        if self.save_freq == "epoch":
            said["random_states"] = processes.random_states(self.model)
            if self.model.stop_training:
                said["stopped"] = True
        states, arrays = callback_states.get(self.others)
        if states:
            said["callbacks"] = states
        # Whether there are any all agree on.
        name = self._save_arrays(arrays)
        if name is not None:
            said["arrays"] = name
        with file_utils.File(f"{metadata}.tmp", "w") as f:
            f.write(json.dumps(said))
        self._replace(f"{metadata}.tmp", metadata)
        self._move()
        file_utils.on_all(
            lambda: file_utils.is_other() or self._remove_arrays(),
            self.backup_dir,
        )

    def _restore_others(self, said):
        arrays = {}
        if "arrays" in said:
            path = file_utils.join(self.backup_dir, said["arrays"])
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        callback_states.set(
            self.others, said.get("callbacks", {}), arrays.__getitem__
        )
        if said.get("stopped"):
            callback_states.end(self, self.backup_dir, said["epoch"])

    def _save_arrays(self, arrays):
        """Writes arrays into a file of their own; returns its name.

        Collective under a distribution: every process calls it.
        """
        if not processes.any_process(bool(arrays)):
            return None
        name = f"{ARRAYS}{self._current_epoch}-{self._last_batch_seen}.npz"
        path = file_utils.join(self.backup_dir, name)
        with file_utils.File(f"{path}.tmp", "wb") as file:
            np.savez(
                file,
                **{n: a.reshape(-1).view("uint8") for n, a in arrays.items()},
            )
        self._replace(f"{path}.tmp", path)
        return name

    def _remove_arrays(self):
        """Removes the files of arrays of backups that are gone."""
        used = {None}
        for path in (
            self._training_metadata_path,
            self._prev_training_metadata_path,
        ):
            if os.path.isfile(path):
                with open(path) as f:
                    used.add(json.loads(f.read()).get("arrays"))
        for name in os.listdir(self.backup_dir):
            if name.startswith(ARRAYS) and name not in used:
                os.remove(file_utils.join(self.backup_dir, name))

    def _move(self):
        """Moves a new backup to its place, if there is one.

        Collective under a distribution: every process calls it.
        """
        weights, metadata = self._new_paths
        if not file_utils.exists(metadata):
            return
        if file_utils.exists(weights):
            self._replace(weights, self._weights_path)
        self._replace(metadata, self._training_metadata_path)

    def _replace(self, source, destination):
        def replace():
            replacing.sync(source)
            os.replace(source, destination)
            replacing.sync_names(self.backup_dir)

        file_utils.on_all(
            lambda: file_utils.is_other() or replace(), destination
        )

    def _is_remote(self):
        return file_utils.is_remote_path(self.backup_dir)
