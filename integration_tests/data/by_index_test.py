"""Batches of a `PyDataset` with workers: each is read by one process."""

import numpy as np
import pytest
import torch

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers

pytestmark = [pytest.mark.world(2), pytest.mark.limit(60)]

FEATURES, SIZES = 3, (5, 4, 1, 6, 5, 3, 2)


class Batches(keras.utils.PyDataset):
    """Of different sizes; keeps in mind which were read."""

    def __init__(self, workers=2, **kwargs):
        super().__init__(workers=workers, **kwargs)
        self.read = []

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        self.read.append(index)
        rng = np.random.default_rng(index)
        x = rng.standard_normal((SIZES[index], FEATURES))
        # Arrays of several types, one of them of bytes that are not aligned.
        return {"x": x.astype("float32"), "flags": x[:, :1] > 0}, x[:, :2]


class Draws(Batches):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, y + np.random.rand(), np.ones(len(y))


class DrawsLate(Batches):
    def __getitem__(self, index):
        if index > 4:
            torch.rand(index)
        return super().__getitem__(index)


class Fails(Batches):
    def __getitem__(self, index):
        if index == 4:
            raise OSError("no such file")
        return super().__getitem__(index)


class Weighed(Batches):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x, y > 0, torch.arange(1.0, len(y) + 1))


def make_model():
    x = keras.Input((FEATURES,), name="x")
    flags = keras.Input((1,), name="flags", dtype="bool")
    hidden = layers.Concatenate()([x, keras.ops.cast(flags, "float32")])
    hidden = layers.Dense(5, "tanh", name="up")(hidden)
    outputs = layers.Dense(2, name="down")(hidden)
    model = keras.Model({"x": x, "flags": flags}, outputs)
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model


def distributions(world_size):
    kernels = {".*up/kernel": (None, "model"), ".*down/kernel": ("model", None)}
    yield keras.distribution.DataParallel()
    yield parity.model_parallel((world_size // 2, 2), kernels)
    if world_size == 4:
        yield parity.model_parallel((4, 1), {})


def program(make_dataset, **kwargs):
    def run(model):
        dataset = make_dataset()
        history = model.fit(dataset, epochs=2, verbose=0, **kwargs).history
        # What is drawn from here on is one device's as well.
        drawn = torch.rand(2), np.random.rand(2)
        said = [history, model.evaluate(make_dataset(), verbose=0)]
        return said, model.predict(make_dataset(), verbose=0), drawn

    return run


@pytest.mark.world(4)
def test_numbers_are_one_devices(world_size):
    check(Batches, world_size, shuffle=True)


def test_some_steps_of_an_epoch(world_size):
    check(Weighed, world_size, shuffle=False, steps_per_epoch=4)


def check(make_dataset, world_size, **kwargs):
    # One device's workers too: of what they have read as the model is built,
    # Keras gives the rest in the first epoch.
    run = program(make_dataset, **kwargs)
    for distribution in distributions(world_size):
        parity.assert_equal_on_all(
            make_dataset.__name__,
            parity.run(run, make_model, distribution),
            parity.run(run, make_model),
        )


def test_batches_that_are_drawn():
    """In one order on all processes; one device's threads draw in any."""
    with keras.distribution.DataParallel().scope():
        said, predicted, drawn = program(Draws, shuffle=False)(make_model())
    everything = everyone.gather(repr((said, predicted.tolist(), drawn)))
    assert len(set(everything)) == 1


def test_each_batch_is_read_once(world_size):
    with keras.distribution.DataParallel().scope():
        model = make_model()
        model.fit(Batches(), verbose=0)  # builds
        dataset = Batches()
        model.fit(dataset, shuffle=False, verbose=0)
    read = everyone.gather(dataset.read)
    # The first one by all.
    assert sum(read, []).count(0) == world_size
    later = sorted(i for each in read for i in each if i)
    assert later == list(range(1, len(SIZES)))


@pytest.mark.parametrize("workers", [2, 1])
def test_what_one_cannot_read_all_raise(workers, rank):
    with keras.distribution.DataParallel().scope():
        model = make_model()
        dataset = Fails(workers=workers)
        with pytest.raises((OSError, RuntimeError)) as error:
            model.fit(dataset, shuffle=False, verbose=0)
        steps = int(model.optimizer.iterations.value)
        # With workers, those that were read ahead come first.
        assert steps == 4 if workers == 1 else steps < 4
        # All can go on.
        model.fit(Batches(workers=workers), verbose=0)
    said = everyone.gather(f"{error.type.__name__}: {error.value}")
    assert all("no such file" in text for text in said)


def test_processes_that_read_other_data(rank):
    class Other(Batches):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x, y + rank

    with keras.distribution.DataParallel().scope():
        model = make_model()
        for outcome in everyone.outcomes(
            lambda: model.fit(Other(), shuffle=False, verbose=0)
        ):
            assert "batch, y" in outcome


def test_who_draws_late_is_told(rank):
    with keras.distribution.DataParallel().scope():
        model = make_model()
        for outcome in everyone.outcomes(
            lambda: model.fit(DrawsLate(), shuffle=False, verbose=0)
        ):
            assert "for every batch or for none" in outcome
