"""Quantized layers under layouts give what they give on one device."""

import numpy as np
import pytest

import keras
from integration_tests.harness import parity
from keras import layers

pytestmark = [pytest.mark.world(2), pytest.mark.limit(120)]

LENGTH, WIDTH = 3, 8


def everything(axis):
    """A key for each of the weights, which what they are quantized with
    matches too."""
    return {
        ".*dense/(kernel.*|scale)": (axis, None),
        ".*(einsum|query|key|value|attention_output)/kernel.*": (
            axis,
            None,
            None,
        ),
        ".*embeddings.*": (axis, None),
        ".*(query|key|value)/bias": (axis, None),
        ".*(dense|attention_output)/bias": (axis,),
    }


LAYOUTS = {
    "outputs": {
        ".*dense/kernel": (None, "model"),
        ".*(einsum|query|key|value|attention_output)/kernel": (
            None,
            None,
            "model",
        ),
        ".*embeddings": (None, "model"),
        ".*dense/bias": ("model",),
        ".*(query|key|value)/bias": (None, "model"),
    },
    "inputs": {
        ".*dense/kernel": ("model", None),
        ".*(einsum|query|key|value|attention_output)/kernel": (
            "model",
            None,
            None,
        ),
        ".*embeddings": ("model", None),
    },
    "data": {
        ".*dense/kernel": ("batch", "model"),
        ".*(einsum|query|key|value)/kernel": (None, "batch", "model"),
        ".*embeddings": ("batch", "model"),
    },
    "everything": everything("batch"),
    "everything, model": everything("model"),
}


def make_model():
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(9, WIDTH, name="tokens")(inputs)
    x = x + layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.EinsumDense(
        "abc,cde->abde",
        output_shape=(None, 2, 5),
        bias_axes="de",
        name="einsum",
    )(x)
    x = layers.Reshape((LENGTH, 10))(x)
    x = layers.Dense(7, "relu", name="odd_dense")(x)
    return keras.Model(inputs, layers.Dense(6, name="dense")(x))


def data():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (5, LENGTH))
    return x, rng.standard_normal((5, LENGTH, 6)).astype("float32")


def make_quantized(mode):
    model = make_model()
    model.quantize(mode)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def predicted(mode, model):
    return model.predict(data()[0], batch_size=4, verbose=0)


def trained(mode, model):
    x, y = data()
    history = model.fit(x, y, batch_size=3, epochs=2, verbose=0)
    return history.history, predicted(mode, model)


def check(program, mode, make, shape, layout, tolerance=1e-5):
    expected = parity.run(lambda m: program(mode, m), make)
    distribution = parity.model_parallel(shape, LAYOUTS[layout])
    actual = parity.run(lambda m: program(mode, m), make, distribution)
    parity.assert_equal_on_all(f"{mode}, {layout}", actual, expected, tolerance)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_whole_numbers(mode, layout, shape):
    check(predicted, mode, lambda: make_quantized(mode), shape, layout)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
@pytest.mark.parametrize("layout", ["outputs", "inputs", "everything"])
def test_float8(layout, shape):
    """Trained: scales and histories are overwritten by their gradients.

    Another order of sums may round an entry to the next of eight bits.
    """
    mode = "float8"
    check(trained, mode, lambda: make_quantized(mode), shape, layout, 5e-3)


def test_a_quantizer_of_all_rows():
    """One scale for all entries is made of the global batch."""

    def make():
        model = keras.Sequential([keras.Input((6,)), layers.Dense(4)])
        config = keras.quantizers.Int8QuantizationConfig(
            activation_quantizer=keras.quantizers.AbsMaxQuantizer()
        )
        model.quantize("int8", config=config)
        return model

    def program(model):
        x = np.random.default_rng(1).standard_normal((5, 6))
        return model.predict(x, verbose=0)

    expected = parity.run(program, make)
    distribution = keras.distribution.DataParallel()
    actual = parity.run(program, make, distribution)
    parity.assert_equal_on_all("DataParallel", actual, expected)
