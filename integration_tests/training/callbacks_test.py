"""Callbacks decide alike on all processes, and files are written once."""

import functools
import json
import pathlib

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import callbacks
from keras import layers

pytestmark = [pytest.mark.world(2), pytest.mark.limit(60)]

ROWS, BATCH, FEATURES = 10, 4, 3


def data():
    rng = np.random.default_rng(8)
    return (
        rng.standard_normal((ROWS, FEATURES)).astype("float32"),
        rng.standard_normal((ROWS, 1)).astype("float32"),
    )


def make_model(rate=0.05, **kwargs):
    model = keras.Sequential(
        [keras.Input((FEATURES,)), layers.Dense(4, "tanh"), layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(rate, **kwargs), "mse", metrics=["mae"])
    return model


def fit(model, callbacks, epochs=3, **kwargs):
    x, y = data()
    return model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=epochs,
        verbose=0,
        callbacks=callbacks,
        validation_data=(x[:5], y[:5]),
        **kwargs,
    ).history


def assert_as_alone(program, tmp_path, rank, make_model=make_model):
    """Runs it alone and under distributions, each in a folder of its own.

    Args:
        program: takes a model and a folder, gives nested numbers.
    """
    # All processes write what they would write alone somewhere else.
    alone = tmp_path / f"alone{rank}"
    alone.mkdir()
    expected = parity.run_here(lambda m: program(m, alone), make_model)
    layouts = {"dense.*/kernel": (None, "model")}
    for name, distribution in {
        "data": keras.distribution.DataParallel(),
        "model": parity.model_parallel((1, 2), layouts),
    }.items():
        folder = tmp_path / name
        if rank == 0:
            folder.mkdir()
        everyone.gather(None)
        actual = parity.run(
            lambda m: program(m, folder), make_model, distribution
        )
        parity.assert_equal_on_all(name, actual, expected)


def test_decisions(rank, tmp_path):
    def program(model, folder):
        said = []
        callback = callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: said.append(dict(logs)),
            on_train_batch_end=lambda batch, logs: said.append(
                {name: float(value) for name, value in logs.items()}
            ),
        )
        history = fit(
            model,
            [
                callbacks.LearningRateScheduler(
                    lambda epoch, rate: rate * (3.0 if epoch == 2 else 1.0)
                ),
                callbacks.ReduceLROnPlateau(
                    "val_loss", factor=0.5, patience=1, min_delta=0.05
                ),
                callbacks.EarlyStopping(
                    "val_mae", patience=3, restore_best_weights=True
                ),
                callbacks.SwapEMAWeights(),
                callback,
            ],
            epochs=12,
        )
        rates = history["learning_rate"]
        assert 3 < len(rates) < 12 and len(set(rates)) > 2
        return history, said

    assert_as_alone(
        program,
        tmp_path,
        rank,
        functools.partial(make_model, 0.3, use_ema=True),
    )


def test_terminate_on_nan(rank, tmp_path):
    class Break(callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                for v in self.model.variables:
                    v.assign(v * float("nan"))

    def program(model, folder):
        history = fit(model, [callbacks.TerminateOnNaN(), Break()])
        # It stops within the second epoch.
        steps = int(model.optimizer.iterations.value)
        model.set_weights([np.zeros_like(w) for w in model.get_weights()])
        return history["loss"][0], len(history["loss"]), steps

    assert_as_alone(program, tmp_path, rank)


def test_files(rank, tmp_path, monkeypatch):
    def program(model, folder):
        log = callbacks.CSVLogger(folder / "log.csv", append=True)
        best = callbacks.ModelCheckpoint(
            folder / "made/best.weights.h5",
            "val_loss",
            save_best_only=True,
            save_weights_only=True,
        )
        each = callbacks.ModelCheckpoint(
            str(folder / "made/{epoch}-{val_loss:.3f}.keras")
        )
        often = callbacks.ModelCheckpoint(
            str(folder / "often/{epoch}-{batch}.weights.h5"),
            save_weights_only=True,
            save_freq=2,
        )
        history = fit(model, [log, best, each, often])
        fit(model, [log], epochs=1)
        everyone_wrote = sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*.*")
        )
        lines = (folder / "log.csv").read_text().splitlines()
        columns = [np.array(x.split(","), "float") for x in lines[1:]]
        restored = keras.models.clone_model(model)
        restored.load_weights(folder / "made/best.weights.h5")
        last = sorted(folder.glob("made/3-*.keras"))[-1]
        again = keras.models.load_model(last)
        kept = restored.get_weights(), again.get_weights()
        return history, everyone_wrote, columns, lines[0], kept

    names = []

    def run(model, folder):
        history, wrote, columns, head, kept = program(model, folder)
        names.append((wrote, head))
        return history, columns, kept

    assert_as_alone(run, tmp_path, rank)
    assert all(name == names[0] for name in names)
    assert everyone.gather(names) == [names] * 2


class Interrupt(callbacks.Callback):
    """Breaks off once, at the end of a batch."""

    def __init__(self, batches):
        super().__init__()
        self.batches = iter(range(batches))

    def on_train_batch_end(self, batch, logs=None):
        if next(self.batches, None) is None:
            raise KeyError("interrupted")


@pytest.mark.parametrize("save_freq", ["epoch", 2])
def test_backup_and_restore(save_freq, rank, tmp_path):
    def program(model, folder):
        backup = functools.partial(
            callbacks.BackupAndRestore,
            str(folder / "backup"),
            save_freq=save_freq,
            double_checkpoint=True,
        )
        with pytest.raises(KeyError):
            fit(model, [backup(), Interrupt(7)], shuffle=False)
        everyone.gather(None)  # Process 0 writes after the others.
        text = (folder / "backup/training_metadata.json").read_text()
        state = json.loads(text)
        assert ("random_states" in state) == (save_freq == "epoch")
        state.pop("random_states", None)
        assert len(list((folder / "backup").iterdir())) == 4
        model = make_model()
        history = fit(model, [backup()], epochs=4, shuffle=False)
        assert not (folder / "backup").exists()
        return state, history, model.get_weights()

    assert_as_alone(program, tmp_path, rank)


def test_other_processes_write_nothing(rank, tmp_path, monkeypatch):
    """Of a file that two write, one may see half."""
    opened = []
    released = open

    def logged(path, mode="r", *args, **kwargs):
        if set(mode) & set("wa+"):
            opened.append(str(path))
        return released(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", logged)
    with keras.distribution.DataParallel().scope():
        fit(
            make_model(),
            [
                callbacks.CSVLogger(tmp_path / "log.csv"),
                callbacks.BackupAndRestore(tmp_path / "backup"),
            ],
        )
    ours = [path for path in opened if path.startswith(str(tmp_path))]
    first, second = everyone.gather(ours)
    assert second == []
    assert {pathlib.Path(path).name for path in first} >= {
        "log.csv",
        "new_training_metadata.json.tmp",
    }
