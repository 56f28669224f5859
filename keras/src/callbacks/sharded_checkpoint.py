"""Checkpoints of a training, in shards, from which `fit` goes on."""

import warnings

from keras.src.api_export import keras_export
from keras.src.callbacks.monitor_callback import MonitorCallback
from keras.src.distribution import callback_states
from keras.src.distribution import processes
from keras.src.utils import io_utils

# What a program ends with that has been asked to by SIGTERM.
EXIT_CODE = 128 + 15


@keras_export("keras.callbacks.ShardedCheckpoint")
class ShardedCheckpoint(MonitorCallback):
    """Callback to save all that training goes on from, and to go on from it.

    Each process writes what it stores, while training goes on: it waits for
    the copy only. A checkpoint has the weights, the optimizer's variables,
    metrics, seeds and random states, the epoch, the step, and the place in the
    data. `fit` restores the latest one of its directory, on whatever mesh, with
    whatever number of processes, and goes on as an undisturbed run does.

    It has what other callbacks count too: `EarlyStopping` with its best
    weights, `ReduceLROnPlateau`, `ModelCheckpoint`, `History`, how far the
    file of a `CSVLogger` was, and those that have `state_dict()`, of which JSON
    is made, and `load_state_dict(state)`. It runs after all of them.

    A program that is killed at any moment leaves the checkpoints before whole.
    At SIGTERM (a machine that is taken away) a last one is written, at the end
    of the batch, and the program ends.

    Example:

    ```python
    model.compile(loss=..., optimizer=...)
    checkpoint = keras.callbacks.ShardedCheckpoint(
        "/shared/checkpoints", save_freq=1000, max_to_keep=3
    )
    # The same line starts training and goes on with it.
    model.fit(dataset, epochs=EPOCHS, callbacks=[checkpoint])
    ```

    Collective: every process has the callback. All of them see the directory,
    which belongs to one `fit` of a program.

    Args:
        directory: path to the directory where to save the checkpoints.
        monitor: The metric name to monitor (e.g., 'val_loss').
        verbose: Verbosity mode, 0 or 1. Where `fit` shows its progress, it is
            said as well from which checkpoint training goes on.
        save_best_only: if `save_best_only=True`, it only saves when the model
            is considered the "best" based on the monitored quantity.
        mode: one of {'auto', 'min', 'max'}. Used with `save_best_only`.
        save_freq: `'epoch'` or integer. After how many batches to save.
        initial_value_threshold: Floating point initial "best" value for the
            monitor, used with `save_best_only`.
        max_to_keep: Integer, maximum number of recent checkpoints to keep.
            If None, keeps all. Defaults to 1.
        save_on_background: Boolean, whether training goes on while a
            checkpoint is written. Defaults to True.
        save_weights_only: Boolean, whether to save the model's weights alone:
            for use, not to go on from.
        restore: Boolean, whether `fit` goes on from the latest checkpoint of
            the directory, if there is one. Defaults to True.
        save_before_preemption: Boolean, whether to save at SIGTERM, and end
            the program with the exit code 143. Defaults to True.
    """

    # Those of the `fit`, which it follows.
    others = ()

    def __init__(
        self,
        directory,
        monitor="val_loss",
        verbose=0,
        save_best_only=False,
        mode="auto",
        save_freq="epoch",
        initial_value_threshold=None,
        max_to_keep=1,
        save_on_background=True,
        save_weights_only=False,
        restore=True,
        save_before_preemption=True,
    ):
        super().__init__(monitor, mode, initial_value_threshold)
        if save_freq != "epoch" and not (
            isinstance(save_freq, int) and save_freq > 0
        ):
            raise ValueError(
                f"Unrecognized save_freq: {save_freq}. "
                "Expected save_freq are 'epoch' or integer values"
            )
        self.directory = directory
        self.verbose = verbose
        self.save_best_only = save_best_only
        self.save_freq = save_freq
        self.max_to_keep = max_to_keep
        self.save_on_background = save_on_background
        self.save_weights_only = save_weights_only
        self.restore = restore
        self.save_before_preemption = save_before_preemption
        self._checkpoints = processes.sharded_checkpoints()
        self._saver = self._checkpoints.Saver(directory, max_to_keep)
        self._restored = self._preemption = None
        # Since the start of the training, of which this may be a part; since
        # the start of the epoch; and since the last checkpoint.
        self._steps = self._batch = self._unsaved = 0
        self._epoch = 0

    @property
    def comes_last(self):
        return not self.save_weights_only

    def on_train_begin(self, logs=None):
        self._restored, self._batch, self._unsaved = None, 0, 0
        if self.restore:
            self._restore()
        if self.save_before_preemption:
            self._preemption = self._checkpoints.listen_for_preemption(
                self.model
            )

    def _restore(self):
        with processes.work(f"looking for a checkpoint in {self.directory}"):
            path = self._checkpoints.latest(self.directory)
        # Of one process that sees none all would wait for the others.
        if not processes.any_process(path is not None):
            return
        restored = self._checkpoints.restore(self.model, self.directory)
        if not restored.is_training or restored.epoch is None:
            warnings.warn(
                f"The checkpoint {restored.path} was not made in `fit`, or of "
                "weights alone: `fit` begins with it at its first epoch.",
                stacklevel=2,
            )
            return
        self._restored, self._steps = restored, restored.step
        if restored.user is not None:
            self.best = restored.user["best"]
            self._unsaved = restored.user["unsaved"]
            callback_states.set(
                self.others,
                restored.user.get("callbacks", {}),
                restored.read_array,
            )
        self.model._initial_epoch = restored.epoch
        if (restored.user or {}).get("stopped"):
            callback_states.end(self, restored.path, restored.epoch)
        self._checkpoints.position_of(self.model).resume = restored.position
        if self.verbose or self.params["verbose"]:
            self._tell(restored)

    def _tell(self, restored):
        epochs, epoch = self.params["epochs"], restored.epoch
        if epoch < epochs:
            said = f"Going on from {restored.path}: epoch {epoch + 1}/{epochs}"
        else:
            said = f"Trained {epoch} of {epochs} epochs in {restored.path}"
        io_utils.print_msg(f"\n{said}, step {self._steps}")

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._batch = epoch, 0
        restored, self._restored = self._restored, None
        # It was for this `fit`.
        self.model._initial_epoch = None
        if restored is not None and restored.position is not None:
            self._batch = restored.position["batch"]
            if self._batch:
                restored.restore_metrics()

    def on_train_batch_end(self, batch, logs=None):
        self._steps += batch + 1 - self._batch
        self._unsaved += batch + 1 - self._batch
        self._batch = batch + 1
        self._end_if_asked(self._epoch, self._batch)
        if self.save_freq != "epoch" and self._unsaved >= self.save_freq:
            self._unsaved = 0
            if self._is_wanted(logs, f"batch {batch}"):
                self._save(self._epoch, self._batch)

    def on_epoch_end(self, epoch, logs=None):
        if self.save_freq == "epoch":
            self._unsaved = 0
            if self._is_wanted(logs, f"epoch {epoch}"):
                self._save(epoch + 1, 0)
        if self._preemption is not None:
            # One that came while the model was evaluated.
            self._preemption.agreed |= processes.any_process(
                self._preemption.asked
            )
        self._end_if_asked(epoch + 1, 0)

    def on_train_end(self, logs=None):
        # Where no epoch was left.
        self.model._initial_epoch = None
        self.wait_until_finished()

    def wait_until_finished(self):
        """Waits until the last checkpoint is complete.

        Collective under a distribution: every process calls it.

        Returns:
            `pathlib.Path` of it, None where none was written since the last
            call.
        """
        return self._saver.wait()

    def _is_wanted(self, logs, when):
        """Whether to save, and so the best until now."""
        if not self.save_best_only:
            return True
        if self.monitor_op is None:
            self._set_monitor_op()
        current = (logs or {}).get(self.monitor)
        if current is None:
            warnings.warn(
                f"Can save best model only with {self.monitor} available, "
                f"skipping save at {when}.",
                stacklevel=2,
            )
            return False
        if not self._is_improvement(current, self.best):
            return False
        self.best = float(current)
        return True

    def _save(self, epoch, batch):
        """Saves what goes on with a batch of an epoch."""
        training = {
            "epoch": epoch,
            "position": self._checkpoints.position_of(self.model).tell(batch),
        }
        user = {"best": self.best, "unsaved": self._unsaved}
        arrays = {}
        if not self.save_weights_only:
            user["callbacks"], arrays = callback_states.get(self.others)
            # Of an epoch under way, what ends it is still to come.
            user["stopped"] = not batch and bool(self.model.stop_training)
        self._checkpoints.save(
            *(self._saver, self.model, self._steps, training, user),
            weights_only=self.save_weights_only,
            arrays=arrays,
        )
        if not self.save_on_background:
            self.wait_until_finished()
        if self.verbose:
            io_utils.print_msg(
                f"\nStep {self._steps}: saving to {self.directory}"
            )

    def _end_if_asked(self, epoch, batch):
        asked = self._preemption
        if asked is None:
            return
        is_alone = not processes.is_distributed()
        if not (asked.agreed or (is_alone and asked.asked)):
            return
        self._save(epoch, batch)
        path = self.wait_until_finished()
        io_utils.print_msg(
            f"\nSIGTERM: training ends after step {self._steps}, saved to "
            f"{path}. Start the program again to go on from there."
        )
        raise SystemExit(EXIT_CODE)
