"""Whatever holds the data, it is fed as on one device, and read once."""

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler
from torch.utils.data import DataLoader
from torch.utils.data import Dataset
from torch.utils.data import DistributedSampler
from torch.utils.data import IterableDataset
from torch.utils.data import RandomSampler
from torch.utils.data import WeightedRandomSampler

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops

pytestmark = [pytest.mark.world(2), pytest.mark.limit(60)]

# Batches of 3: of the last one, a data shard has no row.
ROWS, BATCH, FEATURES = 10, 3, 4


def data(rows=ROWS):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((rows, FEATURES)).astype("float32")
    y = rng.standard_normal((rows, 2)).astype("float32")
    return x, y, rng.uniform(0.5, 2.0, rows).astype("float32")


def make_model():
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(5, "tanh")(inputs)
    # Draws on torch's generator too, as shuffling does.
    x = layers.Dropout(0.0)(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model


def make_nested_model():
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    outputs = {
        "one": layers.Dense(1, name="one")(layers.Concatenate()([a, b])),
        "two": layers.Dense(1, name="two")(a),
    }
    model = keras.Model({"a": a, "b": b}, outputs)
    model.compile(keras.optimizers.SGD(0.1), {"one": "mse", "two": "mae"})
    return model


class Samples(Dataset):
    """Keeps in mind which rows were read."""

    def __init__(self):
        self.x, self.y, _ = data()
        self.read = []

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        self.read.append(int(index))
        return self.x[index], self.y[index]


class Augmented(Samples):
    """Its samples are drawn."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(1).numpy() + np.random.rand(), y


class Stream(IterableDataset):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        x, y, weights = data()
        steps = slice(info and info.id, None, info and info.num_workers)
        yield from list(zip(x, y, weights))[steps]


class Batches(keras.utils.PyDataset):
    def __init__(self, is_endless=False, **kwargs):
        super().__init__(**kwargs)
        self.data = data()
        self.is_endless = is_endless

    @property
    def num_batches(self):
        return None if self.is_endless else 4

    def __getitem__(self, index):
        start = index % 4 * BATCH
        return tuple(part[start : start + BATCH] for part in self.data)


def generator(is_endless=True, steps=4):
    batches = Batches()
    while True:
        yield from (batches[i] for i in range(steps))
        if not is_endless:
            return


class OneByOne(BatchSampler):
    """Batches of all sizes, of which none has as many rows as another."""

    def __iter__(self):
        yield from ([0], [3, 1, 2], (7, 9), np.array([4, 5, 6, 8]))

    def __len__(self):
        return 4


def loader(dataset=None, **kwargs):
    return DataLoader(dataset or Samples(), **{"batch_size": BATCH, **kwargs})


def by_longest(samples):
    """A batch of which each row depends on all others, and on a draw."""
    x, y = torch.utils.data.default_collate(samples)
    return x / x.abs().max() + torch.rand(1), y


def nested():
    x, y, weights = data()
    return (
        {"a": x[:, :2], "b": x[:, 2:]},
        {"one": y[:, :1], "two": y[:, 1:]},
        {"one": weights, "two": weights[::-1].copy()},
    )


class Nested(Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return keras.tree.map_structure(lambda x: x[index], nested())


def arrays(wrap=lambda x: x, **kwargs):
    x, y, weights = [wrap(part) for part in data()]
    return {
        "x": x,
        "y": y,
        "sample_weight": weights,
        "batch_size": BATCH,
        **kwargs,
    }


SOURCES = {
    "arrays": lambda: arrays(shuffle=True),
    "tensors": lambda: arrays(torch.from_numpy),
    "batches shuffled": lambda: arrays(shuffle="batch"),
    "arrays, some steps": lambda: arrays(steps_per_epoch=3),
    "loader": lambda: {"x": loader(shuffle=True)},
    "loader, some steps": lambda: {
        "x": loader(shuffle=True),
        "steps_per_epoch": 3,
    },
    "loader, weighted": lambda: {
        "x": loader(sampler=WeightedRandomSampler(data()[2], 11))
    },
    "loader, own generator": lambda: {
        "x": loader(shuffle=True, generator=torch.Generator().manual_seed(3))
    },
    "loader, batch sampler": lambda: {
        "x": DataLoader(
            Samples(),
            batch_sampler=OneByOne(RandomSampler(range(10)), 3, False),
        )
    },
    "loader, last dropped": lambda: {"x": loader(drop_last=True)},
    "loader, augmented": lambda: {"x": loader(Augmented(), shuffle=True)},
    "loader, padded": lambda: {"x": loader(collate_fn=by_longest)},
    "loader, stream": lambda: {"x": loader(Stream())},
    "loader, whole batches": lambda: {
        "x": DataLoader(
            [tuple(map(torch.from_numpy, Batches()[i])) for i in range(4)],
            batch_size=None,
        )
    },
    "PyDataset": lambda: {"x": Batches(), "shuffle": True},
    "PyDataset, workers": lambda: {"x": Batches(workers=2), "shuffle": True},
    "PyDataset, endless": lambda: {
        "x": Batches(is_endless=True),
        "steps_per_epoch": 3,
        "shuffle": False,
    },
    "generator": lambda: {"x": generator(), "steps_per_epoch": 3},
    "generator, finite": lambda: {"x": generator(False)},
}
IN_PROCESSES = {
    "loader": lambda: {
        "x": loader(shuffle=True, num_workers=2, persistent_workers=True)
    },
    "loader, augmented": lambda: {"x": loader(Augmented(), num_workers=2)},
    "loader, stream": lambda: {"x": loader(Stream(), num_workers=2)},
}
NESTED = {
    "arrays": lambda: dict(
        zip(("x", "y", "sample_weight"), nested()), batch_size=BATCH
    ),
    "loader": lambda: {"x": loader(Nested())},
}


def program(make_arguments):
    def run(model):
        arguments = {"verbose": 0, **make_arguments()}
        endless = "steps_per_epoch" in arguments
        epochs = 1 if type(arguments["x"]).__name__ == "generator" else 2
        if endless:
            epochs = 2
        said = [model.fit(epochs=epochs, **arguments).history]
        arguments = {"verbose": 0, **make_arguments()}
        for name in ("shuffle", "steps_per_epoch"):
            arguments.pop(name, None)
        if endless:
            arguments["steps"] = 2
        said.append(model.evaluate(**arguments))
        # All processes draw on.
        said.append(ops.convert_to_numpy(keras.random.uniform((2,))))
        return said, torch.rand(2), np.random.rand(2)

    return run


def check(sources, make_model=make_model):
    distribution = keras.distribution.DataParallel()
    for name, make_arguments in sources.items():
        parity.assert_equal_on_all(
            name,
            parity.run(program(make_arguments), make_model, distribution),
            parity.run(program(make_arguments), make_model),
        )


def test_sources():
    check(SOURCES)


def test_nested_sources():
    check(NESTED, make_nested_model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sources_in_processes():
    check(IN_PROCESSES)


def test_grain():
    grain = pytest.importorskip(
        "grain", reason="Datasets of grain need the package."
    )

    def dataset():
        samples = list(zip(*data()[:2]))
        dataset = grain.MapDataset.source(samples).shuffle(seed=4)
        return {"x": dataset.batch(BATCH)}

    def lazily():
        return {"x": dataset()["x"].to_iter_dataset()}

    check({"map": dataset, "iter": lazily})


def test_tf_data():
    tf = pytest.importorskip(
        "tensorflow", reason="Datasets of tf.data need TensorFlow."
    )
    check(
        {
            "tf.data": lambda: {
                "x": tf.data.Dataset.from_tensor_slices(data()).batch(BATCH)
            }
        }
    )


def test_each_row_is_read_once(rank):
    with keras.distribution.DataParallel().scope():
        model = make_model()
        samples = Samples()
        model.fit(loader(samples, shuffle=True), verbose=0)  # builds
        samples.read.clear()
        model.fit(loader(samples, shuffle=True), epochs=2, verbose=0)
    first, second = everyone.gather(samples.read)
    # The first batch is read by both, which tells whether reading draws; a
    # process without rows of its own reads one in its place.
    assert len(first) + len(second) == 2 * ROWS + BATCH + 2
    assert set(first) | set(second) == set(range(ROWS))


class DrawsLate(Samples):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x + torch.rand(1).numpy() if index == 4 else x), y


class Fails(Samples):
    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def __getitem__(self, index):
        if self.rank == 1 and index == 5:
            raise OSError("no such file")
        return super().__getitem__(index)


def test_errors_are_raised_by_all(rank):
    x, y, _ = data()
    fewer = ROWS - rank
    cases = {
        "same global rows": [
            {"x": x[:fewer], "y": y[:fewer], "batch_size": 6},
            {"x": x[: 6 * (2 - rank)], "y": y[: 6 * (2 - rank)]},
            {"x": loader(list(zip(x, y))[: ROWS - 6 * rank])},
        ],
        "ran out of data before": [{"x": generator(False, 4 - rank)}],
        "batches of different sizes": [
            {"x": ((x[: 5 + rank], y[: 5 + rank]) for _ in range(2))}
        ],
        "DistributedSampler": [
            {"x": loader(sampler=DistributedSampler(range(ROWS), 2, rank))}
        ],
        "no such file could not read": [{"x": loader(Fails(rank))}],
        "draw random numbers could not read": [{"x": loader(DrawsLate())}],
    }
    with keras.distribution.DataParallel().scope():
        model = make_model()
        for expected, several in cases.items():
            for arguments in several:
                outcomes = everyone.outcomes(
                    lambda: model.fit(**arguments, verbose=0)
                )
                for outcome in outcomes:
                    assert outcome != "done", (expected, outcomes)
                if "could not read" in expected:
                    told, waiting = sorted(
                        outcomes, key=lambda o: "could not read a batch" in o
                    )
                    why = expected.split(" could")[0]
                    assert why in told and "could not read" not in told
                    # The other one says why, or where it is said.
                    assert "could not read a batch" in waiting
                    assert why in waiting or "its own error" in waiting
                else:
                    assert all(expected in o for o in outcomes), outcomes


def test_adapters_made_by_hand_give_global_batches():
    from keras.src.trainers.epoch_iterator import EpochIterator

    x, y, _ = data()
    with keras.distribution.DataParallel().scope():
        iterator = EpochIterator(x=x, y=y, batch_size=BATCH)
        batches = [batch for _, _, it in iterator for batch in it]
        assert keras.distribution.distribution() is not None
    parity.assert_same(np.concatenate([b[0] for b in batches]), x, 0)
    parity.assert_same(np.concatenate([b[1] for b in batches]), y, 0)


def fit_of_other_rows(model):
    """Of a generator whose targets have other rows than its inputs."""
    x, y, _ = data()
    batches = ((x[:4], y[:2]) for _ in range(2))
    return model.fit(batches, steps_per_epoch=2, verbose=0).history


def make_halving_model():
    class Halves(keras.Layer):
        def call(self, x):
            return x[::2]

    model = keras.Sequential([layers.Dense(2), Halves()])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def test_arrays_with_different_rows():
    """Are one device's where nothing is split; else all raise."""
    parity.assert_equal_on_all(
        "one data shard",
        parity.run(
            fit_of_other_rows,
            make_halving_model,
            parity.model_parallel((1, 2), {}),
        ),
        parity.run(fit_of_other_rows, make_halving_model),
    )
    with keras.distribution.DataParallel().scope():
        model = make_halving_model()
        for outcome in everyone.outcomes(lambda: fit_of_other_rows(model)):
            assert "same number of rows" in outcome
            assert "[(4, 4), (2, 2)]" in outcome
