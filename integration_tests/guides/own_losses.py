"""Losses, metrics and callbacks of the user's own."""

import numpy as np

import keras
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from keras import layers
from keras import ops


def network(outputs, activation=None):
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, "tanh"),
            layers.Dense(outputs, activation),
        ]
    )


class Focused(keras.losses.Loss):
    """Crossentropy that is weighed by the share of a class in the batch."""

    def __init__(self, gamma=2.0, **kwargs):
        super().__init__(**kwargs)
        self.gamma = gamma

    def call(self, y, p):
        share = ops.mean(y, axis=0, keepdims=True)
        p = ops.clip(p, 1e-4, 1 - 1e-4)
        weights = (1.0 - share) * ops.power(1 - p, self.gamma)
        return -ops.sum(weights * y * ops.log(p), axis=-1)


class Concordance(keras.losses.Loss):
    """Agreement of two variables: one number for a batch."""

    def __init__(self):
        super().__init__(reduction=None, name="concordance")

    def call(self, y, p):
        y_mean, p_mean = ops.mean(y), ops.mean(p)
        together = ops.mean((y - y_mean) * (p - p_mean))
        apart = ops.var(y) + ops.var(p) + ops.square(y_mean - p_mean)
        return 1.0 - 2.0 * together / (apart + 0.1)


@program
def losses_of_classes():
    """Loss subclasses, of every reduction, one after the other."""
    x = normal(11, 5)
    classes = keras.utils.to_categorical(integers(3, 11), 3)
    said = {}
    model = network(3, "softmax")
    for reduction in ("sum_over_batch_size", "sum", "mean"):
        model.compile(sgd(0.05), Focused(reduction=reduction))
        said[reduction] = model.fit(x, classes, batch_size=4, verbose=0).history
    other = network(1)
    other.compile(sgd(0.05), Concordance())
    history = other.fit(
        x, normal(11, 1, seed=1), batch_size=4, epochs=2, verbose=0
    )
    return report(history, model, other, said=said)


@program
def quantile_regression():
    """A closure for each quantile, and a penalty where they cross."""
    quantiles = (0.1, 0.5, 0.9)

    def pinball(levels):
        levels = ops.convert_to_tensor(np.array(levels, "float32"))

        def loss(y, p):
            error = y - p
            losses = ops.maximum(levels * error, (levels - 1) * error)
            crossed = ops.relu(p[:, :-1] - p[:, 1:])
            return ops.mean(losses) + ops.max(crossed)

        return loss

    def coverage(y, p):
        inside = ops.logical_and(y[:, 0] > p[:, 0], y[:, 0] < p[:, -1])
        return ops.mean(ops.cast(inside, "float32"))

    model = network(len(quantiles))
    model.compile(sgd(0.2), pinball(quantiles), metrics=[coverage])
    x, y = normal(11, 5), normal(11, 1, seed=1)
    history = model.fit(x, y, batch_size=4, epochs=3, verbose=0)
    return report(
        history, model, evaluated=model.evaluate(x, y, batch_size=5, verbose=0)
    )


@program
def evidential_regression():
    """Four parameters of a distribution, and its likelihood."""
    inputs = keras.Input((5,))
    x = layers.Dense(6, "tanh")(inputs)
    x = layers.Dense(4)(x)
    mean, others = x[:, :1], ops.softplus(x[:, 1:])
    others = others + ops.convert_to_tensor([[0.1, 1.1, 0.1]])
    model = keras.Model(inputs, layers.Concatenate()([mean, others]))

    def evidential(y, p):
        mean, nu, alpha, beta = ops.split(p, 4, axis=-1)
        omega = 2 * beta * (1 + nu)
        likelihood = (
            0.5 * ops.log(np.pi / nu)
            - alpha * ops.log(omega)
            + (alpha + 0.5) * ops.log(nu * ops.square(y - mean) + omega)
        )
        penalty = ops.abs(y - mean) * (2 * nu + alpha)
        return ops.mean(likelihood) + 0.05 * ops.mean(penalty)

    model.compile(sgd(0.05), evidential)
    x, y = normal(11, 5), normal(11, 1, seed=1)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, predicted=model.predict(x, batch_size=4, verbose=0)
    )


class TruePositives(keras.metrics.Metric):
    """A sum in a variable."""

    def __init__(self, name="true_positives", **kwargs):
        super().__init__(name=name, **kwargs)
        self.true = self.add_variable(
            shape=(), initializer="zeros", name="true"
        )

    def update_state(self, y, p, sample_weight=None):
        found = ops.logical_and(ops.equal(y, 1.0), p > 0.5)
        found = ops.cast(found, self.dtype)
        if sample_weight is not None:
            found = found * ops.reshape(sample_weight, (-1, 1))
        self.true.assign_add(ops.sum(found))

    def result(self):
        return self.true

    def reset_state(self):
        self.true.assign(0)


class Extremes(keras.metrics.Metric):
    """Smallest and largest value, and how many batches there were."""

    def __init__(self):
        super().__init__(name="extremes")
        self.low = self.add_variable((), "zeros", name="low")
        self.high = self.add_variable((), "zeros", name="high")
        self.batches = 0

    def update_state(self, y, p, sample_weight=None):
        self.low.assign(ops.minimum(self.low, ops.min(p - y)))
        self.high.assign(ops.maximum(self.high, ops.max(p - y)))
        self.batches += 1

    def result(self):
        return {"range": self.high - self.low, "batches": self.batches}

    def reset_state(self):
        super().reset_state()
        self.batches = 0


def average_precision(targets, scores):
    """As scikit-learn has it, in numpy."""
    targets = targets[np.argsort(-scores, kind="stable")]
    found = np.cumsum(targets)
    return float(np.sum(targets * found / np.arange(1, len(targets) + 1)))


class Precision(keras.metrics.Metric):
    """Keeps all it saw in lists, and sorts it at the end."""

    def __init__(self):
        super().__init__(name="precision")
        self.reset_state()

    def update_state(self, y, p, sample_weight=None):
        self.targets.append(ops.convert_to_numpy(y)[:, 0])
        self.scores.append(ops.convert_to_numpy(p)[:, 0])

    def result(self):
        if not self.targets:
            return 0.0
        targets = np.concatenate(self.targets)
        if not targets.any():
            return 0.0
        scores = np.concatenate(self.scores)
        return average_precision(targets, scores) / targets.sum()

    def reset_state(self):
        self.targets, self.scores = [], []


@program
def own_metrics():
    def correlated(y, p):
        """One number a batch."""
        y, p = y - ops.mean(y), p - ops.mean(p)
        norm = ops.sqrt(ops.sum(y * y) * ops.sum(p * p) + 1e-3)
        return ops.sum(y * p) / norm

    model = network(1, "sigmoid")
    model.compile(
        sgd(0.5),
        "binary_crossentropy",
        metrics=[TruePositives(), Extremes(), Precision(), correlated],
        weighted_metrics=[TruePositives("weighted")],
    )
    x, y = normal(11, 5), integers(2, 11, 1).astype("float32")
    y[:2] = [[0], [1]]
    history = model.fit(
        x,
        y,
        sample_weight=abs(normal(11, seed=3)),
        batch_size=4,
        epochs=2,
        validation_data=(x[:7], y[:7]),
        shuffle=False,
        verbose=0,
    )
    return report(history, model)


class Watch(keras.callbacks.Callback):
    """Reads weights, state of the optimizer and metrics while it trains."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        kernel = self.model.layers[0].kernel
        metric = self.model.metrics[-1].result()
        largest = float(ops.max(kernel))
        norm = float(np.linalg.norm(self.model.get_weights()[0]))
        self.seen.append([float(logs["loss"]), largest, norm])
        self.seen.append([float(v) for v in metric.values()])
        if largest > 1e3:
            self.model.stop_training = True

    def on_epoch_begin(self, epoch, logs=None):
        rate = 0.3 / (1 + epoch)
        self.model.optimizer.learning_rate.assign(rate)


@program
def callbacks():
    """The rate falls on a plateau, training stops, the best are restored."""
    norms = []
    model = network(1)
    model.compile(sgd(0.3), "mse", metrics=["mae"])

    def write(epoch, logs):
        norms.append(float(ops.norm(model.layers[1].kernel)))
        norms.append(float(ops.sum(ops.abs(model.layers[0].kernel))))

    x, y = normal(11, 5), normal(11, 1, seed=1)
    watch = Watch()
    history = model.fit(
        x,
        y,
        batch_size=4,
        epochs=6,
        validation_data=(x[:5], -y[:5]),
        callbacks=[
            watch,
            keras.callbacks.LambdaCallback(on_epoch_end=write),
            keras.callbacks.ReduceLROnPlateau(
                monitor="val_loss", factor=0.5, patience=1, min_delta=1e-3
            ),
            keras.callbacks.EarlyStopping(
                monitor="val_loss", patience=2, restore_best_weights=True
            ),
        ],
        verbose=0,
    )
    rate = float(model.optimizer.learning_rate)
    return report(
        history,
        model,
        seen=watch.seen,
        norms=norms,
        rate=rate,
        epochs=history.epoch,
    )
