"""A model that is built in a scope is trained under its distribution."""

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras.src.backend.torch.distribution.mesh.context import current

pytestmark = [pytest.mark.world(2), pytest.mark.limit(60)]

TENSOR = {".*up/kernel": (None, "model"), ".*down/kernel": ("model", None)}
SHARDED = {".*kernel": ("batch", None)}


def distributions():
    yield keras.distribution.DataParallel()
    yield parity.model_parallel((1, 2), TENSOR)
    yield parity.model_parallel((2, 1), SHARDED)


class Asks(layers.Dense):
    """A layer that tells whether it was called under a distribution."""

    asked = []

    def call(self, x):
        self.asked.append(current() is not None)
        return super().call(x)


def make_model(is_built=True):
    model = keras.Sequential(
        [
            *([keras.Input((6,))] if is_built else []),
            Asks(8, name="up"),
            layers.BatchNormalization(),
            layers.Dense(4, name="down"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"])
    return model


def use(model):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((7, 6)).astype("float32")
    y = rng.standard_normal((7, 4)).astype("float32")
    return [
        model.fit(x, y, batch_size=4, epochs=2, verbose=0).history,
        model.train_on_batch(x, y),
        model.test_on_batch(x, y),
        model.evaluate(x, y, batch_size=5, verbose=0),
        model.predict(x, batch_size=5, verbose=0),
        model.predict_on_batch(x),
        model.get_weights(),
    ]


@pytest.mark.parametrize("is_built", [True, False])
def test_use_after_the_scope(is_built, tmp_path):
    def on_one_device():
        keras.utils.set_random_seed(7)
        return use(make_model(is_built))

    expected = parity.on_one_device(on_one_device)
    for distribution in distributions():
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(7)
        with distribution.scope():
            model = make_model(is_built)
        Asks.asked.clear()
        actual = use(model)
        assert Asks.asked and all(Asks.asked)
        assert keras.distribution.distribution() is None
        parity.assert_equal_on_all("scope", actual, expected)


def test_files_after_the_scope(rank, tmp_path):
    for i, distribution in enumerate(distributions()):
        with distribution.scope():
            model = make_model()
        path = tmp_path / str(i)
        model.save(path.with_suffix(".keras"))
        model.save_weights(path.with_suffix(".weights.h5"))
        again = keras.models.load_model(
            path.with_suffix(".keras"), {"Asks": Asks}
        )
        for a, b in zip(model.get_weights(), again.get_weights()):
            np.testing.assert_array_equal(a, b)
        everyone.gather(None)


def test_distribution_that_is_taken_away():
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = make_model()
    keras.distribution.set_distribution(None)
    Asks.asked.clear()
    use(model)
    assert Asks.asked and all(Asks.asked)


def test_another_distribution_that_is_set():
    with keras.distribution.DataParallel().scope():
        model = make_model()
    with parity.model_parallel((1, 2), TENSOR).scope():
        for outcome in everyone.outcomes(lambda: use(model)):
            assert "under another one" in outcome
