"""A model is saved to a file that the program has opened, by each process."""

import io

import numpy as np
import pytest

import keras
from integration_tests.harness import parity
from keras import layers
from keras.src.saving import saving_lib

pytestmark = pytest.mark.world(2)

DISTRIBUTIONS = {
    "data": lambda: keras.distribution.DataParallel(),
    "model": lambda: parity.model_parallel(
        (1, 2), {".*kernel": (None, "model")}
    ),
    "fsdp": lambda: parity.model_parallel(
        (2, 1), {".*kernel": ("batch", None)}
    ),
}


def make_model():
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(6, "tanh"), layers.Dense(3)]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def program(model):
    x = np.linspace(-1, 1, 35).reshape(7, 5)
    y = np.linspace(0, 1, 21).reshape(7, 3)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    file = io.BytesIO()
    saving_lib.save_model(model, file)
    file.seek(0)
    loaded = saving_lib.load_model(file)
    # Slots of the optimizer too.
    history = loaded.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    return history.history, loaded.predict(x, verbose=0)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_in_memory(name):
    expected = parity.run(program, make_model, None)
    actual = parity.run(program, make_model, DISTRIBUTIONS[name]())
    parity.assert_equal_on_all(name, actual, expected)
