"""Models whose steps are written by their user."""

import torch

import keras
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from integration_tests.guides.guide import uniform
from keras import layers
from keras import ops


def build(model_class, outputs=1, activation=None):
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, "tanh", name="hidden")(inputs)
    return model_class(
        inputs, layers.Dense(outputs, activation, name="out")(hidden)
    )


class PlainStep(keras.Model):
    """The whole step by hand, with what was compiled."""

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        loss.backward()
        trained = list(self.trainable_weights)
        gradients = [v.value.grad for v in trained]
        with torch.no_grad():
            self.optimizer.apply(gradients, trained)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {m.name: m.result() for m in self.metrics}


@program
def plain_step():
    model = build(PlainStep)
    model.compile(sgd(), "mse", metrics=["mae"])
    x, y = normal(11, 6), normal(11, 1, seed=1)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history,
        model,
        evaluated=model.evaluate(x, y, batch_size=4, verbose=0),
        predicted=model.predict(x, batch_size=4, verbose=0),
    )


class OwnTrackers(keras.Model):
    """Nothing is compiled but the optimizer; trackers are the model's own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.error_tracker = keras.metrics.MeanAbsoluteError(name="error")
        self.largest_tracker = keras.metrics.Mean(name="largest")

    @property
    def metrics(self):
        return [self.loss_tracker, self.error_tracker, self.largest_tracker]

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = ops.mean(keras.losses.mean_squared_error(y, y_pred))
        loss.backward()
        gradients = [v.value.grad for v in self.trainable_weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_weights)
        self.loss_tracker.update_state(loss)
        self.error_tracker.update_state(y, y_pred)
        self.largest_tracker.update_state(ops.max(ops.abs(y - y_pred)))
        return {m.name: m.result() for m in self.metrics}


@program
def own_trackers():
    model = build(OwnTrackers)
    model.compile(optimizer=sgd(0.1))
    history = model.fit(
        normal(7, 6), normal(7, 1, seed=1), batch_size=5, epochs=3, verbose=0
    )
    return report(history, model)


class WeightedStep(keras.Model):
    """Data with and without weights."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(
            y=y, y_pred=y_pred, sample_weight=sample_weight
        )
        loss.backward()
        gradients = [v.value.grad for v in self.trainable_weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_weights)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred, sample_weight=sample_weight)
        logs = {m.name: m.result() for m in self.metrics}
        if sample_weight is not None:
            logs["weight"] = ops.sum(sample_weight)
        return logs


@program
def weighted_step():
    model = build(WeightedStep, 3, "softmax")
    loss = keras.losses.SparseCategoricalCrossentropy()
    model.compile(sgd(0.2), loss, weighted_metrics=["accuracy"])
    x, y = normal(9, 6), integers(3, 9)
    by_row = model.fit(
        x, y, sample_weight=uniform(9, high=3.0), batch_size=4, verbose=0
    )
    by_class = model.fit(
        x, y, class_weight={0: 0.5, 1: 2.0, 2: 1.0}, batch_size=4, verbose=0
    )
    plain = model.fit(x, y, batch_size=4, verbose=0)
    return report(
        plain, model, by_row=by_row.history, by_class=by_class.history
    )


class SuperStep(keras.Model):
    """Keras's step, with something before and after."""

    steps = 0

    def train_step(self, data):
        x, y = data
        self.steps += 1
        centred = x - ops.mean(x, axis=0, keepdims=True)
        logs = super().train_step((centred, y + 0.1 * self.steps))
        norm = ops.sqrt(
            sum(ops.sum(ops.square(v)) for v in self.trainable_variables)
        )
        return {**logs, "norm": float(norm), "steps": self.steps}


@program
def super_step():
    model = build(SuperStep)
    model.compile(sgd(), "mse", metrics=["mse"])
    history = model.fit(
        normal(7, 6), normal(7, 1, seed=1), batch_size=4, epochs=2, verbose=0
    )
    return report(history, model, steps=model.steps)


class OwnTestAndPredict(keras.Model):
    """Steps of `evaluate` and `predict`."""

    def test_step(self, data):
        x, y = data
        y_pred = self(x, training=False)
        error = ops.sqrt(ops.mean(ops.square(y - y_pred)))
        self.compute_loss(y=y, y_pred=y_pred)
        return {"root": error, "rows": x.shape[0], "first": y_pred[0, 0]}

    def predict_step(self, data):
        x = data[0] if isinstance(data, tuple) else data
        y = self(x, training=False)
        order = ops.argsort(y[:, 0])
        return {
            "outputs": y,
            "share": y / ops.sum(ops.abs(y)),
            "sorted": ops.take(y, order, axis=0),
            "centre": ops.mean(y, axis=0),
        }


@program
def own_test_and_predict_steps():
    model = build(OwnTestAndPredict, 2)
    model.compile(sgd(), "mse")
    x, y = normal(9, 6), normal(9, 2, seed=1)
    history = model.fit(
        x, y, batch_size=4, validation_data=(x[:5], y[:5]), verbose=0
    )
    return report(
        history,
        model,
        evaluated=model.evaluate(x, y, batch_size=4, verbose=0),
        predicted=model.predict(x, batch_size=4, verbose=0),
    )


class OwnComputing(keras.Model):
    """`compute_loss` and `compute_metrics` by hand."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spread = keras.metrics.Mean(name="spread")

    @property
    def metrics(self):
        return [*super().metrics, self.spread]

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        n = ops.shape(y)[0]
        errors = ops.sum(ops.square(y - y_pred), axis=-1)
        hardest = ops.top_k(errors, max(1, n // 2))[0]
        self.spread.update_state(ops.max(errors) - ops.min(errors))
        return ops.mean(hardest) + 0.01 * ops.sum(errors) / n

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        logs["bias"] = ops.mean(y_pred - y)
        return logs


@program
def own_compute_loss_and_metrics():
    model = build(OwnComputing, 2)
    model.compile(sgd(), metrics=["mae"])
    x, y = normal(11, 6), normal(11, 2, seed=1)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history,
        model,
        evaluated=model.evaluate(x, y, batch_size=5, verbose=0),
    )
