"""Statistics of a batch are those of the global batch, on every process."""

import numpy as np
import pytest
import torch

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops

# Of the last batch, a data shard has no row.
ROWS, BATCH, TIME, CHANNELS = 8, 7, 5, 4
CHANNELS_CUT = {
    ".*norm/(gamma|beta|moving.*)": ("model",),
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
}


def normal(*shape):
    rng = np.random.default_rng(4)
    x = 2.0 * rng.standard_normal((ROWS, *shape)) + 1.0
    return x.astype("float32")


def padded():
    x = normal(TIME, 3)
    for row, length in enumerate([5, 4, 5, 3, 1, 0, 2, 3]):
        x[row, length:] = 0.0
    return x


def norm(**kwargs):
    return layers.BatchNormalization(momentum=0.7, name="norm", **kwargs)


def up(**kwargs):
    return layers.Dense(CHANNELS, name="up", **kwargs)


CASES = {
    "plain": lambda: (normal(3), [up(), norm()]),
    "synchronized": lambda: (normal(3), [up(), norm(synchronized=True)]),
    "image": lambda: (
        normal(4, 3, 3),
        [layers.Conv2D(CHANNELS, 2, name="up"), norm()],
    ),
    "channels first": lambda: (
        normal(3, 5),
        [layers.Dense(5, name="up"), norm(axis=1)],
    ),
    "mask": lambda: (padded(), [layers.Masking(), up(), norm()]),
    "renorm": lambda: (normal(3), [up(), norm(renorm=True)]),
    "spectral": lambda: (
        normal(3),
        [
            layers.SpectralNormalization(up(), power_iterations=2),
            layers.Dense(2, name="out"),
        ],
    ),
}


def program(case):
    def run(distribution=None):
        x, _ = CASES[case]()

        def make_model():
            _, stack = CASES[case]()
            model = keras.Sequential([keras.Input(x.shape[1:]), *stack])
            model.compile(keras.optimizers.SGD(0.1), "mse")
            return model

        def train(model):
            y = np.ones((ROWS, *model.output_shape[1:]), "float32")
            arguments = {"batch_size": BATCH, "verbose": 0}
            history = model.fit(x, y, epochs=2, shuffle=False, **arguments)
            return history.history, model.predict(x, **arguments)

        return parity.run(train, make_model, distribution)

    return run


EXPECTED = {}


def check(cases, distribution):
    for case in cases:
        if case not in EXPECTED:
            EXPECTED[case] = program(case)()
        parity.assert_equal_on_all(
            case, program(case)(distribution), EXPECTED[case]
        )


@pytest.mark.world(2)
def test_of_rows():
    check(CASES, keras.distribution.DataParallel())


@pytest.mark.world(2)
def test_of_sharded_channels():
    of_spectral = {".*vector_u": (None, "model")}
    of_image = {".*up/kernel": (None, None, None, "model")}
    others = {"spectral": of_spectral, "image": of_image}
    for case in CASES:
        if case != "channels first":
            layouts = {**CHANNELS_CUT, **others.get(case, {})}
            check([case], parity.model_parallel((1, 2), layouts))


@pytest.mark.world(4)
def test_of_rows_and_channels():
    check(["plain", "mask"], parity.model_parallel((2, 2), CHANNELS_CUT))


@pytest.mark.world(2)
def test_moments(rank):
    x = normal(3)
    expected = [
        ops.convert_to_numpy(m)
        for m in ops.moments(ops.convert_to_tensor(x), 0, synchronized=True)
    ]
    np.testing.assert_allclose(expected, [x.mean(0), x.var(0)], rtol=1e-5)
    # As many rows as the program hands to each process.
    ours = ops.convert_to_tensor(x[:5] if rank else x[5:])
    with keras.distribution.DataParallel().scope():
        actual = ops.moments(ours, 0, synchronized=True)
        local = ops.moments(ours, 0)
    actual = [ops.convert_to_numpy(m) for m in actual]
    parity.assert_same(actual, expected)
    parity.assert_same(everyone.gather(actual), [expected] * 2)
    np.testing.assert_allclose(
        ops.convert_to_numpy(local[0]),
        x[:5].mean(0) if rank else x[5:].mean(0),
        rtol=1e-5,
    )


@pytest.mark.world(2)
def test_gradients_of_moments():
    def make_model():
        class Standardise(layers.Layer):
            def call(self, x):
                mean, variance = ops.moments(x, [0], synchronized=True)
                return (x - mean) / ops.sqrt(variance + 1e-3)

        return keras.Sequential(
            [keras.Input((3,)), up(), Standardise(), layers.Dense(2)]
        )

    x = normal(3)[:7]
    parity.assert_parity(
        make_model, x, x[:, :2], keras.distribution.DataParallel()
    )


@pytest.mark.world(2)
@pytest.mark.parametrize("has_mask", [False, True])
def test_hand_written_loop(has_mask, rank):
    """There, `synchronized` asks for the statistics of all rows."""
    x = padded() if has_mask else normal(TIME, 3)

    def train(x):
        def run(model):
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                y = model(ops.convert_to_tensor(x), training=True)
                torch.mean(y**3).backward()
                optimizer.step()
            return ops.convert_to_numpy(y)

        return run

    def make_model():
        stack = [layers.Masking()] if has_mask else []
        stack += [up(), norm(synchronized=True), layers.Dense(2)]
        return keras.Sequential([keras.Input((TIME, 3)), *stack])

    expected = parity.run(train(x), make_model)
    ours = slice(4 * rank, 4 * rank + 4)
    expected["said"] = expected["said"][ours]
    distribution = keras.distribution.DataParallel()
    actual = parity.run(train(x[ours]), make_model, distribution)
    parity.assert_same(actual, expected)


@pytest.mark.world(2)
def test_adapt(rank):
    x = normal(TIME, 3)

    def adapted(x, distribution):
        with distribution.scope():
            layer = layers.Normalization()
            layer.adapt(x)
            return [ops.convert_to_numpy(v) for v in layer.variables[:2]]

    layer = layers.Normalization()
    layer.adapt(x)
    expected = [ops.convert_to_numpy(v) for v in layer.variables[:2]]
    actual = adapted(x, keras.distribution.DataParallel())
    parity.assert_equal_on_all("global rows", actual, expected)
    # Adapted to rows that differ, the processes have different models.
    ours = x[:5] if rank else x[5:]
    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    with distribution.scope():
        layer = layers.Normalization()
        layer.adapt(ours)
        model = keras.Sequential([layer, layers.Dense(1)])
        model.compile("sgd", "mse")
        for outcome in everyone.outcomes(
            lambda: model.fit(ours, ours[..., :1], verbose=0)
        ):
            assert "must build the same model" in outcome
