"""Layers that a guide about layers would have its reader write."""

import torch

import keras
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from keras import layers
from keras import ops


class LogisticEndpoint(layers.Layer):
    """Computes loss and accuracy out of targets that are an input."""

    def __init__(self, name=None):
        super().__init__(name=name)
        self.loss_function = keras.losses.BinaryCrossentropy(from_logits=True)
        self.accuracy = keras.metrics.BinaryAccuracy(name="accuracy")
        self.rows = keras.metrics.Sum(name="rows")

    def call(self, logits, targets=None, sample_weight=None):
        if targets is not None:
            loss = self.loss_function(targets, logits, sample_weight)
            self.add_loss(loss)
            self.accuracy.update_state(targets, logits, sample_weight)
            self.rows.update_state(ops.shape(logits)[0])
        return ops.softmax(logits)


@program
def logistic_endpoint():
    inputs, targets = keras.Input((4,)), keras.Input((3,))
    weights = keras.Input((1,))
    logits = layers.Dense(3, name="logits")(inputs)
    endpoint = LogisticEndpoint(name="predictions")
    outputs = endpoint(logits, targets, weights)
    model = keras.Model([inputs, targets, weights], outputs)
    model.compile(sgd(0.2))
    x = [
        normal(11, 4),
        integers(2, 11, 3).astype("float32"),
        abs(normal(11, 1, seed=1)),
    ]
    history = model.fit(x, batch_size=4, epochs=2, verbose=0)
    left = float(endpoint.accuracy.result()), float(endpoint.rows.result())
    return report(history, model, left=left)


class ComputeSum(layers.Layer):
    """Adds up all rows that it ever saw, and counts them."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.calls = 0
        self.total = self.add_weight(
            shape=(width,), initializer="zeros", trainable=False, name="total"
        )
        self.seen = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="seen"
        )

    def call(self, x, training=False):
        self.calls += 1
        if training:
            self.total.assign_add(ops.sum(x, axis=0).detach())
            self.seen.assign_add(float(ops.shape(x)[0]))
        return x - self.total / ops.maximum(self.seen, 1.0)


class MovingCovariance(layers.Layer):
    """Whitens by a moving average of the covariance of batches."""

    def build(self, shape):
        width = shape[-1]
        self.covariance = self.add_weight(
            shape=(width, width),
            initializer="identity",
            trainable=False,
            name="covariance",
        )

    def call(self, x, training=False):
        if training:
            centred = x - ops.mean(x, axis=0)
            seen = ops.matmul(ops.transpose(centred), centred) / x.shape[0]
            with torch.no_grad():
                self.covariance.assign(0.7 * self.covariance + 0.3 * seen)
        regular = self.covariance + ops.eye(x.shape[-1])
        return ops.transpose(ops.solve(regular, ops.transpose(x)))


@program
def state_of_layers():
    compute_sum = ComputeSum(5)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, "tanh"),
            compute_sum,
            MovingCovariance(),
            layers.Dense(2),
        ]
    )
    model.compile(sgd(0.1), "mse")
    x, y = normal(11, 4), normal(11, 2, seed=1)
    before = compute_sum.calls
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history,
        model,
        calls=compute_sum.calls - before,
        predicted=model.predict(x, batch_size=4, verbose=0),
    )


class OffDiagonal(keras.regularizers.Regularizer):
    """Columns of a kernel should not look alike."""

    def __call__(self, kernel):
        product = ops.matmul(ops.transpose(kernel), kernel)
        product = product * (1.0 - ops.eye(kernel.shape[1]))
        return 0.05 * ops.sum(ops.abs(product))


class Sparse(keras.regularizers.Regularizer):
    """Mean activations should be what is wanted: over all rows."""

    def __init__(self, wanted):
        self.wanted = wanted

    def __call__(self, x):
        mean = ops.clip(ops.mean(x, axis=0), 1e-3, 1 - 1e-3)
        return 0.1 * ops.sum(
            self.wanted * ops.log(self.wanted / mean)
            + (1 - self.wanted) * ops.log((1 - self.wanted) / (1 - mean))
        )


@program
def regularizers():
    """Of kernels and activations, functions and classes, and constraints."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(
                6,
                "sigmoid",
                kernel_regularizer=OffDiagonal(),
                activity_regularizer=Sparse(0.2),
                bias_regularizer="l1",
            ),
            layers.ActivityRegularization(l1=0.01, l2=0.02),
            layers.Dense(
                5,
                "tanh",
                kernel_regularizer=lambda w: 0.1 * ops.max(ops.abs(w)),
                kernel_constraint=keras.constraints.MaxNorm(0.8),
                activity_regularizer=keras.regularizers.L1L2(0.01, 0.01),
            ),
            layers.Dense(1),
        ]
    )
    model.compile(sgd(0.2), "mse", metrics=["mse"])
    x, y = normal(11, 4), normal(11, 1, seed=1)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history,
        model,
        evaluated=model.evaluate(x, y, batch_size=4, verbose=0),
        losses=[float(loss) for loss in model.losses],
    )


class Antirectifier(layers.Layer):
    """Both signs of centred, normalised rows, and two kernels."""

    def build(self, shape):
        width = shape[-1]
        self.kernel = self.add_weight(
            shape=(width * 2, width), initializer="he_normal", name="kernel"
        )

    def call(self, x):
        x = x - ops.mean(x, axis=-1, keepdims=True)
        x = ops.nn.normalize(x, axis=-1)
        both = ops.concatenate([ops.relu(x), ops.relu(-x)], axis=-1)
        return ops.matmul(both, self.kernel)


@program
def lambdas_and_operations():
    """A functional model with operations in it, and Lambda layers."""
    inputs = keras.Input((4,))
    x = layers.Dense(6, "tanh")(inputs)
    x = x - ops.mean(x, axis=0)
    x = layers.Lambda(lambda t: t / (0.5 + ops.std(t)))(x)
    x = Antirectifier()(x)
    largest = ops.max(ops.abs(x), axis=0, keepdims=True)
    x = x / (1.0 + largest) + ops.flip(ops.cumsum(x, axis=1), axis=1)
    x = layers.Lambda(
        lambda t: ops.concatenate([t, t - t[:1]], axis=-1),
        output_shape=(12,),
    )(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.compile(sgd(0.1), "mse")
    x, y = normal(11, 4), normal(11, 2, seed=1)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, predicted=model.predict(x, batch_size=4, verbose=0)
    )


class Hyper(keras.Model):
    """One network writes the weights of another, for each row or for all."""

    def __init__(self, units=3):
        super().__init__()
        self.units = units
        self.writer = keras.Sequential(
            [layers.Dense(6, "tanh"), layers.Dense(4 * units + units)],
            name="writer",
        )
        self.common = layers.Dense(units, name="common")

    def call(self, x):
        written = 0.3 * self.writer(x)
        kernels = ops.reshape(written[:, : 4 * self.units], (-1, 4, self.units))
        biases = written[:, 4 * self.units :]
        own = ops.einsum("bi,bio->bo", x, kernels) + biases
        # The mean of what was written, for all rows.
        shared = ops.matmul(x, ops.mean(kernels, axis=0))
        return self.common(ops.tanh(own)) + shared


@program
def hypernetwork():
    model = Hyper()
    model.compile(sgd(0.1), "mse", metrics=["mae"])
    x, y = normal(11, 4), normal(11, 3, seed=1)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, predicted=model.predict(x, batch_size=4, verbose=0)
    )


@program
def several_outputs():
    """Losses, weights and metrics by name, on a shared trunk."""
    inputs = keras.Input((4,))
    trunk = layers.Dense(6, "relu", name="trunk")(inputs)
    model = keras.Model(
        inputs,
        {
            "price": layers.Dense(1, name="price")(trunk),
            "kind": layers.Dense(3, name="kind")(trunk),
        },
    )

    def relative(y, p):
        return ops.mean(ops.abs(y - p)) / ops.mean(ops.abs(y))

    model.compile(
        sgd(0.1),
        loss={
            "price": relative,
            "kind": keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="sum"
            ),
        },
        loss_weights={"price": 2.0, "kind": 0.1},
        metrics={"price": ["mae", relative], "kind": ["accuracy"]},
    )
    x = normal(11, 4)
    y = {"price": normal(11, 1, seed=1), "kind": integers(3, 11)}
    weight = {"price": abs(normal(11)), "kind": abs(normal(11, seed=2))}
    history = model.fit(
        x, y, sample_weight=weight, batch_size=4, epochs=2, verbose=0
    )
    return report(
        history,
        model,
        evaluated=model.evaluate(
            x, y, batch_size=4, verbose=0, return_dict=True
        ),
    )
