"""Processes that have made different variables: trained right, or told."""

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops

pytestmark = pytest.mark.world(2)


def make_model():
    model = keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def fit(model):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((7, 3)).astype("float32")
    y = rng.standard_normal((7, 2)).astype("float32")
    return model.fit(x, y, batch_size=4, verbose=0).history["loss"]


def make_more(layer=lambda: layers.Dense(5)):
    layer()(np.ones((1, 6), "float32"))


def step(layer):
    """Of a loop by hand, where nothing but backward communicates."""
    ops.sum(layer(ops.ones((2, 3)))).backward()


@pytest.mark.parametrize("units", [4, 5])
def test_made_before(rank, units):
    """What one process made first shifts the numbers of all others, also
    where what can be seen of them is equal."""
    with keras.distribution.DataParallel().scope():
        if rank == 0:
            layers.Dense(units, name="dense")(ops.ones((2, 3)))
        layer = layers.Dense(4, name="dense")
        layer.build((2, 3))
        for outcome in everyone.outcomes(lambda: step(layer)):
            assert "RuntimeError: The processes have made different" in outcome
            assert "'dense/kernel'" in outcome or "not made" in outcome


def test_made_after(rank):
    """One process may make what it alone needs once the model is there."""

    def program(model):
        losses = fit(model)
        if rank == 0 and keras.distribution.distribution() is not None:
            for _ in range(100):
                make_more()
        return losses, fit(model)

    parity.assert_equal_on_all(
        "variables of one process",
        parity.run(program, make_model, keras.distribution.DataParallel()),
        parity.run(program, make_model),
    )
