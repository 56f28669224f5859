"""Layers that torch has no sharding rules for are right all the same."""

import numpy as np
import pytest

import keras
from integration_tests.harness import parity
from keras import layers

pytestmark = pytest.mark.world(2)


def convolutional_recurrent():
    """Plain and sharded layers in turn, so that gradients cross borders."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.AveragePooling2D(2, name="pool"),
            layers.Reshape((4, 4)),
            layers.GRU(4, name="gru"),
            layers.Dense(3, name="out"),
        ]
    )


def pooled():
    """Pooling is handed a sharded activation: its backward has no rule."""
    return keras.Sequential(
        [
            keras.Input((6, 3)),
            layers.Dense(4, name="up"),
            layers.AveragePooling1D(2, name="pool"),
            layers.Conv1D(4, 2, name="conv"),
            layers.Flatten(),
            layers.Dense(3, name="out"),
        ]
    )


LAYOUTS = {
    "outputs": {
        ".*conv/kernel": (None, None, None, "model"),
        ".*conv/bias": ("model",),
        ".*gru.*kernel": (None, "model"),
        ".*norm/gamma": ("model",),
    },
    "gru_only": {".*gru.*kernel": ("model", None)},
    "both": {
        ".*conv/kernel": (None, None, "model", "batch"),
        ".*gru.*kernel": ("batch", "model"),
    },
}


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_convolutional_recurrent(name, shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6, 6, 3)).astype("float32")
    y = rng.standard_normal((5, 3)).astype("float32")
    distribution = parity.model_parallel(shape, LAYOUTS[name])
    parity.assert_parity(convolutional_recurrent, x, y, distribution)


def test_pooling_of_a_sharded_activation():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6, 3)).astype("float32")
    y = rng.standard_normal((5, 3)).astype("float32")
    distribution = parity.model_parallel(
        (1, 2),
        {".*up/kernel": (None, "model"), "conv/kernel": (None, None, "model")},
    )
    parity.assert_parity(pooled, x, y, distribution)
