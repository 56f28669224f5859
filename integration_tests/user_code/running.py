"""Tiny models around user code, and what a program of them gives."""

import collections

import numpy as np
import torch

import keras
from integration_tests.harness import parity
from keras import layers
from keras import ops

FEATURES, UNITS, CLASSES, TIME = 4, 6, 3, 4
# By the number of rows: of the last batches, data shards have uneven rows,
# or none. TIME is the number of rows of the first batch of 7.
BATCH = {1: 4, 7: 4, 8: 4, 22: 16}
LEARNING_RATE = 0.1

_noted = []


def note(value):
    """Adds a number or an array to what the program that runs now gives."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    _noted.append(np.array(value, "float64"))


def normal(rows, *shape, seed=2):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, *shape)).astype("float32")


def class_ids(rows, *shape, classes=CLASSES):
    return np.random.default_rng(3).integers(0, classes, (rows, *shape))


def compiled(model, loss="mse", **kwargs):
    model.compile(keras.optimizers.SGD(LEARNING_RATE), loss=loss, **kwargs)
    return model


def train(model, x, y, batch_size, epochs=1, **kwargs):
    """What a fit, an evaluation and a prediction say."""
    arguments = {"batch_size": batch_size, "verbose": 0}
    history = model.fit(
        x, y, epochs=epochs, shuffle=False, **arguments, **kwargs
    )
    kwargs = {k: v for k, v in kwargs.items() if k == "sample_weight"}
    evaluated = model.evaluate(x, y, return_dict=True, **arguments, **kwargs)
    return history.history, evaluated, model.predict(x, **arguments)


def program(make_model, x, y, said=train, **kwargs):
    """A function of a distribution, or None, that gives nested numbers."""
    rows = len(x)

    def run(distribution=None):
        def use(model):
            return said(model, x, y, batch_size=BATCH[rows], **kwargs)

        _noted.clear()
        given = parity.run_here(use, make_model, distribution)
        return {**given, "noted": list(_noted)}

    return run


def up_and_out(middle=None, model=keras.Model, activation=None, **kwargs):
    """A model of two layers, and user code between them.

    Args:
        middle: takes and gives a symbolic tensor.
    """
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(UNITS, "tanh", name="up")(inputs)
    if middle is not None:
        x = middle(x)
    x = layers.Dense(CLASSES, activation, name="out")(x)
    return model(inputs, x, **kwargs)


def of_loss(loss, rows, **kwargs):
    """Of a function of targets and predictions."""
    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)
    return program(lambda: compiled(up_and_out(), loss), x, y, **kwargs)


def of_loss_object(make_loss, rows):
    """Of a function that makes a loss."""
    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)
    weights = np.random.default_rng(5).uniform(0.5, 2.0, rows)
    return program(
        lambda: compiled(up_and_out(), make_loss()), x, y, sample_weight=weights
    )


def of_unweighted_loss_object(make_loss, rows):
    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)
    return program(lambda: compiled(up_and_out(), make_loss()), x, y)


def of_class_loss(loss, rows):
    """Of a function of class ids and logits."""
    x, y = normal(rows, FEATURES), class_ids(rows, 1)
    return program(lambda: compiled(up_and_out(), loss), x, y)


class Own(layers.Layer):
    """A layer of a function, with a weight."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function
        self.calls = 0
        self.seeds = keras.random.SeedGenerator(5)

    def build(self, input_shape):
        self.scale = self.add_weight((input_shape[-1],), "ones", name="scale")
        self.state = self.add_weight(
            (input_shape[-1],), "zeros", trainable=False, name="state"
        )
        self.built = True

    def call(self, x):
        self.calls += 1
        return self.function(self, x * self.scale)

    def compute_output_shape(self, input_shape):
        """That of the input: a symbolic call runs no user code."""
        return input_shape


def of_layer_function(function, rows):
    """Of a function of a layer and its input, `(rows, UNITS)`."""

    def make_model():
        return compiled(up_and_out(Own(function, name="own")))

    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)
    return program(make_model, x, y)


def of_layer(make_layer, rows):
    """Of a function that makes a layer for `(rows, UNITS)`."""
    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)
    return program(lambda: compiled(up_and_out(make_layer())), x, y)


def of_sequence_layer(make_layer, rows, time=TIME):
    """Of a function that makes a layer for `(rows, time, UNITS)`."""

    def make_model():
        inputs = keras.Input((time, FEATURES))
        x = layers.Dense(UNITS, "tanh", name="up")(inputs)
        x = layers.Flatten()(make_layer()(x))
        return compiled(
            keras.Model(inputs, layers.Dense(CLASSES, name="out")(x))
        )

    x, y = normal(rows, time, FEATURES), normal(rows, CLASSES, seed=4)
    return program(make_model, x, y)


def of_short_sequence_layer(make_layer, rows):
    """As many steps as a data shard has rows, of the first batch of 7."""
    return of_sequence_layer(make_layer, rows, TIME // 2)


def of_model(make_outputs, rows):
    """Of a function from a symbolic input, `(rows, FEATURES)`, to outputs."""

    def make_model():
        inputs = keras.Input((FEATURES,))
        return compiled(keras.Model(inputs, make_outputs(inputs)))

    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)
    return program(make_model, x, y)


def of_model_class(model, rows):
    """Of a class of models, for `(rows, FEATURES)`."""
    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)
    return program(lambda: compiled(model()), x, y)


def of_metric(make_metric, rows):
    """Of a function that makes a metric."""

    def make_model():
        metric = make_metric()
        return compiled(up_and_out(), metrics=[metric])

    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)
    return program(make_model, x, y, epochs=2)


def of_weighted_metric(make_metric, rows):
    """Of a function that makes a metric that is handed weights."""

    def make_model():
        return compiled(up_and_out(), weighted_metrics=[make_metric()])

    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)
    weights = np.random.default_rng(5).uniform(0.5, 2.0, rows)
    return program(make_model, x, y, sample_weight=weights)


def of_callback(make_callback, rows):
    """Of a function that makes a callback."""
    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)

    def said(model, x, y, **kwargs):
        callbacks = [make_callback()]
        validation = (x[: (len(x) + 1) // 2], y[: (len(x) + 1) // 2])
        kwargs |= {"callbacks": callbacks, "validation_data": validation}
        return train(model, x, y, epochs=3, **kwargs)

    return program(lambda: compiled(up_and_out(), metrics=["mae"]), x, y, said)


def of_train_step(step, rows):
    """Of a function of a model and a batch: `step(model, x, y)`."""

    class Stepping(keras.Model):
        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            return step(self, x, y)

    return of_steps(Stepping, rows)


def of_steps(model, rows):
    """Of a class of functional models with steps of its own."""

    def make_model():
        made = up_and_out(model=model)
        # What a step keeps from one batch to the next. Keras tracks what a
        # dict has.
        made.kept = collections.UserDict()
        return compiled(made, metrics=["mae"])

    x, y = normal(rows, FEATURES), normal(rows, CLASSES, seed=4)
    return program(make_model, x, y, epochs=2)


def descend(model, loss):
    """A step of the model's optimizer, as the guides for torch have it."""
    model.zero_grad()
    loss.backward()
    weights = list(model.trainable_weights)
    gradients = [v.value.grad for v in weights]
    with torch.no_grad():
        model.optimizer.apply(gradients, weights)


def squares(y, p):
    """The squared error of each entry."""
    return ops.square(y - p)
