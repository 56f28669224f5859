"""Losses of uneven data shards add up to those of the global batch."""

import numpy as np
import pytest

import keras
from integration_tests.harness import parity
from keras import layers
from keras import losses
from keras import ops

pytestmark = pytest.mark.world(2)

# Of the last batch, one data shard has no row.
ROWS, BATCH, FEATURES, TIME, CLASSES = 8, 7, 4, 5, 3
REDUCTIONS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum")


def rng():
    return np.random.default_rng(2)


def normal(*shape):
    return rng().standard_normal((ROWS, *shape)).astype("float32")


def positive(*shape):
    return rng().uniform(0.1, 1.0, (ROWS, *shape)).astype("float32")


def fit(
    make_outputs,
    y,
    loss="mse",
    x=None,
    epochs=1,
    compiled=None,
    model=keras.Model,
    **kwargs,
):
    """A program that compiles and trains a new model.

    Args:
        make_outputs: takes the symbolic input.
        model: the class of the model.
    """
    x = normal(FEATURES) if x is None else x

    def program(distribution=None):
        def make_model():
            inputs = keras.Input(x.shape[1:])
            made = model(inputs, make_outputs(inputs))
            made.compile(keras.optimizers.SGD(0.1), loss=loss, **compiled or {})
            return made

        def train(model):
            arguments = {"batch_size": BATCH, "verbose": 0, **kwargs}
            history = model.fit(x, y, epochs=epochs, shuffle=False, **arguments)
            arguments.pop("class_weight", None)
            return history.history, model.evaluate(x, y, **arguments)

        return parity.run(train, make_model, distribution)

    return program


def assert_as_alone(programs, distribution=None, tolerance=parity.TOLERANCE):
    """Asserts that each program gives one device's numbers."""
    distribution = distribution or keras.distribution.DataParallel()
    for name, program in programs.items():
        parity.assert_equal_on_all(
            name, program(distribution), program(), tolerance
        )


def dense(activation=None, units=CLASSES, **kwargs):
    return lambda x: layers.Dense(units, activation, name="out", **kwargs)(x)


CLASS = {
    "numbers": (dense("softplus"), positive(CLASSES)),
    "classes": (
        dense("softmax"),
        np.eye(CLASSES, dtype="float32")[rng().integers(0, CLASSES, ROWS)],
    ),
    "ids": (dense("softmax"), rng().integers(0, CLASSES, ROWS)),
    "signs": (dense("tanh"), np.sign(normal(CLASSES))),
    "yes or no": (dense("sigmoid"), (normal(CLASSES) > 0).astype("float32")),
    "unit vectors": (
        lambda x: layers.UnitNormalization()(dense()(x)),
        rng().integers(0, 2, ROWS).astype("int32"),
    ),
    "sequences": (
        lambda x: layers.Reshape((TIME, CLASSES))(dense(units=15)(x)),
        rng().integers(1, CLASSES, (ROWS, 2)).astype("int32"),
    ),
}
LOSSES = {
    "MeanAbsoluteError": "numbers",
    "MeanAbsolutePercentageError": "numbers",
    "MeanSquaredError": "numbers",
    "MeanSquaredLogarithmicError": "numbers",
    "Huber": "numbers",
    "LogCosh": "numbers",
    "Poisson": "numbers",
    "KLDivergence": "numbers",
    "CosineSimilarity": "numbers",
    "CategoricalCrossentropy": "classes",
    "CategoricalFocalCrossentropy": "classes",
    "CategoricalGeneralizedCrossEntropy": "ids",
    "CategoricalHinge": "classes",
    "SparseCategoricalCrossentropy": "ids",
    "Hinge": "signs",
    "SquaredHinge": "signs",
    "BinaryCrossentropy": "yes or no",
    "BinaryFocalCrossentropy": "yes or no",
    "Dice": "yes or no",
    "Tversky": "yes or no",
    "Circle": "unit vectors",
    "CTC": "sequences",
}


def test_every_loss():
    every = {k for k, v in vars(losses).items() if isinstance(v, type)}
    assert every - set(LOSSES) == {"Loss"}  # the base class
    programs = {
        name: fit(*CLASS[kind], getattr(losses, name)())
        for name, kind in LOSSES.items()
    }
    programs["ignored class"] = fit(
        *CLASS["ids"], losses.SparseCategoricalCrossentropy(ignore_class=1)
    )
    programs["Dice of rows"] = fit(*CLASS["yes or no"], losses.Dice(axis=1))
    programs["Dice of classes"] = fit(*CLASS["yes or no"], losses.Dice(axis=0))
    programs["Tversky, uneven"] = fit(
        *CLASS["yes or no"], losses.Tversky(alpha=0.2, beta=0.9)
    )
    assert_as_alone(programs)


def padded_sequences():
    """Sequences of 0 to 5 steps, long ones on the first data shard."""
    x = normal(TIME, FEATURES)
    for row, length in enumerate([5, 4, 5, 3, 1, 0, 2, 3]):
        x[row, length:] = 0.0
    return x


def masked(x):
    x = layers.Masking()(x)
    return layers.TimeDistributed(layers.Dense(2, name="out"))(x)


def test_reductions():
    weights = rng().uniform(0.0, 3.0, ROWS).astype("float32")
    of_steps = rng().uniform(0.0, 3.0, (ROWS, TIME)).astype("float32")
    programs = {}
    for reduction in REDUCTIONS:
        loss = losses.MeanSquaredError(reduction=reduction)
        for of_rows in (None, weights):
            programs[reduction, of_rows is None] = fit(
                dense(), normal(CLASSES), loss, sample_weight=of_rows
            )
        for of_entries in (None, of_steps):
            programs[reduction, of_entries is None, "mask"] = fit(
                masked,
                normal(TIME, 2),
                loss,
                padded_sequences(),
                sample_weight=of_entries,
                compiled={"metrics": ["mae"], "weighted_metrics": ["mse"]},
            )
    assert_as_alone(programs)


class OfRows(losses.Loss):
    def call(self, y_true, y_pred):
        return ops.sum(ops.abs(y_true - y_pred), axis=-1)


class Penalised(layers.Layer):
    """Adds a mean over rows, and a number that knows nothing of them."""

    def build(self, input_shape):
        self.scale = self.add_weight((input_shape[-1],), "ones")

    def call(self, x):
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        self.add_loss(0.3 * ops.sum(ops.square(self.scale)))
        return x * self.scale


def regularised(x):
    x = layers.Dense(
        6,
        kernel_regularizer=keras.regularizers.L1L2(0.1, 0.2),
        bias_regularizer="l2",
        activity_regularizer=keras.regularizers.L2(0.3),
        name="up",
    )(x)
    x = layers.ActivityRegularization(l1=0.1)(x)
    return layers.Dense(CLASSES, activity_regularizer="l1", name="out")(
        Penalised(name="penalised")(x)
    )


def test_what_adds_to_the_loss():
    by_class = {0: 0.5, 1: 2.0, 2: 1.0}
    weights = rng().uniform(0.0, 3.0, ROWS).astype("float32")
    y = normal(CLASSES)
    programs = {
        "regularised": fit(regularised, y),
        "function of rows": fit(
            dense(), y, lambda y, p: ops.max(ops.abs(y - p), axis=-1)
        ),
        "function of the batch": fit(
            dense(), y, lambda y, p: ops.mean(ops.abs(y - p))
        ),
        "loss of rows": fit(dense(), y, OfRows(), sample_weight=weights),
        "class weights": fit(
            *CLASS["classes"],
            "categorical_crossentropy",
            class_weight=by_class,
        ),
    }
    assert_as_alone(programs)
    assert_as_alone(
        {"regularised": programs["regularised"]},
        parity.model_parallel(
            (1, 2),
            {
                ".*up/kernel": (None, "model"),
                ".*up/bias": ("model",),
                ".*penalised/.*": ("model",),
                ".*out/kernel": ("model", None),
            },
        ),
    )


def two_outputs(x):
    x = layers.Dense(6, "tanh", name="up")(x)
    return {
        "a": layers.Dense(CLASSES, name="a")(x),
        "b": layers.Dense(1, "sigmoid", name="b")(x),
    }


def test_several_outputs():
    y = {"a": normal(CLASSES), "b": (normal(1) > 0).astype("float32")}
    weights = {"a": positive(), "b": positive()[::-1].copy()}
    compiled = {
        "loss_weights": {"a": 0.3, "b": 2.0},
        "metrics": {"a": ["mae"], "b": ["accuracy"]},
        "weighted_metrics": {"a": ["mse"], "b": ["auc"]},
    }
    loss = {
        "a": losses.MeanSquaredError(reduction="sum"),
        "b": losses.BinaryCrossentropy(),
    }
    assert_as_alone(
        {
            "one loss": fit(two_outputs, y, "mse"),
            "two losses": fit(
                two_outputs, y, loss, sample_weight=weights, compiled=compiled
            ),
        }
    )
