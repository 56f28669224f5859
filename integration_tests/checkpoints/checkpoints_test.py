"""Sharded checkpoints: saved under one distribution, restored under another."""

import contextlib
import errno
import json
import math
import os
import pathlib
import pickle
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras.src.backend.torch.distribution.checkpoints import parts
from keras.src.backend.torch.distribution.checkpoints import reading
from keras.src.backend.torch.distribution.checkpoints import saving
from keras.src.backend.torch.distribution.checkpoints import shard_file
from keras.src.backend.torch.distribution.checkpoints import weights_files

pytestmark = [pytest.mark.world(2), pytest.mark.limit(60)]

# Odd, so that shards are uneven and one may be empty.
FEATURES, WIDTH, OUTPUTS = 5, 9, 3
ROWS = 7

COLUMN_ROW = {".*up/kernel": (None, "model"), ".*down/kernel": ("model", None)}
FULLY_SHARDED = {".*kernel": ("batch", None), ".*table.*": (None, "batch")}
BOTH = {
    ".*up/kernel": ("batch", "model"),
    ".*down/kernel": (("model", "batch"), None),
    ".*table.*": ("model", None),
}


def distributions():
    world = dist.get_world_size()
    return {
        "alone": None,
        "data": keras.distribution.DataParallel(),
        "model": parity.model_parallel((1, world), COLUMN_ROW),
        "fully sharded": parity.model_parallel((world, 1), FULLY_SHARDED),
        "both": parity.model_parallel((world // 2, 2), BOTH),
    }


def data(seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((ROWS, FEATURES)).astype("float32"),
        rng.standard_normal((ROWS, OUTPUTS)).astype("float32"),
    )


def make_model(optimizer=None, dtype=None):
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(WIDTH, "tanh", name="up", dtype=dtype)(inputs)
    ids = keras.ops.cast(x > 0, "int32")
    table = layers.Embedding(2, WIDTH, name="table", dtype=dtype)
    x = x + keras.ops.mean(table(ids), axis=1)
    x = layers.BatchNormalization(name="norm", dtype=dtype)(x)
    x = layers.Dropout(0.2, seed=3)(x)
    model = keras.Model(inputs, layers.Dense(OUTPUTS, name="down")(x))
    optimizer = optimizer or keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def step(model, times=1):
    return [model.train_on_batch(*data(i)) for i in range(times)]


def everything(model):
    """All numbers of a training, whole, by a name."""
    groups = {
        "model": model.variables,
        "optimizer": model.optimizer.variables,
        "metrics": model.metrics_variables,
    }
    return {
        f"{group}/{i}": keras.ops.convert_to_numpy(v)
        for group, variables in groups.items()
        for i, v in enumerate(variables)
    }


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], name)


def is_cut(variable):
    return isinstance(variable._value, DTensor)


def assert_restored(model, expected):
    """Of metrics, those that are made already."""
    actual = everything(model)
    made = {n: v for n, v in expected.items() if n in actual}
    assert {n.split("/")[0] for n in expected if n not in made} <= {"metrics"}
    assert_equal(actual, made)


@contextlib.contextmanager
def under(distribution):
    """A new session; without a distribution of the first process alone.

    Yields whether this process takes part.
    """
    everyone.gather(None)
    with parity.fresh(distribution, 5):
        yield distribution is not None or dist.get_rank() == 0
    everyone.gather(None)


@pytest.mark.world(2, 4)
@pytest.mark.parametrize("source", ["alone", "model", "both"])
def test_any_mesh(source, rank, tmp_path):
    expected = after = None
    with under(distributions()[source]) as takes_part:
        if takes_part:
            model = make_model()
            step(model, 3)
            path = keras.distribution.save_checkpoint(
                model, tmp_path, user={"epoch": 3}
            )
            assert path.name == "step-00000003"
            draws = np.random.rand(), torch.rand(()).item()
            expected = everything(model)
            model.layers[-2].rate = 0.0
            after = step(model), model.get_weights()
    expected, draws, after = everyone.gather(
        (expected, draws if expected else None, after)
    )[0]
    for name, distribution in distributions().items():
        with under(distribution) as takes_part:
            if not takes_part:
                continue
            model = make_model()
            if name in ("data", "both"):
                # Also what is made in the first step.
                step(model)
            cut = [v for v in model.variables if is_cut(v)]
            assert bool(cut) == (name not in ("alone", "data"))
            user = keras.distribution.load_checkpoint(model, tmp_path)
            assert user == {"epoch": 3}
            assert (np.random.rand(), torch.rand(()).item()) == draws
            assert_restored(model, expected)
            # It is in order: the same step follows.
            model.layers[-2].rate = 0.0
            parity.assert_same((step(model), model.get_weights()), after)


@pytest.mark.parametrize("kind", ["adam", "accumulation", "scaled", "lora"])
def test_optimizers_and_adapters(kind, rank, tmp_path):
    world = dist.get_world_size()

    def make():
        optimizer = keras.optimizers.Adam(
            0.01,
            gradient_accumulation_steps=2 if kind == "accumulation" else None,
            use_ema=kind == "adam",
        )
        if kind == "scaled":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model = make_model(optimizer)
        if kind == "lora":
            model.get_layer("up").enable_lora(2)
            model.compile(optimizer, "mse", metrics=["mae"])
        return model

    with under(distributions()["both"]):
        model = make()
        step(model, 3)
        keras.distribution.save_checkpoint(model, tmp_path)
        expected = everything(model)
    # On the same mesh, and on another.
    for shape in ((world // 2, 2), (1, world)):
        with under(parity.model_parallel(shape, BOTH)):
            model = make()
            keras.distribution.load_checkpoint(model, tmp_path)
            assert_restored(model, expected)


def test_dtypes(tmp_path):
    with under(distributions()["both"]):
        model = make_model(dtype="bfloat16")
        step(model)
        keras.distribution.save_checkpoint(model, tmp_path)
        expected = everything(model)
        assert any(v.dtype == "bfloat16" for v in model.variables)
    with under(distributions()["data"]):
        model = make_model(dtype="bfloat16")
        keras.distribution.load_checkpoint(model, tmp_path)
        for name, value in everything(model).items():
            np.testing.assert_array_equal(
                value.astype("float32"), expected[name].astype("float32")
            )


@pytest.mark.parametrize("name", ["data", "fully sharded", "both"])
def test_each_number_is_written_once(name, rank, tmp_path, monkeypatch):
    # Also what is small, in parts.
    monkeypatch.setattr(parts, "SMALL", 64)
    with under(distributions()[name]):
        model = make_model()
        step(model)
        path = keras.distribution.save_checkpoint(model, tmp_path)
    reader = reading.ShardReader(path)
    metadata = reader.read_metadata().state_dict_metadata
    covered = {
        key: np.zeros(tuple(tensor.size), int)
        for key, tensor in metadata.items()
    }
    bytes_of = {}
    for (key, offsets), (file, shard) in (
        ((index.fqn, index.offset), found)
        for index, found in reader.shards.items()
    ):
        part = tuple(
            slice(start, start + size)
            for start, size in zip(offsets, shard.shape)
        )
        if not key.startswith("processes"):
            covered[key][part] += 1
            size = shard.stop - shard.start
            bytes_of[file] = bytes_of.get(file, 0) + size
    for key, counts in covered.items():
        if not key.startswith("processes"):
            assert (counts == 1).all(), key
    # No process writes much more than its part.
    world = dist.get_world_size()
    total = sum(bytes_of.values())
    assert len(bytes_of) == world
    assert max(bytes_of.values()) < 2 * total / world
    with under(distributions()["model"]):
        other = make_model()
        keras.distribution.load_checkpoint(other, path)
        for a, b in zip(other.get_weights(), model.get_weights()):
            np.testing.assert_array_equal(a, b)


def test_nothing_is_gathered_to_save_or_restore(tmp_path, monkeypatch):
    with under(distributions()["both"]):
        model = make_model()
        step(model)
        for name in ("all_gather_single", "all_gather"):
            monkeypatch.setattr(dist, name, None)
        keras.distribution.save_checkpoint(model, tmp_path)
        keras.distribution.load_checkpoint(model, tmp_path)


def test_torch_reads_it(rank, tmp_path):
    """A program that knows nothing of Keras."""
    with under(distributions()["both"]):
        model = make_model()
        step(model)
        path = keras.distribution.save_checkpoint(model, tmp_path)
        kernel = keras.ops.convert_to_numpy(model.get_layer("up").kernel)
    (name,) = (
        n
        for n, (_, shape) in reading.ShardReader(path)
        .manifest["tensors"]
        .items()
        if shape == [FEATURES, WIDTH] and n.startswith("layers/")
    )
    x = torch.zeros(FEATURES, WIDTH)
    dcp.load({name: x}, storage_reader=reading.ShardReader(path))
    np.testing.assert_array_equal(x, kernel)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    with under(distributions()["both"]):
        model = make_model()
        step(model)
        path = keras.distribution.save_checkpoint(model, tmp_path)
        names = {p.name.rpartition(".")[2] for p in path.iterdir()}
        assert names == {"json", "safetensors"}
        for module, name in (
            (pickle, "load"),
            (pickle, "loads"),
            (pickle, "Unpickler"),
            (torch, "load"),
        ):
            monkeypatch.setattr(module, name, None)
        keras.distribution.load_checkpoint(model, tmp_path)


def test_weights_files(rank, tmp_path):
    with under(distributions()["both"]):
        model = make_model()
        step(model, 2)
        path = keras.distribution.save_checkpoint(model, tmp_path / "c")
        model.save_weights(tmp_path / "expected.weights.h5")
        expected = model.get_weights(), everything(model)
    if rank == 0:
        weights_files.to_weights(path, tmp_path / "actual.weights.h5")
        a, b = (tmp_path / f"{n}.weights.h5" for n in ("actual", "expected"))
        assert_same_hdf5(a, b)
        weights_files.from_weights(a, tmp_path / "again")
    everyone.gather(None)
    for name in ("data", "both"):
        with under(distributions()[name]):
            model = make_model()
            keras.distribution.load_checkpoint(model, tmp_path / "again")
            actual = everything(model)
            for key, value in actual.items():
                # Seeds and metrics are in no such file.
                if key.startswith("optimizer"):
                    np.testing.assert_array_equal(value, expected[1][key])
            for a, b in zip(model.get_weights(), expected[0]):
                if a.dtype == "float32":
                    np.testing.assert_array_equal(a, b)


def assert_same_hdf5(a, b):
    import h5py

    with h5py.File(a) as a, h5py.File(b) as b:
        names = []
        b.visititems(lambda name, _: names.append(name))
        found = []
        a.visititems(lambda name, _: found.append(name))
        assert sorted(found) == sorted(names)
        for name in names:
            assert dict(a[name].attrs) == dict(b[name].attrs)
            if isinstance(b[name], h5py.Dataset):
                assert a[name].dtype == b[name].dtype
                np.testing.assert_array_equal(a[name][()], b[name][()])


def test_weights_only(tmp_path):
    with under(distributions()["both"]):
        model = make_model()
        step(model, 2)
        path = keras.distribution.save_checkpoint(
            model, tmp_path, weights_only=True
        )
        names = reading.ShardReader(path).manifest["tensors"]
        assert not any(n.startswith(("optimizer", "metrics")) for n in names)
        expected = model.get_weights()
    with under(distributions()["data"]):
        model = make_model(keras.optimizers.Adam(0.5))
        step(model)
        before = int(model.optimizer.iterations)
        keras.distribution.load_checkpoint(model, tmp_path, weights_only=True)
        for a, b in zip(model.get_weights(), expected):
            np.testing.assert_array_equal(a, b)
        assert int(model.optimizer.iterations) == before


class Table(layers.Layer):
    """Hands a file what is no variable."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")
        self.words = np.zeros(3)

    def call(self, x):
        return x * self.scale

    def save_own_variables(self, store):
        store["words"] = self.words
        store["scale"] = self.scale

    def load_own_variables(self, store):
        self.words = np.array(store["words"])
        self.scale.assign(store["scale"])


def test_values_that_are_no_variables(tmp_path):
    def make():
        model = keras.Sequential([keras.Input((4,)), Table()])
        model.compile("sgd", "mse")
        return model

    with under(distributions()["data"]):
        model = make()
        model.layers[0].words = np.arange(3.0)
        expected = model.get_weights()
        keras.distribution.save_checkpoint(model, tmp_path)
    with under(distributions()["model"]):
        model = make()
        keras.distribution.load_checkpoint(model, tmp_path)
        np.testing.assert_array_equal(model.layers[0].words, np.arange(3.0))
        np.testing.assert_array_equal(model.get_weights()[0], expected[0])


def damage(kind, path):
    """Spoils a checkpoint; returns what the error says."""
    file = sorted(path.glob("*.safetensors"))[1]
    if kind == "missing":
        file.unlink()
        return f"{file.name} is missing"
    if kind == "short":
        os.truncate(file, file.stat().st_size - 8)
        return f"{file.name} is cut short"
    if kind == "bytes":
        data = bytearray(file.read_bytes())
        (length,) = np.frombuffer(data[:8], "uint64")
        for i in range(8 + int(length), len(data)):
            data[i] ^= 1
        file.write_bytes(data)
        return "is damaged"
    if kind == "header":
        file.write_bytes(b"\x00" * file.stat().st_size)
        return "is no file of shards"
    if kind == "manifest":
        (path / "checkpoint.json").write_text("{")
        return "checkpoint.json is damaged"
    manifest = json.loads((path / "checkpoint.json").read_text())
    manifest["files"].popitem()
    (path / "checkpoint.json").write_text(json.dumps(manifest))
    return "lacks shards"


@pytest.mark.parametrize(
    "kind", ["missing", "short", "bytes", "header", "manifest", "file"]
)
def test_what_is_not_whole_is_named(kind, rank, tmp_path):
    with under(distributions()["both"]):
        model = make_model()
        step(model)
        path = keras.distribution.save_checkpoint(model, tmp_path)
        keras.distribution.load_checkpoint(model, path)
        everyone.gather(None)
        said = everyone.gather(damage(kind, path) if rank == 0 else None)[0]
        for outcome in everyone.outcomes(
            lambda: keras.distribution.load_checkpoint(model, path)
        ):
            assert outcome.startswith("OSError") and said in outcome, outcome


def test_errors(rank, tmp_path):
    def outcome(function):
        outcomes = everyone.outcomes(function)
        assert len(set(outcomes)) == 1
        return outcomes[0]

    load = keras.distribution.load_checkpoint
    with under(distributions()["both"]):
        model = make_model()
        step(model)
        assert outcome(lambda: load(model, tmp_path)).startswith(
            "FileNotFoundError: There is no complete checkpoint"
        )
        unbuilt = keras.Sequential([layers.Dense(2)])
        assert "is built before it is saved" in outcome(
            lambda: keras.distribution.save_checkpoint(unbuilt, tmp_path)
        )
        keras.distribution.save_checkpoint(model, tmp_path)
        adam = make_model(keras.optimizers.Adam())
        assert "is of another model" in outcome(lambda: load(adam, tmp_path))
        other = keras.Sequential(
            [keras.Input((FEATURES,)), layers.Dense(4, name="up")]
        )
        other.compile("sgd", "mse")
        said = outcome(lambda: load(other, tmp_path))
        assert "it lacks 'layers/dense/vars/0' (sequential/up/kernel)" in (
            said
        ) or ("has shape (5, 9) there, and (5, 4) here" in said), said
        step(model)


def test_the_last_ones_are_kept(rank, tmp_path):
    with under(distributions()["data"]):
        model = make_model()
        left = tmp_path / ".unfinished-0123"
        gone = tmp_path / "step-00000000"
        if rank == 0:
            # Of a program that was killed while it wrote, or removed.
            for folder in (left, gone):
                folder.mkdir()
                (folder / "shard").write_text("half")
        everyone.gather(None)
        for _ in range(4):
            step(model)
            path = keras.distribution.save_checkpoint(
                model, tmp_path, max_to_keep=2
            )
        # Another of the same step.
        path = keras.distribution.save_checkpoint(
            model, tmp_path, max_to_keep=2
        )
        everyone.gather(None)
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == ["latest", "step-00000004", "step-00000004-1"]
        assert path.name == "step-00000004-1"
        assert (tmp_path / "latest").read_text() == path.name
        everyone.gather(None)
        # Without the file, the newest is found too.
        if rank == 0:
            (tmp_path / "latest").unlink()
        everyone.gather(None)
        keras.distribution.load_checkpoint(model, tmp_path)


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("where", ["shards", "finish"])
def test_disk_that_is_full(where, culprit, rank, tmp_path, monkeypatch):
    if where == "finish" and culprit:
        return  # The first process alone finishes one.
    with under(distributions()["both"]):
        model = make_model()
        step(model)
        kept = keras.distribution.save_checkpoint(
            model, tmp_path, max_to_keep=1
        )
        expected = everything(model)
        step(model)

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            if rank == culprit:
                if where == "shards":
                    patch.setattr(shard_file, "write", full)
                else:
                    patch.setattr(saving.folders, "finish", full)
            for outcome in everyone.outcomes(
                lambda: keras.distribution.save_checkpoint(
                    model, tmp_path, max_to_keep=1
                )
            ):
                assert outcome.startswith("OSError: [Errno 28]"), outcome
        # What was there is whole, and all go on.
        keras.distribution.load_checkpoint(model, tmp_path)
        assert_equal(everything(model), expected)
        step(model)
        path = keras.distribution.save_checkpoint(
            model, tmp_path, max_to_keep=1
        )
        everyone.gather(None)
        assert (
            path != kept
            and not kept.exists()
            or path.name == (f"{kept.name}-1")
        )


def test_training_waits_for_the_copy_alone(rank, tmp_path, monkeypatch):
    import threading

    released = shard_file.write
    may_write = threading.Event()

    def slow(*args, **kwargs):
        assert may_write.wait(50)
        return released(*args, **kwargs)

    monkeypatch.setattr(shard_file, "write", slow)
    with under(distributions()["both"]):
        model = make_model()
        step(model)
        expected = everything(model)
        callback = keras.callbacks.ShardedCheckpoint(tmp_path)
        callback.set_model(model)
        checkpoints = callback._checkpoints
        checkpoints.save(callback._saver, model, 1)
        # Nothing is written yet, and it changes no more.
        step(model, 3)
        everyone.gather(None)
        assert not list(tmp_path.glob("step-*"))
        may_write.set()
        assert callback.wait_until_finished().name == "step-00000001"
        keras.distribution.load_checkpoint(model, tmp_path)
        assert_equal(everything(model), expected)


def test_what_an_exception_has_left_under_way_is_the_newest(
    rank, tmp_path, monkeypatch
):
    released = saving.folders.finish

    def slow(*args):
        time.sleep(1)
        return released(*args)

    with under(distributions()["both"]):
        model = make_model()
        step(model)
        keras.distribution.save_checkpoint(model, tmp_path)
        monkeypatch.setattr(saving.folders, "finish", slow)
        step(model)
        expected = everything(model)
        callback = keras.callbacks.ShardedCheckpoint(tmp_path, max_to_keep=1)
        callback._checkpoints.save(callback._saver, model, 2)
        step(model)
        # It removes the one before when it is done.
        keras.distribution.load_checkpoint(model, tmp_path)
        assert_equal(everything(model), expected)
        everyone.gather(None)
        assert [p.name for p in tmp_path.glob("step*")] == ["step-00000002"]


def test_no_thread_and_no_group_is_left(rank, tmp_path):
    import threading

    with under(distributions()["both"]):
        model = make_model()
        step(model)
        groups = len(dist.distributed_c10d._world.pg_map)
        for _ in range(3):
            keras.distribution.save_checkpoint(model, tmp_path)
        assert len(dist.distributed_c10d._world.pg_map) == groups
        names = [t.name for t in threading.enumerate()]
        assert "keras-checkpoint" not in names


def test_bytes(tmp_path):
    """A checkpoint is little more than its numbers."""
    with under(distributions()["fully sharded"]):
        model = make_model()
        step(model)
        path = keras.distribution.save_checkpoint(model, tmp_path)
        numbers = sum(
            math.prod(shape) * shard_file.DTYPES[dtype].itemsize
            for name, (dtype, shape) in reading.ShardReader(path)
            .manifest["tensors"]
            .items()
        )
        size = sum(p.stat().st_size for p in pathlib.Path(path).iterdir())
        assert size < numbers + 50_000 * dist.get_world_size()
