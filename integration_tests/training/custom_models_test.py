"""Steps, losses and layers of the user: weights and gradients of one device."""

import numpy as np
import pytest
import torch
import torch.utils.checkpoint

import keras
from integration_tests.harness import parity
from integration_tests.training.gradient_programs import ROWS
from integration_tests.training.gradient_programs import backward
from integration_tests.training.gradient_programs import check
from integration_tests.training.gradient_programs import gradients
from integration_tests.training.gradient_programs import mlp
from integration_tests.training.gradient_programs import normal
from integration_tests.training.gradient_programs import weights
from keras import layers
from keras import ops

pytestmark = pytest.mark.world(2, 4)


class Gan(keras.Model):
    """A `train_step` of its own, with two optimizers."""

    def __init__(self):
        super().__init__()
        self.generator = mlp()
        self.critic = layers.Dense(1, name="critic_column")

    def compile(self, first, second):
        super().compile()
        self.first, self.second = first, second

    def call(self, x):
        return self.critic(self.generator(x))

    def train_step(self, data):
        noise, real = data
        self.zero_grad()
        fake = self.generator(noise).detach()
        critic_loss = ops.mean(self.critic(fake) ** 2) + ops.mean(
            (self.critic(real) - 1) ** 2
        )
        critic_loss.backward()
        self.step(self.second, self.critic)
        self.zero_grad()
        generator_loss = ops.mean((self(noise) - 1) ** 2)
        generator_loss.backward()
        self.step(self.first, self.generator)
        return {"g_loss": generator_loss, "c_loss": critic_loss}

    def step(self, optimizer, part):
        trained = part.trainable_variables
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in trained], trained)


@pytest.mark.parametrize("batch_size", [5, 7])
def test_custom_train_step(batch_size, world_size):
    """Uneven batches: the last one of seven has one row, so a hand-written
    mean over rows is NaN where there are none."""

    def program():
        model = Gan()
        model.build((None, 4))
        model.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.2))
        history = model.fit(
            normal(4), normal(2), batch_size=batch_size, epochs=2, verbose=0
        )
        return history.history, weights(model)

    check(program, world_size)


class OwnLoss(keras.Model):
    """A hand-written mean over rows, of weights that lie everywhere."""

    def __init__(self):
        super().__init__()
        self.stack = mlp()

    def call(self, x):
        return self.stack(x)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return ops.mean((y - y_pred) ** 2)


def test_own_loss(world_size):
    """The last batch of seven has one row, so some shards have none."""

    def program():
        model = OwnLoss()
        model.build((None, 4))
        model.compile(keras.optimizers.SGD(0.1), metrics=["mae"])
        data = normal(4), normal(2)
        history = model.fit(*data, batch_size=7, epochs=2, verbose=0)
        evaluated = model.evaluate(*data, batch_size=7, verbose=0)
        return history.history, evaluated, weights(model)

    check(program, world_size)


class TiedHead(layers.Layer):
    """Scores of tokens, with the weights of their embedding."""

    def __init__(self, embedding, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.embedding.embeddings))


@pytest.mark.parametrize(
    "axes",
    [("model", None), (None, "model"), ("batch", None), ("model", "batch")],
    ids=str,
)
def test_tied_embedding(axes, world_size):
    tokens = np.random.default_rng(0).integers(0, 9, (ROWS, 5))
    targets = np.roll(tokens, 1, 1)

    def make():
        embedding = layers.Embedding(9, 6, name="tokens")
        inputs = keras.Input((5,), dtype="int32")
        x = layers.Dense(6, name="column")(embedding(inputs))
        return keras.Model(inputs, TiedHead(embedding)(x))

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for shape in ((1, world_size), (2, world_size // 2)):
        layouts = {
            ".*tokens/embeddings": axes,
            ".*column/kernel": (None, "model"),
        }
        mesh = parity.model_parallel(shape, layouts)
        parity.assert_parity(make, tokens, targets, mesh, loss=loss)


def test_reversible_embedding(world_size):
    tokens = np.random.default_rng(0).integers(0, 9, (ROWS, 5))

    def program():
        embedding = layers.ReversibleEmbedding(9, 6, name="table")
        inputs = keras.Input((5,), dtype="int32")
        x = layers.Dense(6, name="column")(embedding(inputs))
        model = keras.Model(inputs, embedding(x, reverse=True))
        model.compile(
            keras.optimizers.SGD(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        loss = model.train_on_batch(tokens, tokens)
        return loss, gradients(model), weights(model)

    check(program, world_size)


class Composite(layers.Layer):
    """Weights of its own beside sublayers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up = layers.Dense(8, name="column")
        self.down = layers.Dense(6, name="row")

    def build(self, input_shape):
        shape = (input_shape[-1], 6)
        self.own = self.add_weight(shape=shape, name="own_weight")
        self.scale = self.add_weight(
            shape=(6,), initializer="ones", name="scale"
        )
        self.up.build(input_shape)
        self.down.build((None, 8))

    def call(self, x):
        y = self.down(ops.relu(self.up(x)))
        return self.scale * (y + ops.matmul(x, self.own))


class RawTorch(layers.Layer):
    """Calls torch, not Keras, on its weights."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.own = self.add_weight(shape=(6, 4), name="own_weight")
        self.shift = self.add_weight(
            shape=(4,), initializer="ones", name="shift"
        )

    def call(self, x):
        y = torch.nn.functional.linear(x, self.own.value.t(), self.shift.value)
        norms = torch.linalg.vector_norm(self.own.value, dim=0)
        return torch.cat([y, y / norms], dim=-1).cumsum(-1)


def test_custom_layers(world_size):
    def program():
        model = keras.Sequential([keras.Input((4,)), Composite(), RawTorch()])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        loss = model.train_on_batch(normal(4), normal(8))
        return loss, gradients(model), weights(model)

    check(program, world_size)


class Block(keras.Model):
    """Its layers are built in its first call; the last one is made there."""

    def __init__(self, width, name):
        super().__init__(name=name)
        self.first = layers.Dense(8, "relu", name="column")
        self.second = layers.Dense(width, name="row")
        self.last = None

    def call(self, x):
        if self.last is None:
            self.last = layers.Dense(x.shape[-1], name="spread")
        return x + self.last(self.second(self.first(x)))


class Nested(keras.Model):
    def __init__(self):
        super().__init__(name="nested")
        self.blocks = [Block(6, "block_a"), Block(4, "block_b")]
        self.head = keras.Sequential([layers.Dense(2, name="column")])

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_subclassed_and_nested_models(world_size):
    def program():
        model = Nested()
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
        model(normal(4)[:1])
        history = model.fit(
            normal(4), normal(2), batch_size=5, epochs=2, verbose=0
        )
        return history.history, gradients(model), weights(model)

    check(program, world_size)


def test_nested_functional_model(world_size):
    def program():
        inner = mlp()
        inputs = keras.Input((3, 4))
        x = layers.TimeDistributed(inner)(inputs)
        x = layers.Flatten()(x)
        inner_row = layers.Dense(4, name="row")(x)
        model = keras.Model(inputs, inner(inner_row))
        backward(model, normal(3, 4))
        return gradients(model)

    check(program, world_size)


class Penalty(layers.Layer):
    """A mean over rows, and a term of the weights of another layer."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def call(self, x):
        y = self.layer(x)
        self.add_loss(0.1 * ops.mean(y**2))
        self.add_loss(0.01 * ops.sum(ops.abs(self.layer.kernel)))
        return y


def test_added_losses_and_regularizers(world_size):
    def program():
        inputs = keras.Input((4,))
        x = Penalty(layers.Dense(8, name="column"))(inputs)
        x = layers.Dense(
            6,
            name="row",
            kernel_regularizer=keras.regularizers.L1L2(0.01, 0.02),
            bias_regularizer="l2",
        )(x)
        x = layers.Dense(4, name="spread", kernel_regularizer="l2")(x)
        x = layers.Dense(
            5,
            name="column_b",
            activity_regularizer="l2",
            kernel_regularizer=keras.regularizers.OrthogonalRegularizer(0.01),
        )(x)
        x = layers.Dense(2, name="whole", activity_regularizer="l1")(x)
        model = keras.Model(inputs, x)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        logs = [model.train_on_batch(normal(4), normal(2)) for _ in range(2)]
        evaluated = model.evaluate(
            normal(4), normal(2), batch_size=ROWS, verbose=0
        )
        return logs, evaluated, gradients(model), weights(model)

    check(program, world_size)


def test_regularizers_of_ones_own(world_size):
    """They see the whole weight, whatever they do with it."""

    def largest_differences(w):
        return ops.sum(ops.max(w[1:] - w[:-1], axis=0) ** 2)

    def nuclear(w):
        return torch.linalg.matrix_norm(w.value, "nuc")

    def program():
        inputs = keras.Input((4,))
        x = inputs
        for i, penalty in enumerate([largest_differences, nuclear]):
            for name in ("column", "row", "spread"):
                x = layers.Dense(
                    8, kernel_regularizer=penalty, name=f"{name}_{i}"
                )(x)
        model = keras.Model(inputs, x)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        logs = [model.train_on_batch(normal(4), normal(8)) for _ in range(2)]
        return logs, gradients(model), weights(model)

    check(program, world_size)
