"""What a program reads of metrics between steps is that of one device."""

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import callbacks
from keras import layers
from keras import metrics
from keras import ops

pytestmark = [pytest.mark.world(4), pytest.mark.limit(60)]

# Batches of 5, 5 and 1: of the last, all data shards but one have no row.
ROWS, BATCH, FEATURES = 11, 5, 3


def data():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((ROWS, FEATURES)).astype("float32")
    return x, rng.integers(0, 2, (ROWS, 1)).astype("float32")


class Spread(metrics.Metric):
    """States that are aggregated in each way, and some that never change."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.total = self.add_variable((2,), "zeros", name="total")
        self.scale = self.add_variable(
            (), lambda shape, dtype: ops.full(shape, 3.0, dtype), name="scale"
        )
        self.mean = self.add_variable((), "zeros", None, "mean", "mean")
        self.batches = self.add_variable(
            (), "zeros", "int32", "only_first_replica", "batches"
        )
        self.offset = keras.Variable(0.5, trainable=False, name="offset")

    def update_state(self, y_true, y_pred, sample_weight=None):
        y = (y_pred + self.offset) * self.scale
        self.total.assign_add(ops.stack([ops.sum(y), ops.sum(y**2)]))
        self.mean.assign(0.5 * self.mean + ops.mean(y))
        self.batches.assign_add(1)

    def reset_state(self):
        for v in (self.total, self.mean, self.batches):
            v.assign(ops.zeros(v.shape, v.dtype))

    def result(self):
        return {
            "spread_total": self.total[1] - self.total[0],
            "spread_mean": self.mean,
            "spread_batches": self.batches,
        }


class Reported(layers.Layer):
    """Reports to a metric of its own, when it predicts too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = metrics.Sum(name="seen")

    def call(self, x):
        self.seen.update_state(x)
        return x


def make_model():
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(4, "tanh", name="up"),
            layers.Dense(1, "sigmoid", name="down"),
            Reported(),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.2),
        "binary_crossentropy",
        metrics=[
            "mae",
            metrics.AUC(num_thresholds=9),
            metrics.MeanIoU(2, sparse_y_pred=True, name="iou"),
            Spread(name="spread"),
        ],
    )
    return model


def state_of(model):
    """Everything that a program can read of a model's metrics."""
    return {
        "results": [
            keras.tree.map_structure(ops.convert_to_numpy, m.result())
            for m in model.metrics
        ],
        "logs": keras.tree.map_structure(
            ops.convert_to_numpy, model.get_metrics_result()
        ),
        "variables": [np.array(v) for v in model.metrics_variables],
    }


class Reader(callbacks.Callback):
    """Reads all metrics wherever a callback can, and calls `act` there."""

    def __init__(self, act=None):
        super().__init__()
        self.act = act or (lambda model, epoch, batch: None)
        self.said = []
        self.epoch = None
        self.is_acting = False

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.read()

    def on_train_batch_begin(self, batch, logs=None):
        self.read()

    def on_train_batch_end(self, batch, logs=None):
        self.read(logs)
        self.act(self.model, self.epoch, batch)
        self.read()

    def on_test_batch_end(self, batch, logs=None):
        self.read(logs)

    def on_test_end(self, logs=None):
        self.read(logs)

    def on_epoch_end(self, epoch, logs=None):
        self.read(logs)

    def read(self, logs=None):
        logs = keras.tree.map_structure(ops.convert_to_numpy, logs or {})
        self.said.append((logs, state_of(self.model)))


def fit(model, act=None, epochs=2, **kwargs):
    x, y = data()
    reader = Reader(act)
    history = model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        callbacks=[reader],
        verbose=0,
        **kwargs,
    )
    return history.history, reader.said


def validated(model):
    x, y = data()
    return fit(model, validation_data=(x[:7], y[:7]))


def changed_in_an_epoch(model):
    def act(model, epoch, batch):
        if (epoch, batch) == (0, 1):
            model.reset_metrics()
        if (epoch, batch) == (1, 0):
            for v in model.metrics_variables:
                v.assign(v + ops.cast(2, v.dtype))

    return fit(model, act)


def evaluated_in_an_epoch(model):
    x, y = data()
    logs = []

    def act(model, epoch, batch):
        if batch == 1:
            logs.append(
                model.evaluate(x[:7], y[:7], 4, verbose=0, return_dict=True)
            )

    return fit(model, act), logs


def alternating(model):
    x, y = data()
    said = []
    for i in range(3):
        rows = slice(3 * i, 3 * i + 3 - i)
        for step in (model.train_on_batch, model.test_on_batch):
            said.append((step(x[rows], y[rows]), state_of(model)))
        said.append((model.evaluate(x, y, 4, verbose=0), state_of(model)))
        model.predict(x, 4, verbose=0)
        said.append(((), state_of(model)))
        said.append(fit(model, epochs=1))
    return said


PROGRAMS = [validated, changed_in_an_epoch, evaluated_in_an_epoch, alternating]


@pytest.mark.parametrize("program", PROGRAMS)
def test_between_steps(program):
    expected = parity.run(program, make_model)
    layouts = {
        ".*up/kernel": (None, "model"),
        ".*down/kernel": ("model", None),
        # A state of a metric.
        "spread/total": ("model",),
    }
    distributions = {
        "data": keras.distribution.DataParallel(),
        "both": parity.model_parallel((2, 2), layouts),
    }
    for name, distribution in distributions.items():
        actual = parity.run(program, make_model, distribution)
        parity.assert_equal_on_all(name, actual, expected)


def test_by_hand(rank):
    """Outside of steps, nobody but the program writes into a metric."""
    x, y = data()
    with keras.distribution.DataParallel().scope():
        model = make_model()
        model.evaluate(x, y, BATCH, verbose=0)
        metric = metrics.MeanAbsoluteError()
        for m in (metric, model.metrics[1].metrics[0]):
            m.reset_state()
            m.update_state(y[rank], [0.25])
            assert float(m.result()) == abs(float(y[rank, 0]) - 0.25)


def test_nothing_is_rounded(rank, world_size):
    """What a shard has counted is not rounded by going in and out."""

    class Tracked(keras.Model):
        def test_step(self, data):
            self.tracker.update_state(np.float32(0.1 + rank))
            return {}

    with keras.distribution.DataParallel().scope():
        inputs = keras.Input((FEATURES,))
        model = Tracked(inputs, inputs)
        model.tracker = metrics.Sum(name="tracker")
        model.tracker.total.assign(0.3)
        model.compile()
        x = np.zeros((world_size, FEATURES), "float32")
        model.make_test_function()
        for _ in range(50):
            model.test_function([(x,)])
        wholes = everyone.gather(float(model.tracker.result()))
    # Each shard goes on from 0.3, which counts once.
    start, parts = np.float32(0.3), []
    for r in range(world_size):
        part = start
        for _ in range(50):
            part += np.float32(0.1 + r) * np.float32(1 / world_size)
        parts.append(float(part))
    total = sum(parts) - (world_size - 1) * float(start)
    assert wholes == [np.float32(total)] * world_size


class Outer(keras.Model):
    """Trains another model within its own step."""

    def train_step(self, data):
        logs = super().train_step(data)
        x, y = data
        before = self.inner.predict_on_batch(x)
        inner = self.inner.train_on_batch(x, y - ops.convert_to_tensor(before))
        return {**logs, "inner": inner[0], "inner_mae": inner[1]}


def test_a_step_within_a_step(world_size):
    def make_model():
        inputs = keras.Input((FEATURES,))
        model = Outer(inputs, layers.Dense(1)(inputs))
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
        model.inner = keras.Sequential([inputs, layers.Dense(1)])
        model.inner.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
        return model

    def program(model):
        history, said = fit(model)
        return history, state_of(model.inner), model.inner.get_weights()

    parity.assert_equal_on_all(
        "DataParallel",
        parity.run(program, make_model, keras.distribution.DataParallel()),
        parity.run(program, make_model),
    )
