"""Code of the user's own that reduces rows gives one device's numbers."""

import logging

import pytest
import torch

import keras
from integration_tests.harness import parity
from integration_tests.training.losses_test import CLASSES
from integration_tests.training.losses_test import FEATURES
from integration_tests.training.losses_test import ROWS
from integration_tests.training.losses_test import assert_as_alone
from integration_tests.training.losses_test import dense
from integration_tests.training.losses_test import fit
from integration_tests.training.losses_test import normal
from integration_tests.training.losses_test import rng
from keras import layers
from keras import losses
from keras import ops
from keras.src.losses.losses import LossFunctionWrapper

pytestmark = pytest.mark.world(2)
# As many as a data shard has rows, of the first batch and of the second.
TIME = 4


def root_mean_squared(y, p):
    return ops.sqrt(ops.mean(ops.square(y - p)))


def squares(y, p):
    return ops.sum(ops.square(y - p))


def by_shape(y, p):
    return squares(y, p) / ops.shape(y)[0]


def by_tensor(y, p):
    return squares(y, p) / ops.cast(ops.shape(y)[0], "float32")


def by_inverse(y, p):
    return squares(y, p) * (1.0 / len(y))


def by_numel(y, p):
    return (y - p).abs().sum() / y.numel()


def of_valid(y, p):
    """Of entries that are some, not as many in each data shard."""
    valid = ops.cast(y > 0.3, p.dtype)
    return ops.sum(valid * ops.square(y - p)) / ops.sum(valid)


def picked(y, p):
    """Which entries it takes, shapes do not tell."""
    return torch.mean(torch.square(y[y > 0.3] - p[y > 0.3]))


def contrast(y, p):
    """Each row is compared with all rows."""
    y = ops.normalize(y, axis=-1)
    p = ops.normalize(p, axis=-1)
    logits = ops.matmul(p, ops.transpose(y)) * 3.0
    rows = torch.arange(len(y), device=logits.device)
    return torch.nn.functional.cross_entropy(logits, rows)


def spread(y, p):
    return ops.mean(ops.square(y - p)) + ops.var(p) - 0.1 * ops.max(p)


def correlation(y, p):
    y = y - ops.mean(y, axis=0)
    p = p - ops.mean(p, axis=0)
    products = torch.einsum("bi,bj->ij", y, p)
    return -ops.mean(products) / ops.sqrt(1.0 + ops.sum(ops.square(p)))


def attended(y, p):
    """Rows weigh as they do among all rows."""
    weights = ops.softmax(p[:, 0], axis=0)
    return ops.sum(weights * ops.sum(ops.square(y - p), axis=-1))


def of_keras(y, p):
    loss = losses.MeanSquaredError()(y, p)
    return ops.sqrt(loss) + losses.Huber(reduction="sum")(y, p) * 0.1


def moments(y, p):
    _, variance = ops.moments(y - p, axes=[0, 1])
    return variance


def centred(y, p):
    """A value for each row, of a batch that is centred."""
    return ops.mean(ops.square(y - p + ops.mean(p, axis=0)), axis=-1)


def for_each_class(y, p):
    return ops.mean(ops.square(y - p), axis=0)


class Fraction(losses.Loss):
    """The sum of errors over that of the targets."""

    def call(self, y_true, y_pred):
        errors = ops.sum(ops.abs(y_true - y_pred))
        return errors / ops.sum(ops.abs(y_true))


OF_ALL = [
    root_mean_squared,
    squares,
    by_shape,
    by_tensor,
    by_inverse,
    by_numel,
    of_valid,
    spread,
    correlation,
    attended,
    of_keras,
    moments,
    centred,
    for_each_class,
    torch.nn.functional.mse_loss,
    torch.nn.functional.smooth_l1_loss,
]
GATHERED = [picked, contrast]


def test_losses():
    programs = {
        f.__name__: fit(dense(), normal(CLASSES), f) for f in OF_ALL + GATHERED
    }
    programs["a loss"] = fit(dense(), normal(CLASSES), Fraction())
    for function in (squares, for_each_class, contrast):
        programs[function.__name__, "sum"] = fit(
            dense(),
            normal(CLASSES),
            LossFunctionWrapper(function, "sum"),
        )
    weights = rng().uniform(0.0, 3.0, ROWS).astype("float32")
    programs["weighted"] = fit(
        dense(), normal(CLASSES), of_valid, sample_weight=weights
    )
    assert_as_alone(programs)


def test_sequences():
    """As many steps as rows: shapes alone do not tell them apart."""

    def over_steps(y, p):
        return ops.sqrt(ops.mean(ops.square(y - p), axis=1))

    def over_rows(y, p):
        return ops.sqrt(ops.mean(ops.square(y - p), axis=0))

    def of_tokens(y, p):
        y, p = ops.reshape(y, (-1, 2)), ops.reshape(p, (-1, 2))
        return ops.sqrt(ops.mean(ops.square(y - p), axis=0))

    def time_major(y, p):
        y, p = ops.transpose(y, (1, 0, 2)), ops.transpose(p, (1, 0, 2))
        return ops.sqrt(ops.mean(ops.square(y - p), axis=0))

    def outputs(x):
        return layers.Dense(2, name="out")(x)

    x, y = normal(TIME, FEATURES), normal(TIME, 2)
    assert_as_alone(
        {
            f.__name__: fit(outputs, y, f, x=x)
            for f in (over_steps, over_rows, of_tokens, time_major)
        }
    )


def test_what_costs_is_said(rank, caplog):
    caplog.set_level(logging.INFO, "keras.distribution")
    program = fit(dense(), normal(CLASSES), picked, epochs=2)
    program(keras.distribution.DataParallel())
    said = [r.message for r in caplog.records if "__getitem__" in r.message]
    assert len(said) == 1


@pytest.mark.parametrize("name", ["sum", "mean"])
def test_reductions_of_torch(name):
    def loss(y, p):
        return torch.nn.functional.l1_loss(y, p, reduction=name)

    assert_as_alone({name: fit(dense(), normal(CLASSES), loss)})


class Own(layers.Layer):
    """A layer of a function, with a weight."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def build(self, input_shape):
        self.scale = self.add_weight((input_shape[-1],), "ones")

    def call(self, x):
        return self.function(self, x * self.scale)


def batch_centred(layer, x):
    return x - ops.mean(x, axis=0)


def standardised(layer, x):
    return x / ops.sqrt(0.1 + ops.var(x, axis=0, keepdims=True))


def by_largest(layer, x):
    return x / ops.max(ops.abs(x))


def divergence(layer, x):
    layer.add_loss(0.1 * ops.sum(ops.square(x)) / ops.shape(x)[0])
    layer.add_loss(0.1 * ops.mean(ops.sum(ops.exp(x), axis=-1)))
    return x


def balance(layer, x):
    """As mixtures of experts have it: a product of two means."""
    chances = ops.softmax(x, axis=-1)
    taken = ops.one_hot(ops.argmax(chances, axis=-1), x.shape[-1])
    layer.add_loss(ops.sum(ops.mean(chances, axis=0) * ops.mean(taken, axis=0)))
    return x


def cumulated(layer, x):
    return ops.cumsum(x, axis=0)


def ranked(layer, x):
    return ops.sort(x, axis=0)


def covariance(layer, x):
    return x + ops.matmul(x, ops.matmul(ops.transpose(x), x)) / 100


def similar(layer, x):
    """Each row takes part in all rows."""
    return x + ops.matmul(ops.softmax(ops.matmul(x, ops.transpose(x))), x)


def normalized(layer, x):
    """torch's, whose statistics are of all rows."""
    return torch.nn.functional.batch_norm(x, None, None, training=True)


FUNCTIONS = [
    batch_centred,
    standardised,
    by_largest,
    divergence,
    balance,
    cumulated,
    ranked,
    covariance,
    similar,
    normalized,
]


def around(function):
    def outputs(x):
        x = layers.Dense(6, "tanh", name="up")(x)
        x = Own(function, name="own")(x)
        return layers.Dense(CLASSES, name="out")(x)

    return outputs


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_layers(function):
    x, y = normal(FEATURES), normal(CLASSES)
    if function is normalized:
        # Of one row, torch has no statistics.
        x, y = x[:-1], y[:-1]
    assert_as_alone({"layer": fit(around(function), y, x=x)})


def test_numbers_that_a_layer_asks_for():
    def asks(layer, x):
        return x * 2 if float(ops.max(ops.abs(x))) > 0.5 else x

    assert_as_alone({"asks": fit(around(asks), normal(CLASSES), epochs=2)})


def test_operations_of_a_model():
    def outputs(x):
        x = layers.Dense(6, "tanh", name="up")(x)
        x = x - ops.mean(x, axis=0, keepdims=True)
        return layers.Dense(CLASSES, name="out")(x)

    assert_as_alone({"model": fit(outputs, normal(CLASSES), "mse")})


def test_layers_of_sequences():
    def of_tokens(layer, x):
        tokens = ops.reshape(x, (-1, x.shape[-1]))
        chances = ops.softmax(tokens, axis=-1)
        layer.add_loss(ops.sum(ops.square(ops.mean(chances, axis=0))))
        return x

    def time_major(layer, x):
        steps = ops.transpose(x, (1, 0, 2))
        return x - ops.mean(steps, axis=0)[:, None]

    x = normal(TIME, FEATURES)
    assert_as_alone(
        {
            f.__name__: fit(around(f), normal(TIME, CLASSES), x=x)
            for f in (of_tokens, time_major)
        }
    )


@pytest.mark.parametrize("function", [balance, standardised])
def test_activation_checkpointing(function):
    def outputs(x):
        with keras.RematScope(mode="full"):
            return around(function)(x)

    assert_as_alone({"remat": fit(outputs, normal(CLASSES))})


class OwnLoss(keras.Model):
    """A model that computes its loss by itself."""

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        own = ops.sqrt(ops.mean(ops.square(y - y_pred)))
        compiled = super().compute_loss(x, y, y_pred, sample_weight, training)
        return own + ops.sum(ops.abs(y_pred)) / ops.shape(x)[0] + compiled**2


def test_compute_loss():
    def outputs(x):
        x = layers.Dense(6, "tanh", kernel_regularizer="l2", name="up")(x)
        return layers.Dense(CLASSES, name="out")(x)

    program = fit(outputs, normal(CLASSES), model=OwnLoss)
    assert_as_alone({"compute_loss": program})
    for shape in ((2, 1), (1, 2)):
        layouts = {
            ".*up/kernel": (None, "model"),
            ".*out/kernel": ("model", None),
        }
        distribution = parity.model_parallel(shape, layouts)
        assert_as_alone({"compute_loss": program}, distribution)


def with_own_compute_loss(*args):
    """A model on which a program has replaced `compute_loss`, by a function
    that goes through the graph of the loss before backward does."""
    model = keras.Model(*args)
    released = model.compute_loss

    def compute_loss(*args, **kwargs):
        loss = released(*args, **kwargs)
        if not loss.requires_grad:
            return loss
        kernel = model.get_layer("out").kernel.value
        (grad,) = torch.autograd.grad(loss, kernel, retain_graph=True)
        return loss * (1.0 + ops.sum(ops.abs(grad)))

    model.compute_loss = compute_loss
    return model


def test_compute_loss_of_one_model():
    def outputs(x):
        x = layers.Dense(6, "tanh", name="up")(x)
        return layers.Dense(CLASSES, name="out")(x)

    program = fit(
        outputs,
        rng().integers(0, CLASSES, ROWS),
        losses.SparseCategoricalCrossentropy(from_logits=True),
        model=with_own_compute_loss,
    )
    layouts = {".*up/kernel": (None, "model"), ".*out/kernel": (None, "model")}
    distribution = parity.model_parallel((1, 2), layouts)
    assert_as_alone({"compute_loss": program}, distribution)


def test_metrics():
    def metric(y, p):
        return root_mean_squared(y, p)

    compiled = {"metrics": [metric, squares, of_valid, contrast, centred]}
    program = fit(dense(), normal(CLASSES), compiled=compiled)
    assert_as_alone({"metrics": program})


def test_code_runs_as_often_as_on_one_device(rank):
    calls = []

    def counted(layer, x):
        if x.device.type != "meta":
            calls.append(tuple(x.shape))
        return batch_centred(layer, x)

    program = fit(around(counted), normal(CLASSES), epochs=3)
    program(keras.distribution.DataParallel())
    under_distribution = calls.copy()
    calls.clear()
    program()
    # The reference is that of rank 0 alone.
    assert under_distribution == calls or rank


def test_sharded_weights():
    layouts = {
        ".*up/kernel": (None, "model"),
        ".*own/.*": ("model",),
        ".*out/kernel": ("model", "batch"),
    }
    for function in (batch_centred, balance, standardised, similar):
        program = fit(around(function), normal(CLASSES))
        for shape in ((2, 1), (1, 2)):
            distribution = parity.model_parallel(shape, layouts)
            assert_as_alone({function.__name__: program}, distribution)


def test_a_layer_whose_call_is_replaced():
    """On one layer alone, of a class that has a way of its own with shards."""

    def outputs(x):
        up = layers.Dense(6, "tanh", name="up")
        released = up.call
        up.call = lambda x, **kwargs: released(x) / (1.0 + ops.max(ops.abs(x)))
        return layers.Dense(CLASSES, name="out")(up(x))

    program = fit(outputs, normal(CLASSES))
    layouts = {".*up/kernel": (None, "model"), ".*out/kernel": ("model", None)}
    for shape in ((2, 1), (1, 2)):
        distribution = parity.model_parallel(shape, layouts)
        assert_as_alone({"replaced": program}, distribution)


class Scaled(layers.Dense):
    """Computes with something else than its weight."""

    @property
    def kernel(self):
        kernel = super().kernel
        return kernel / (1.0 + ops.max(ops.abs(kernel)))


def test_a_layer_whose_weight_is_computed():
    def outputs(x):
        x = Scaled(6, "tanh", name="up")(x)
        return Scaled(CLASSES, name="out")(x)

    program = fit(outputs, normal(CLASSES))
    layouts = {".*up/kernel": (None, "model"), ".*out/kernel": ("model", None)}
    distribution = parity.model_parallel((1, 2), layouts)
    assert_as_alone({"computed": program}, distribution)


@pytest.mark.world(4)
def test_sharded_weights_on_two_axes():
    layouts = {
        ".*up/kernel": (None, "model"),
        ".*own/.*": ("model",),
        ".*out/kernel": ("model", "batch"),
    }
    for function in (batch_centred, balance, standardised):
        program = fit(around(function), normal(CLASSES), of_valid)
        distribution = parity.model_parallel((2, 2), layouts)
        assert_as_alone({function.__name__: program}, distribution)
