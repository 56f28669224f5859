"""Habits of programs around a model: threads, sessions, reads and writes of
weights in steps and layers. All give the numbers of one device."""

import threading

import numpy as np
import pytest
import torch

import keras
from integration_tests.harness import parity
from keras import layers
from keras import ops

pytestmark = pytest.mark.world(2)

MESHES = {
    "data": ((2, 1), {}),
    "fsdp": ((2, 1), {".*dense.*/kernel": ("batch", None)}),
    "tensor": ((1, 2), {".*dense.*/kernel": (None, "model")}),
}


def data(rows=10):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 6)).astype("float32")
    return x, x[:, :3] * 2 - 1


def make_model(kind=keras.Sequential, loss="mse"):
    model = kind(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh", name="dense_1"),
            layers.Dense(3, name="dense_2"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


def fit(model, epochs=2):
    x, y = data()
    history = model.fit(x, y, batch_size=4, epochs=epochs, verbose=0)
    return history.history["loss"]


class Sharpness(keras.Sequential):
    """Steps to where the loss is largest nearby, and takes the gradient there
    (Foret et al., 2020)."""

    def train_step(self, data):
        x, y = data
        weights = self.trainable_weights
        self.zero_grad()
        loss = self.compute_loss(x, y, self(x, training=True))
        loss.backward()
        gradients = [w.value.grad for w in weights]
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        moves = [0.05 * g / norm for g in gradients]
        with torch.no_grad():
            for w, move in zip(weights, moves):
                w.assign(w.value + move)
        self.zero_grad()
        self.compute_loss(x, y, self(x, training=True)).backward()
        gradients = [w.value.grad for w in weights]
        with torch.no_grad():
            for w, move in zip(weights, moves):
                w.assign(w.value - move)
            self.optimizer.apply(gradients, weights)
        return {"loss": loss}


class Reading(layers.Layer):
    """Asks for numbers of its activations and of its weights."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(6, name="dense_inner")

    def call(self, x):
        y = self.inner(x)
        mean = float(y.detach().cpu().numpy().mean())
        total = float(ops.convert_to_numpy(self.inner.kernel).sum())
        return y * (1.0 + mean) + 0.01 * total


def predict_in_a_thread(model):
    fit(model)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(model.predict(data()[0], verbose=0))
    )
    thread.start()
    thread.join()
    return found


def go_on_after_clear_session(model):
    fit(model)
    keras.utils.clear_session()
    return [model.predict(data()[0], verbose=0), fit(model)]


def use_without_distribution(model):
    fit(model)
    previous = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        x = data()[0]
        outputs = ops.convert_to_numpy(model(x))
        return [model.predict(x, verbose=0), outputs, model.get_weights()]
    finally:
        keras.distribution.set_distribution(previous)


def read_in_a_loss(y, y_pred):
    spread = float(y_pred.detach().cpu().numpy().std())
    return ops.mean((y - y_pred) ** 2) * (1.0 + spread)


def make_mixer():
    def mix(x, width):
        return layers.Dense(x.shape[-1])(layers.Dense(width, "gelu")(x))

    inputs = keras.Input((6,))
    # Patches, and what each of them says.
    x = layers.Reshape((3, 2))(inputs)
    x = layers.Dense(4)(x)
    for _ in range(2):
        y = layers.Permute((2, 1))(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Permute((2, 1))(mix(y, 6))])
        x = layers.Add()([x, mix(layers.LayerNormalization()(x), 6)])
    x = layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, layers.Dense(3)(x))
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


def make_reading():
    model = keras.Sequential(
        [keras.Input((6,)), Reading(), layers.Dense(3, name="dense_2")]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


HABITS = {
    "steps to a sharper place": (fit, lambda: make_model(Sharpness)),
    "a thread": (predict_in_a_thread, make_model),
    "clear_session": (go_on_after_clear_session, make_model),
    "no distribution": (use_without_distribution, make_model),
    "a layer that reads": (fit, make_reading),
    "a loss that reads": (fit, lambda: make_model(loss=read_in_a_loss)),
    "a mixer": (fit, make_mixer),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", HABITS)
def test_habit(name, mesh):
    program, make = HABITS[name]
    expected = parity.run(program, make)
    actual = parity.run(program, make, parity.model_parallel(*MESHES[mesh]))
    # Its many layers round more than two do.
    tolerance = 5e-5 if name == "a mixer" else 1e-5
    parity.assert_equal_on_all(f"{name}, {mesh}", actual, expected, tolerance)
