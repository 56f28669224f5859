"""Random numbers: one device's, but that data shards draw their own."""

import contextlib
import inspect

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops
from keras.src import tree
from keras.src.backend.torch.distribution.variables import drawing as parts


def run(program, distribution=None):
    """What a program returns, from the same state each time."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    with distribution.scope() if distribution else contextlib.nullcontext():
        return program()


# One of each; the cut dim of some has no equal shards.
INITIALIZERS = {
    name: value
    for name, value in vars(keras.initializers).items()
    if inspect.isclass(value)
    and name != "Initializer"
    and value.__name__ == name
}
ARGUMENTS = {"Constant": {"value": 0.3}, "VarianceScaling": {"scale": 2.0}}
SHAPES = {"STFT": (8, 1, 10)}


def test_initializers_are_all_there():
    assert len(INITIALIZERS) >= 15


@pytest.mark.world(2)
def test_initial_weights(world_size):
    """The bits of one device, however they are cut, with and without seeds."""

    class Everything(keras.Layer):
        def build(self, input_shape):
            for name, initializer in INITIALIZERS.items():
                kwargs = ARGUMENTS.get(name, {})
                takes = inspect.signature(initializer).parameters
                for seed in (None, 3) if "seed" in takes else (None,):
                    if seed is not None:
                        kwargs = {**kwargs, "seed": seed}
                    self.add_weight(
                        SHAPES.get(name, (6, 5)),
                        initializer(**kwargs),
                        name=f"{name}_{seed}",
                    )

        def call(self, x):
            return x

    def program():
        layer = Everything(name="everything")
        layer(ops.ones((3, 2)))
        return {v.path: ops.convert_to_numpy(v) for v in layer.weights}

    expected = parity.on_one_device(lambda: run(program))
    for shape in [(1, 2), (2, 1)]:
        for axes in [(None, "model"), ("batch", None)]:
            actual = run(
                program,
                parity.model_parallel(shape, {"everything/(?!STFT).*": axes}),
            )
            parity.assert_same(actual, expected, 0)


def drawing(function):
    """A layer that shows what a function draws for its rows."""

    class Drawing(keras.Layer):
        def __init__(self):
            super().__init__()
            self.generator = keras.random.SeedGenerator(9)
            self.unseeded = keras.random.SeedGenerator()

        def call(self, x):
            return ops.stack(
                [
                    ops.cast(function(x, seed), "float32")
                    for seed in (None, 3, self.generator, self.unseeded)
                ],
                axis=1,
            )

    return Drawing()


FUNCTIONS = {
    "normal": lambda x, seed: keras.random.normal(x.shape, seed=seed),
    "uniform": lambda x, seed: keras.random.uniform(x.shape, seed=seed),
    "truncated_normal": lambda x, seed: keras.random.truncated_normal(
        x.shape, seed=seed
    ),
    "randint": lambda x, seed: keras.random.randint(x.shape, 0, 99, seed=seed),
    "dropout": lambda x, seed: keras.random.dropout(x, 0.5, seed=seed),
    "categorical": lambda x, seed: keras.random.categorical(
        ops.ones_like(x), x.shape[1], seed=seed
    ),
    "gamma": lambda x, seed: keras.random.gamma(x.shape, 2.0, seed=seed),
    "beta": lambda x, seed: keras.random.beta(x.shape, 2.0, 3.0, seed=seed),
    "binomial": lambda x, seed: keras.random.binomial(
        x.shape, 20.0, 0.5, seed=seed
    ),
    "shuffle": lambda x, seed: keras.random.shuffle(x, axis=1, seed=seed),
}
# Of these, each row has its own part in one draw for all rows.
BY_ROWS = ("normal", "uniform", "truncated_normal", "randint", "dropout")

RANDOM_LAYERS = [
    lambda: layers.Dropout(0.5),
    lambda: layers.GaussianNoise(0.5),
    lambda: layers.GaussianDropout(0.5),
    lambda: layers.AlphaDropout(0.5),
    lambda: layers.SpatialDropout2D(0.5),
    lambda: layers.RandomFlip(),
    lambda: layers.RandomRotation(0.2),
    lambda: layers.RandomTranslation(0.3, 0.3),
    lambda: layers.RandomZoom(0.3),
    lambda: layers.RandomContrast(0.5),
    lambda: layers.RandomBrightness(0.5),
]


def images(rows):
    rng = np.random.default_rng(3)
    return rng.uniform(0, 255, (rows, 5, 6, 3)).astype("float32")


def draws():
    """What all functions and layers draw, twice, for the same rows."""
    x = ops.reshape(ops.arange(1, 49, dtype="float32"), (4, 12))
    result = {
        name: [drawing(function)(x) for _ in range(2)]
        for name, function in FUNCTIONS.items()
    }
    for make in RANDOM_LAYERS:
        layer = make()
        result[layer.name] = [
            layer(ops.convert_to_tensor(images(4)), training=True)
            for _ in range(2)
        ]
    return keras.tree.map_structure(ops.convert_to_numpy, result)


@pytest.mark.world(4)
def test_draws(world_size):
    """One device's without data shards; else different between them."""
    expected = parity.on_one_device(lambda: run(draws))
    parity.assert_same(run(draws, parity.model_parallel((1, 4), {})), expected)
    actual = run(draws, parity.model_parallel((2, 2), {}))
    first, second, third, fourth = everyone.gather(actual)
    parity.assert_same(second, first, 0)
    parity.assert_same(fourth, third, 0)
    for name, pair in first.items():
        for ours, theirs in zip(pair, third[name]):
            if name in FUNCTIONS:
                # For each of the seeds.
                for i in range(ours.shape[1]):
                    assert (ours[:, i] != theirs[:, i]).any(), name
            assert (ours != theirs).any(), name


SCALARS = {
    "normal": lambda: keras.random.normal((), seed=7),
    "uniform": lambda: keras.random.uniform((), seed=7),
    "truncated_normal": lambda: keras.random.truncated_normal((), seed=7),
    "randint": lambda: keras.random.randint((), 0, 1 << 20, seed=7),
    "gamma": lambda: keras.random.gamma((), 2.0, seed=7),
    "beta": lambda: keras.random.beta((), 2.0, 3.0, seed=7),
    "binomial": lambda: keras.random.binomial((), 500.0, 0.5, seed=7),
}


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.world(2)
def test_a_number_is_drawn_for_all(world_size, name):
    """What a layer draws that has no rows is one device's, in a call by hand
    and in `fit`."""

    class Drawing(keras.Layer):
        def call(self, x):
            return x * 0 + ops.cast(SCALARS[name](), "float32")

    def program():
        x = np.ones((5, 2), "float32")
        model = keras.Sequential([Drawing()])
        return ops.convert_to_numpy(model(x)), model.predict(x, verbose=0)

    expected = parity.on_one_device(program)
    parity.assert_same(
        run(program, keras.distribution.DataParallel()), expected
    )


def losses(distribution=None):
    """Of uneven batches; the last one of `fit` has a single row."""

    def program():
        model = keras.Sequential(
            [
                keras.Input((5, 6, 3)),
                layers.RandomFlip(),
                layers.RandomBrightness(0.2),
                layers.Rescaling(1 / 255),
                layers.SpatialDropout2D(0.2, seed=3),
                layers.Flatten(),
                layers.Dense(8, "tanh", name="column"),
                layers.Dropout(0.2),
                layers.GaussianNoise(0.1),
                layers.Dense(8, "tanh", name="row"),
                layers.Dropout(0.3, seed=5),
                layers.AlphaDropout(0.1),
                layers.Dropout(0.2, noise_shape=(1, None)),
                layers.Dropout(0.2, noise_shape=(None, 1), seed=7),
                drawing_noise(),
                layers.Dense(3, name="head"),
            ]
        )
        model.compile(keras.optimizers.SGD(0.1), "mse")
        x, y = images(19), images(19)[:, 0, 0] / 255
        history = model.fit(x, y, batch_size=9, epochs=2, verbose=0)
        return history.history, model.get_weights()

    return run(program, distribution)


def drawing_noise():
    """Noise as a user writes it: for rows, and the same for all rows."""

    class Noise(keras.Layer):
        def call(self, x, training=False):
            if not training:
                return x
            noise = keras.random.uniform(x.shape, -0.1, 0.1)
            return x + noise + keras.random.normal((1, x.shape[-1]), 0, 0.1)

    return Noise()


@pytest.mark.world(2, 4)
@pytest.mark.parametrize("smallest", [parts.SMALLEST, 4])
def test_drawing_for_the_global_batch(world_size, smallest, monkeypatch):
    """One device's losses on any mesh, with all that is random."""
    expected = parity.on_one_device(losses)
    # Masks of more numbers are drawn in parts.
    monkeypatch.setattr(parts, "SMALLEST", smallest)
    layouts = {
        ".*column/kernel": (None, "model"),
        ".*row/kernel": ("model", "batch"),
    }
    for shape in [(2, world_size // 2), (world_size, 1)]:
        distribution = parity.model_parallel(shape, layouts)
        distribution.draw_global_batch = True
        parity.assert_same(losses(distribution), expected)
    # Without it, shards draw what one device does not.
    if world_size == 2:
        with pytest.raises(AssertionError):
            other = losses(parity.model_parallel((2, 1), layouts))
            parity.assert_same(other, expected, 1e-3)


@pytest.mark.world(2)
def test_global_batch_of_local_rows(world_size):
    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    distribution.draw_global_batch = True
    for loss in tree.flatten(losses(distribution)):
        assert np.isfinite(loss).all()
