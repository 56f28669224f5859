"""What fails on one process fails on all, and all can go on afterwards."""

import contextlib
import errno
import os
import pathlib
import resource
import socket
import subprocess
import sys

import numpy as np
import pytest
from torch.distributed.tensor import DTensor

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import callbacks
from keras import layers
from keras.src.saving import saving_lib

pytestmark = [pytest.mark.world(2), pytest.mark.limit(60)]

WIDTH = 64
LAYOUTS = {".*up/kernel": (None, "model"), ".*down/kernel": ("model", None)}


class WithAssets(layers.Layer):
    """A layer that keeps a file, as one with a vocabulary does."""

    fails = False

    def call(self, x):
        return x

    def save_assets(self, path):
        if self.fails:
            raise ValueError("no vocabulary")
        pathlib.Path(path, "words.txt").write_text("a b c")

    def load_assets(self, path):
        assert pathlib.Path(path, "words.txt").read_text() == "a b c"


@pytest.fixture(params=["data", "model"])
def model(request):
    distribution = keras.distribution.DataParallel()
    if request.param == "model":
        distribution = parity.model_parallel((1, 2), LAYOUTS)
    with distribution.scope():
        model = keras.Sequential(
            [
                keras.Input((WIDTH,)),
                layers.Dense(WIDTH, name="up"),
                WithAssets(name="words"),
                layers.Dense(WIDTH, name="down"),
            ]
        )
        is_cut = [isinstance(v._value, DTensor) for v in model.variables]
        assert sum(is_cut) == (2 if request.param == "model" else 0)
        model.compile("adam", "mse")
        fit(model)
        yield model


def fit(model, *callbacks, **kwargs):
    x = np.ones((6, WIDTH), "float32")
    return model.fit(
        x, x, batch_size=2, verbose=0, callbacks=list(callbacks), **kwargs
    )


@contextlib.contextmanager
def full_disk(rank, here=0):
    """Within it, files of one process can hold 4 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_all_raise(outcomes, *words):
    assert outcomes[0] != "done" and len(set(outcomes)) == 1, outcomes
    for word in words:
        assert word in outcomes[0], outcomes


SAVES = {
    "keras": lambda model, folder: model.save(folder / "m.keras"),
    "folder": lambda model, folder: model.save(folder / "m", zipped=False),
    "weights": lambda model, folder: model.save_weights(
        folder / "m.weights.h5"
    ),
    "shards": lambda model, folder: model.save_weights(
        folder / "m.weights.json", max_shard_size=5e-5
    ),
    "legacy": lambda model, folder: model.save(folder / "m.h5"),
}


@pytest.mark.parametrize("kind", SAVES)
def test_disk_that_is_full_in_a_save(kind, model, rank, tmp_path):
    save = SAVES[kind]
    with full_disk(rank):
        outcomes = everyone.outcomes(lambda: save(model, tmp_path))
    assert_all_raise(outcomes, "Error")
    assert list(tmp_path.iterdir()) == []
    # In step, and the same file can be written after all.
    fit(model)
    save(model, tmp_path)
    everyone.gather(None)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names and not any(name.startswith(".") for name in names)
    before = model.get_weights()
    model.set_weights([np.zeros_like(w) for w in before])
    path = tmp_path / names[0]
    if kind in ("weights", "shards"):
        model.load_weights(path)
        restored = model
    else:
        objects = {"WithAssets": WithAssets}
        restored = keras.models.load_model(path, objects, compile=False)
    for a, b in zip(before, restored.get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["keras", "folder"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_layer_that_fails_in_a_save(kind, culprit, model, rank, tmp_path):
    model.get_layer("words").fails = rank == culprit
    outcomes = everyone.outcomes(lambda: SAVES[kind](model, tmp_path))
    assert_all_raise(outcomes, "ValueError: no vocabulary")
    fit(model)


@pytest.mark.parametrize("kind", SAVES)
def test_one_process_opens_the_file(kind, model, rank, tmp_path, monkeypatch):
    opened = []
    released = saving_lib.h5py.File.__init__

    def logged(self, name, mode="r", *args, **kwargs):
        if mode != "r":
            opened.append(str(name))
        released(self, name, mode, *args, **kwargs)

    monkeypatch.setattr(saving_lib.h5py.File, "__init__", logged)
    SAVES[kind](model, tmp_path)
    counts = everyone.gather(len(opened))
    assert counts[0] >= 1 and counts[1] == 0


def write_store(model, path):
    # As KerasHub writes the weights of LoRA.
    store = saving_lib.H5IOStore(path, mode="w")
    store.make("lora")["rank"] = 3
    entry = store.make("lora/0")
    for layer in ("up", "down"):
        entry[layer] = model.get_layer(layer).kernel
    store.close()


def test_store(model, rank, tmp_path):
    path = tmp_path / "m.lora.h5"
    for _ in range(3):
        write_store(model, path)
        store = saving_lib.H5IOStore(path, mode="r")
        assert int(store.get("lora")["rank"][()]) == 3
        for layer in ("up", "down"):
            np.testing.assert_array_equal(
                store.get("lora/0")[layer],
                keras.ops.convert_to_numpy(model.get_layer(layer).kernel),
            )
        store.close()
        everyone.gather(None)


def test_disk_that_is_full_in_a_store(model, rank, tmp_path):
    path = tmp_path / "m.lora.h5"
    with full_disk(rank):
        assert_all_raise(everyone.outcomes(lambda: write_store(model, path)))
    assert_all_raise(
        everyone.outcomes(lambda: write_store(model, tmp_path / "no" / "m.h5")),
        "FileNotFoundError",
    )
    fit(model)


CALLBACKS = {
    "log": lambda folder: callbacks.CSVLogger(folder / "no" / "log.csv"),
    "checkpoint": lambda folder: callbacks.ModelCheckpoint(
        folder / "best.keras", "loss"
    ),
    "weights": lambda folder: callbacks.ModelCheckpoint(
        folder / "{batch}.weights.h5", save_weights_only=True, save_freq=1
    ),
    "backup": lambda folder: callbacks.BackupAndRestore(folder / "backup"),
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_files_of_callbacks(kind, model, rank, tmp_path):
    callback = CALLBACKS[kind](tmp_path)
    with full_disk(rank):
        outcomes = everyone.outcomes(lambda: fit(model, callback))
    assert_all_raise(outcomes)
    fit(model)


class Fails(callbacks.Callback):
    """Fails in one method, on one process."""

    def __init__(self, method, fails):
        super().__init__()
        setattr(self, method, self.fail if fails else lambda *_, **__: None)

    def fail(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "method",
    [
        f"on_{what}_{when}"
        for what in ("train", "epoch", "train_batch", "test", "test_batch")
        for when in ("begin", "end")
    ],
)
def test_callback_that_fails(method, model, rank, tmp_path):
    # What communicates may come before it and after it.
    x = np.ones((6, WIDTH), "float32")
    for culprit, order in ((0, 1), (1, -1)):
        each = [
            Fails(method, rank == culprit),
            callbacks.BackupAndRestore(tmp_path / "backup", save_freq=1),
            callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, logs: model.predict(x, verbose=0)
            ),
        ][::order]
        assert_all_raise(
            everyone.outcomes(
                lambda: fit(model, *each, validation_data=(x, x))
            ),
            "OSError: [Errno 28]",
        )
        fit(model)


def test_callback_of_one_process(model, rank, tmp_path):
    own = [callbacks.CSVLogger(tmp_path / "log.csv")] if rank == 0 else []
    fit(model, *own)
    assert (tmp_path / "log.csv").exists() or rank
    own = [Fails("on_epoch_end", True)] if rank == 1 else []
    assert_all_raise(everyone.outcomes(lambda: fit(model, *own)), "Errno 28")
    fit(model)


def test_where_an_error_came_from_is_told(model, rank, tmp_path):
    with pytest.raises(OSError) as caught:
        fit(model, Fails("on_epoch_end", rank == 0))
    if rank:
        assert caught.value.__notes__ == [
            "Process 0 failed in `on_epoch_end` of the callbacks."
        ]


def test_an_error_that_only_some_catch(model, rank, tmp_path):
    class Catches(callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with contextlib.suppress(OSError) if rank else full_disk(rank):
                self.model.save(tmp_path / "m.keras")

    assert_all_raise(everyone.outcomes(lambda: fit(model, Catches())))
    fit(model)


def test_folders_that_a_killed_save_left(model, rank, tmp_path):
    prefix = f".keras-saving-{socket.gethostname().replace('-', '_')}-"
    if rank == 0:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        for name in (
            f"{prefix}{ended.pid}-abc",  # of a process that is no more
            f"{prefix}{os.getppid()}-abc",  # of one that is
            f".keras-saving-other-{ended.pid}-abc",
            "tmpabc",
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name / "m.keras").touch()
    everyone.gather(None)
    model.save(tmp_path / "m.keras")
    assert len(list(tmp_path.iterdir())) == 4
    assert not list(tmp_path.glob(f"{prefix}*abc")) == []
    assert len(list(tmp_path.glob(f"{prefix}*abc"))) == 1
    everyone.gather(None)


def test_a_folder_keeps_what_is_not_the_models(model, rank, tmp_path):
    folder = tmp_path / "m"
    if rank == 0:
        folder.mkdir()
        (folder / "notes.txt").touch()
    everyone.gather(None)
    model.save(folder, zipped=False)
    assert {"notes.txt", "config.json"} <= {p.name for p in folder.iterdir()}
    # A file does not take the place of a folder.
    if rank == 0:
        (tmp_path / "m.keras").mkdir()
    everyone.gather(None)
    outcomes = everyone.outcomes(lambda: model.save(tmp_path / "m.keras"))
    assert_all_raise(outcomes, "IsADirectoryError")
