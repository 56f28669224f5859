"""A `fit` that was broken off goes on as if it had not been."""

import csv
import os
import pathlib
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import callbacks
from keras import layers

pytestmark = [pytest.mark.world(2), pytest.mark.limit(90)]

FEATURES, ROWS, BATCH, EPOCHS = 4, 11, 3, 3


def arrays():
    rng = np.random.default_rng(8)
    x = rng.standard_normal((ROWS, FEATURES)).astype("float32")
    return x, x.sum(1, keepdims=True)


def make_model():
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(6, "tanh", name="up"),
            layers.Dropout(0.3),
            layers.BatchNormalization(),
            layers.Dense(1, name="down"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9), "mse", metrics=["mae"]
    )
    return model


class Noisy(torch.utils.data.Dataset):
    def __init__(self):
        self.x, self.y = arrays()

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        noise = torch.randn(FEATURES).numpy() * np.random.rand()
        return self.x[index] + noise.astype("float32"), self.y[index]


def endless():
    x, y = arrays()
    while True:
        rows = np.random.permutation(ROWS)[:BATCH]
        yield x[rows], y[rows]


SOURCES = {
    "arrays": lambda: {
        **dict(zip("xy", arrays())),
        "batch_size": BATCH,
        "validation_data": arrays(),
    },
    "loader": lambda: {
        "x": torch.utils.data.DataLoader(Noisy(), BATCH, shuffle=True)
    },
    "generator": lambda: {
        "x": torch.utils.data.DataLoader(
            Noisy(),
            BATCH,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
        )
    },
    "endless": lambda: {"x": endless(), "steps_per_epoch": 4},
    "parts": lambda: {
        **dict(zip("xy", arrays())),
        "batch_size": BATCH,
        "steps_per_epoch": 3,
    },
}


def make_distribution(name):
    if name == "data":
        return keras.distribution.DataParallel()
    layouts = {".*up/kernel": (None, "model"), ".*down/kernel": ("model", None)}
    return parity.model_parallel((1, 2), layouts)


class Interrupt(callbacks.Callback):
    """Breaks off at the end of a batch, counted from one."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise KeyError("interrupted")


def logger(folder):
    """A callback that writes rows beside a folder."""
    return callbacks.CSVLogger(f"{folder}.csv")


def rows_of(folder):
    """Header and numbers of the rows that were written, on all processes."""
    everyone.gather(None)
    header, *rows = csv.reader(pathlib.Path(f"{folder}.csv").open())
    return header, [[float(x.replace("NA", "nan")) for x in r] for r in rows]


def assert_same_rows(actual, expected):
    (header, rows), (expected_header, expected_rows) = actual, expected
    assert header == expected_header
    # Sums of a metric are added up in another order.
    np.testing.assert_allclose(rows, expected_rows, 1e-6)


def fit(source, folder, *others, **options):
    """Trains a new model. Returns its history, and the weights."""
    options = {"save_freq": 2, **options}
    verbose = options.pop("progress", 0)
    model = make_model()
    checkpoint = callbacks.ShardedCheckpoint(folder, **options)
    recorded = model.fit(
        **SOURCES[source](),
        epochs=EPOCHS,
        verbose=verbose,
        callbacks=[checkpoint, logger(folder), *others],
    )
    history = recorded.history
    assert recorded.epoch == list(range(EPOCHS))
    distribution = keras.distribution.distribution()
    if isinstance(distribution, keras.distribution.ModelParallel):
        assert isinstance(model.get_layer("up").kernel._value, DTensor)
    return history, model.get_weights()


@pytest.mark.parametrize(
    "name, source",
    [*(("data", source) for source in SOURCES), ("model", "loader")],
)
def test_as_if_it_had_not_been_broken_off(name, source, rank, tmp_path):
    with parity.fresh(make_distribution(name), 5):
        history, expected = fit(source, tmp_path / "whole")
    assert all(np.isfinite(w).all() for w in expected)
    # The first has written a row of an epoch that is trained again.
    for stop, save_freq in ((5, 3), (6, 2), (7, 2)):
        folder = tmp_path / str(stop)
        with parity.fresh(make_distribution(name), 5):
            with pytest.raises(KeyError):
                fit(source, folder, Interrupt(stop), save_freq=save_freq)
            everyone.gather(None)
        # Another program, that draws otherwise until it goes on.
        with parity.fresh(make_distribution(name), 6):
            again, weights = fit(source, folder, save_freq=save_freq)
        for a, b in zip(weights, expected):
            np.testing.assert_array_equal(a, b)
        # Sums of a metric are added up in another order.
        parity.assert_same(again, history, 1e-6)
        assert_same_rows(rows_of(folder), rows_of(tmp_path / "whole"))


def test_epochs_and_the_best(rank, tmp_path):
    options = {"save_freq": "epoch", "max_to_keep": None}
    with parity.fresh(make_distribution("data"), 5):
        whole, expected = fit("arrays", tmp_path / "whole", **options)
    with parity.fresh(make_distribution("data"), 5):
        with pytest.raises(KeyError):
            fit("arrays", tmp_path / "part", Interrupt(7), **options)
        everyone.gather(None)
        names = sorted(p.name for p in (tmp_path / "part").glob("step*"))
        assert names == ["step-00000004"]
    with parity.fresh(make_distribution("data"), 6):
        _, weights = fit("arrays", tmp_path / "part", **options)
    for a, b in zip(weights, expected):
        np.testing.assert_array_equal(a, b)
    # At its end nothing is left to be trained.
    with parity.fresh(make_distribution("data"), 6):
        history, weights = fit("arrays", tmp_path / "part", **options)
    parity.assert_same(history, whole, 1e-6)
    assert_same_rows(rows_of(tmp_path / "part"), rows_of(tmp_path / "whole"))
    for a, b in zip(weights, expected):
        np.testing.assert_array_equal(a, b)
    with parity.fresh(make_distribution("data"), 5):
        history, _ = fit(
            "arrays",
            tmp_path / "best",
            save_freq="epoch",
            save_best_only=True,
            max_to_keep=None,
        )
        best, count = np.inf, 0
        for loss in history["val_loss"]:
            count += loss < best
            best = min(best, loss)
        everyone.gather(None)
        assert len(list((tmp_path / "best").glob("step*"))) == count


class Counts(callbacks.Callback):
    """One's own, which says what it counts."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(logs["loss"])

    def state_dict(self):
        return {"losses": self.losses}

    def load_state_dict(self, state):
        self.losses = state["losses"]


class Ends(callbacks.Callback):
    """Breaks off at the start of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyError("interrupted")


def fit_with_others(make_saver, *others):
    """Returns what callbacks have counted, and the weights."""
    model = make_model()
    model.optimizer.learning_rate = 0.05
    # All stand behind the one that saves what they count.
    watching = [
        *([make_saver()] if make_saver else []),
        callbacks.EarlyStopping(patience=6, restore_best_weights=True),
        callbacks.ReduceLROnPlateau(patience=1, cooldown=1, factor=0.8),
        Counts(),
        *others,
    ]
    model.fit(
        *arrays(),
        validation_data=[-a for a in arrays()],
        batch_size=BATCH,
        epochs=40,
        verbose=0,
        callbacks=watching,
    )
    early, reduce, counts = watching[-3 - len(others) :][:3]
    said = {
        "epochs": len(counts.losses),
        "stopped": early.stopped_epoch,
        "best": [early.best, early.best_epoch, early.wait],
        "plateau": [reduce.best, reduce.wait, reduce.cooldown_counter],
        "rate": float(model.optimizer.learning_rate),
        "losses": counts.losses,
    }
    return said, model.get_weights()


@pytest.mark.parametrize(
    "kind, name", [("ShardedCheckpoint", "model"), ("BackupAndRestore", "data")]
)
def test_what_other_callbacks_count(kind, name, rank, tmp_path):
    with parity.fresh(make_distribution(name), 5):
        expected, weights = fit_with_others(None)
    # It is stopped, after more than it waits, and the best is not the last.
    assert 6 < expected["epochs"] < 40
    assert expected["stopped"] == expected["epochs"] - 1
    for stop in (2, expected["stopped"]):
        folder = tmp_path / str(stop)

        def saver():
            return getattr(callbacks, kind)(str(folder))

        with parity.fresh(make_distribution(name), 5):
            with pytest.raises(KeyError):
                fit_with_others(saver, Ends(stop))
            everyone.gather(None)
        with parity.fresh(make_distribution(name), 6):
            said, actual = fit_with_others(saver)
        # Sums of a metric are added up in another order.
        parity.assert_same(said, expected, 1e-6)
        for a, b in zip(actual, weights):
            np.testing.assert_array_equal(a, b)
    if kind == "ShardedCheckpoint":
        # What was stopped stays so, with the best weights.
        with parity.fresh(make_distribution(name), 6):
            said, actual = fit_with_others(saver)
        parity.assert_same(said, expected, 1e-6)
        for a, b in zip(actual, weights):
            np.testing.assert_array_equal(a, b)


def test_on_another_mesh(rank, tmp_path):
    """Without what rows draw, which differs between data shards, and without
    statistics of few rows, which make much of a rounding."""

    def fit_without(folder, *others):
        model = keras.Sequential(
            [
                keras.Input((FEATURES,)),
                layers.Dense(6, "tanh", name="up"),
                layers.Dense(1, name="down"),
            ]
        )
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
        checkpoint = callbacks.ShardedCheckpoint(folder, save_freq=2)
        x, y = arrays()
        model.fit(x, y, BATCH, EPOCHS, 0, [checkpoint, *others])
        return model.get_weights()

    expected = parity.on_one_device(
        lambda: one_session(lambda: fit_without(tmp_path / "alone"))
    )
    with parity.fresh(make_distribution("data"), 5):
        with pytest.raises(KeyError):
            fit_without(tmp_path / "part", Interrupt(7))
        everyone.gather(None)
    with parity.fresh(make_distribution("model"), 6):
        with pytest.raises(KeyError):
            fit_without(tmp_path / "part", Interrupt(3))
        everyone.gather(None)
    # One process goes on alone.
    actual = parity.on_one_device(
        lambda: one_session(lambda: fit_without(tmp_path / "part"), 6)
    )
    parity.assert_same(actual, expected, 1e-6)


def one_session(function, seed=5):
    with parity.fresh(None, seed):
        return function()


@pytest.mark.parametrize("asked", [0, 1])
def test_preemption(asked, rank, tmp_path, capsys):
    class Asks(callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if int(self.model.optimizer.iterations) == 5 and rank == asked:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    options = {"save_freq": "epoch"}
    with parity.fresh(make_distribution("data"), 5):
        _, expected = fit("arrays", tmp_path / "whole", **options)
    with parity.fresh(make_distribution("data"), 5):
        with pytest.raises(SystemExit) as caught:
            fit("arrays", tmp_path / "part", Asks(), **options)
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is before
        everyone.gather(None)
        names = [p.name for p in (tmp_path / "part").glob("step*")]
        assert names == ["step-00000006"]
    said = capsys.readouterr().out
    assert ("SIGTERM: training ends after step 6" in said) == (rank == 0)
    with parity.fresh(make_distribution("data"), 6):
        _, weights = fit("arrays", tmp_path / "part", progress=1, **options)
        said = capsys.readouterr().out
        assert ("00000006: epoch 2/3, step 6" in said) == (rank == 0)
        fit("arrays", tmp_path / "part", progress=2, **options)
        said = capsys.readouterr().out
        assert ("Trained 3 of 3 epochs" in said) == (rank == 0)
    for a, b in zip(weights, expected):
        np.testing.assert_array_equal(a, b)


def fit_with_backup(folder, before=(), after=()):
    """Trains a new model. Returns its weights.

    Args:
        before, after: callbacks before and after that which backs up.
    """
    model = make_model()
    backup = callbacks.BackupAndRestore(folder, delete_checkpoint=False)
    recorded = model.fit(
        **SOURCES["arrays"](),
        epochs=EPOCHS,
        verbose=0,
        callbacks=[*before, backup, logger(folder), *after],
    )
    assert recorded.epoch == list(range(EPOCHS))
    assert {len(v) for v in recorded.history.values()} == {EPOCHS}
    return model.get_weights()


def test_backup_and_restore(rank, tmp_path):
    """Seeds and random states are in a backup too."""
    with parity.fresh(make_distribution("data"), 5):
        expected = fit_with_backup(tmp_path / "whole")
    with parity.fresh(make_distribution("data"), 5):
        with pytest.raises(KeyError):
            fit_with_backup(tmp_path / "part", after=[Interrupt(7)])
        everyone.gather(None)
    with parity.fresh(make_distribution("data"), 6):
        for a, b in zip(fit_with_backup(tmp_path / "part"), expected):
            np.testing.assert_array_equal(a, b)
    assert_same_rows(rows_of(tmp_path / "part"), rows_of(tmp_path / "whole"))


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_backup_is_whole_or_not_there(moved, rank, tmp_path, monkeypatch):
    """Killed when so many of its files are at their place."""
    killed, released, count = [False], os.replace, [0]

    def replace(source, destination):
        if str(destination).startswith(str(tmp_path)):
            if killed[0] or (
                "new_" not in str(destination) and count[0] == moved
            ):
                killed[0] = True
                raise KeyError("killed")
            if "new_" not in str(destination) and "latest" in str(source) + (
                str(destination)
            ):
                count[0] += 1
        released(source, destination)

    with parity.fresh(make_distribution("data"), 5):
        expected = fit_with_backup(tmp_path / "whole")

    class Kills(callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                count[0] = 0
                monkeypatch.setattr(os, "replace", replace)

    with parity.fresh(make_distribution("data"), 5):
        outcomes = everyone.outcomes(
            lambda: fit_with_backup(tmp_path / "part", before=[Kills()])
        )
        monkeypatch.setattr(os, "replace", released)
    assert moved == 2 or all("killed" in o for o in outcomes), outcomes
    with parity.fresh(make_distribution("data"), 6):
        for a, b in zip(fit_with_backup(tmp_path / "part"), expected):
            np.testing.assert_array_equal(a, b)


def test_of_one_device(rank, tmp_path):
    """Without a distribution too."""

    def program():
        history, expected = one_session(
            lambda: fit("loader", tmp_path / "whole")
        )
        with pytest.raises(KeyError):
            one_session(lambda: fit("loader", tmp_path / "a", Interrupt(7)))
        _, weights = one_session(lambda: fit("loader", tmp_path / "a"), 6)
        return [np.array_equal(a, b) for a, b in zip(weights, expected)]

    assert all(parity.on_one_device(program))
    assert dist.get_world_size() == 2
