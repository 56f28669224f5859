"""Gradients of whatever a program does with layers and losses.

A program runs once on one device and once under a distribution, in the same
process, and returns what is compared.
"""

import contextlib
import datetime
import functools
import time
import types
from concurrent import futures

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.distributed.tensor import DTensor

import keras
from integration_tests import everyone
from integration_tests import parity
from keras import layers
from keras import ops
from keras.src.backend.torch.distribution.gradients.reducer import Reducer
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.tensors.sharded import whole
from keras.src.backend.torch.distribution.variables.weights import ShardedTensor

pytestmark = pytest.mark.world(2, 4)

# Cut by hand into equal shards. Where Keras cuts, batches are uneven.
ROWS = 8
# Rules for all models of this file: the names say how a layer is sharded.
LAYOUTS = {
    ".*column.*/kernel": (None, "model"),
    ".*column.*/bias": ("model",),
    ".*row.*/kernel": ("model", None),
    ".*table.*/embeddings": ("model", None),
    ".*spread.*/kernel": ("batch", None),
    ".*norm.*/gamma": ("model",),
    ".*own_weight": ("model", None),
}


def distributions(world_size):
    """Data shards only, model axes only, and both."""
    if world_size == 2:
        yield keras.distribution.DataParallel()
        yield parity.model_parallel((1, 2), LAYOUTS)
    yield parity.model_parallel((2, world_size // 2), LAYOUTS)


def run(program, distribution=None):
    """What a program returns, from the same state each time."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    with distribution.scope() if distribution else contextlib.nullcontext():
        return program()


def check(program, world_size):
    """Compares the nested arrays that a program returns."""
    expected = parity.on_one_device(lambda: run(program))
    for distribution in distributions(world_size):
        try:
            parity.assert_same(run(program, distribution), expected)
        except Exception as error:
            error.add_note(f"Under {distribution}.")
            raise


def normal(*shape):
    rng = np.random.default_rng(sum(shape))
    return rng.standard_normal((ROWS, *shape)).astype("float32")


def numpy(x):
    return None if x is None else ops.convert_to_numpy(x)


def gradients(model):
    return {v.path: numpy(v.value.grad) for v in model.trainable_variables}


def weights(model):
    return {v.path: numpy(v) for v in model.variables}


def our_rows(x):
    """What a hand-written step takes of a batch: the rows of its shard."""
    distribution = keras.distribution.distribution()
    if distribution is not None:
        mesh = distribution.device_mesh
        shards = mesh.shape[mesh.axis_names.index("batch")]
        x = np.split(x, shards)[distribution.data_shard_id]
    return ops.convert_to_tensor(x)


def all_rows(x):
    """What `our_rows` has cut, together again."""
    context = current()
    if context is None or context.data_size == 1:
        return x
    pieces = [torch.empty_like(x) for _ in range(context.data_size)]
    dist.all_gather(pieces, x, group=context.data_group)
    return torch.cat(pieces)


def backward(model, x):
    """One backward pass over a batch, without zeroing gradients."""
    ops.mean(model(our_rows(x), training=True) ** 2).backward()


def mlp(norm="norm", **kwargs):
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, "tanh", name="column", **kwargs),
            layers.Dense(6, name="row", **kwargs),
            layers.LayerNormalization(name=norm),
            layers.Dense(4, "tanh", name="spread", **kwargs),
            layers.Dense(2, name="whole", **kwargs),
        ]
    )


def test_backward_passes_accumulate(world_size):
    def program():
        model = mlp()
        first, second = normal(4), 2 * normal(4) + 1
        backward(model, first)
        backward(model, second)
        both = gradients(model)
        model.zero_grad()
        backward(model, second)
        return both, gradients(model)

    check(program, world_size)


def grad(loss, model, **kwargs):
    """What `torch.autograd.grad` gives for the weights of a model."""
    trained = model.trainable_variables
    grads = torch.autograd.grad(loss, [v.value for v in trained], **kwargs)
    return dict(zip([v.path for v in trained], grads))


def test_grad_function(world_size):
    """It gives what `backward()` accumulates, before and after it."""

    def program():
        model = mlp()
        x = our_rows(normal(4))
        results = []
        for _ in range(2):
            y = model(x)
            grads = grad(ops.mean(y**2), model, retain_graph=True)
            ops.mean(y**2).backward()
            again = grad(ops.mean(ops.abs(model(x))), model)
            results += [
                {path: numpy(g) for path, g in grads.items()},
                {path: numpy(g) for path, g in again.items()},
                gradients(model),
            ]
        model.zero_grad()
        return results

    check(program, world_size)


def test_grad_function_has_the_layout_of_the_weight(world_size):
    for distribution in distributions(world_size):

        def program():
            model = mlp()
            grads = grad(ops.mean(model(our_rows(normal(4))) ** 2), model)
            for v in model.trainable_variables:
                got = grads[v.path]
                assert type(got) is (
                    ShardedTensor
                    if isinstance(v.value, DTensor)
                    else torch.Tensor
                )
                if isinstance(got, DTensor):
                    assert got.placements == v.value.placements, v.path

        run(program, distribution)


def test_training_by_grad_function(world_size):
    """A loop that never calls `backward()`."""

    def program():
        model = mlp()
        optimizer = keras.optimizers.SGD(0.1)
        trained = model.trainable_variables
        for step in range(3):
            loss = ops.mean(model(our_rows(normal(4) + step)) ** 2)
            grads = grad(loss, model)
            assert all(v.value.grad is None for v in trained)
            with torch.no_grad():
                optimizer.apply(list(grads.values()), trained)
        return weights(model)

    check(program, world_size)


def test_grad_function_of_unused_weights(world_size):
    """None, where no process uses them."""

    def program():
        used, unused = mlp(), mlp()
        trained = used.trainable_variables + unused.trainable_variables
        results = []
        for model in (used, used, unused):
            grads = torch.autograd.grad(
                ops.mean(model(our_rows(normal(4))) ** 2),
                [v.value for v in trained],
                allow_unused=True,
            )
            results.append([numpy(g) for g in grads])
        half = len(trained) // 2
        assert all(g is None for g in results[0][half:])
        return results

    check(program, world_size)


@pytest.mark.world(2)
def test_grad_function_of_weights_used_by_some(rank):
    """It has no way to give all of them a gradient, so all are told."""

    def program():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        rarely = layers.Dense(1, name="rarely")
        rarely.build((None, 4))
        x = our_rows(normal(4))

        def step():
            loss = ops.mean(model(x))
            if rank:
                loss = loss + ops.mean(rarely(x))
            variables = model.trainable_variables + rarely.trainable_variables
            torch.autograd.grad(
                loss, [v.value for v in variables], allow_unused=True
            )

        return everyone.outcomes(step)

    outcomes = run(program, keras.distribution.DataParallel())
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert outcome.startswith("RuntimeError: `torch.autograd.grad`")
        assert "rarely/kernel" in outcome and "dense" not in outcome


@pytest.mark.world(2)
def test_a_backward_pass_of_one_process_alone_ends(rank):
    """Nothing tells the others of it: it ends as any collective does that
    they do not call, at the process group's timeout."""
    seconds = 2
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    context = types.SimpleNamespace(data_size=2, data_group=group)
    weight = torch.nn.Parameter(torch.ones(3))
    Reducer(context).register(weight, "weight")
    start = time.monotonic()
    if rank:
        with pytest.raises(RuntimeError, match="[Tt]imed out"):
            torch.autograd.grad(weight.sum(), weight)
        assert time.monotonic() - start < 10 * seconds
    everyone.gather(rank)


def penalty(model, x):
    """A loss, and the squared norm of its gradient."""
    loss = ops.mean(model(x, training=True) ** 2)
    grads = grad(loss, model, create_graph=True)
    return loss + sum(ops.sum(whole(g) ** 2) for g in grads.values())


def statistics():
    """With sums over all rows, and layers' own code on shards."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, "gelu", use_bias=False, name="column"),
            layers.BatchNormalization(synchronized=True, name="norm"),
            layers.RMSNormalization(name="norm_too"),
            layers.Dense(3, "softmax", name="row"),
        ]
    )


# Of a sharded LayerNormalization, DTensor has no gradient of the gradient.
TWICE = [functools.partial(mlp, norm="between"), statistics]


@pytest.mark.parametrize("make", TWICE, ids=["mlp", "statistics"])
def test_penalty_of_gradients_of_weights(make, world_size):
    def program():
        model = make()
        x = our_rows(normal(4))
        results = []
        for _ in range(2):
            model.zero_grad()
            penalty(model, x).backward()
            results.append(gradients(model))
        by_function = grad(penalty(model, x), model)
        return results, {path: numpy(g) for path, g in by_function.items()}

    check(program, world_size)


def test_weights_used_outside_of_layers(world_size):
    """DTensor gives sums a gradient that is not cut as the weight is."""

    def program():
        model = mlp()

        def loss():
            # Without any layer's call.
            sums = [ops.sum(v.value, axis=-1) for v in model.variables]
            return sum(
                i * ops.sum(ops.sin(whole(x))) for i, x in enumerate(sums, 1)
            )

        loss().backward()
        of_function = grad(loss(), model)
        return (
            gradients(model),
            {path: numpy(g) for path, g in of_function.items()},
        )

    check(program, world_size)


def test_two_losses_of_one_graph_accumulate(world_size):
    def program():
        model = mlp()
        y = model(our_rows(normal(4)))
        ops.mean(y**2).backward(retain_graph=True)
        ops.mean(ops.abs(y)).backward()
        return gradients(model)

    check(program, world_size)


def test_models_take_turns(world_size):
    """As a GAN: each optimizer steps on the gradients of its own model."""

    def program():
        generator = mlp()
        critic = keras.Sequential(
            [
                keras.Input((2,)),
                layers.Dense(8, "tanh", name="critic_column"),
                layers.Dense(1, name="critic_row"),
            ]
        )
        optimizers = [keras.optimizers.SGD(0.1) for _ in range(2)]
        noise, real = normal(4), normal(2)

        def step(model, optimizer, loss):
            model.zero_grad()
            loss.backward()
            trained = model.trainable_variables
            with torch.no_grad():
                optimizer.apply([v.value.grad for v in trained], trained)

        noise, real = our_rows(noise), our_rows(real)
        for _ in range(3):
            fake = generator(noise).detach()
            loss = ops.mean(critic(fake) ** 2) - ops.mean(critic(real))
            step(critic, optimizers[0], loss)
            step(generator, optimizers[1], -ops.mean(critic(generator(noise))))
        return weights(generator), weights(critic)

    check(program, world_size)


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


def test_unused_parameter_has_no_gradient(world_size):
    class Branches(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = layers.Dense(2, name="column_used")
            self.unused = layers.Dense(2, name="column_unused")
            self.also_unused = layers.Dense(2, name="spread_unused")

        def call(self, x, branch=True):
            for layer in (self.unused, self.also_unused):
                if not layer.built:
                    layer.build(x.shape)
            return self.used(x) if branch else self.unused(x)

    def program():
        model = Branches()
        x = our_rows(normal(4))
        results = []
        # A branch that the passes before let expect, and the other one.
        for branch in (True, True, False, True):
            model.zero_grad()
            ops.mean(model(x, branch=branch) ** 2).backward()
            results.append(gradients(model))
        unused = [p for p, g in results[0].items() if g is None]
        assert sorted(p.split("/")[-2] for p in unused) == [
            *["column_unused"] * 2,
            *["spread_unused"] * 2,
        ]
        return results

    check(program, world_size)


def test_branch_taken_by_some_processes(world_size, rank):
    """What a process did not compute counts as zero; nobody waits."""

    def program():
        always = layers.Dense(3, name="always")
        rarely = layers.Dense(3, name="rarely")
        always.build((None, 4))
        rarely.build((None, 4))
        x = ops.convert_to_tensor(normal(4)[:world_size])
        ours = range(world_size)
        if keras.distribution.distribution() is not None:
            ours = [rank]
        results = []
        for step in range(3):
            always.zero_grad()
            rarely.zero_grad()
            loss = 0.0
            for row in ours:
                y = always(x[row : row + 1])
                # Another process in each step.
                if row == step % world_size:
                    y = y * rarely(x[row : row + 1])
                loss = loss + ops.sum(y**2)
            (loss / len(ours)).backward()
            results.append(gradients(always) | gradients(rarely))
        return results

    expected = run(program)
    actual = run(program, keras.distribution.DataParallel())
    parity.assert_same(actual, expected)


def test_frozen_and_unfrozen(world_size):
    def program():
        model = mlp()
        x, y = normal(4), normal(2)
        results = []
        for trainable in (False, True, False):
            for name in ("column", "norm", "whole"):
                model.get_layer(name).trainable = trainable
            model.compile(keras.optimizers.SGD(0.1), "mse")
            before = weights(model)
            history = model.fit(x, y, batch_size=5, epochs=2, verbose=0)
            after = weights(model)
            moved = {
                path.split("/", 1)[1]: bool(np.any(before[path] != after[path]))
                for path in before
            }
            assert moved["column/kernel"] is trainable
            assert moved["norm/gamma"] is trainable
            assert moved["row/kernel"]
            results.append((history.history["loss"], after, gradients(model)))
        return results

    check(program, world_size)


def test_layer_added_as_frozen(world_size):
    """Variables that were not trainable when they were made."""

    def program():
        inputs = keras.Input((4,))
        x = layers.Dense(8, trainable=False, name="column")(inputs)
        x = layers.Dense(4, trainable=False, name="spread")(x)
        x = layers.Dense(2, trainable=False, name="whole")(x)
        model = keras.Model(inputs, x)
        model.trainable = True
        for layer in model.layers:
            layer.trainable = True
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(normal(4), normal(2), batch_size=5, verbose=0)
        return weights(model), gradients(model)

    check(program, world_size)


def test_shared_layer(world_size):
    def program():
        shared = layers.Dense(4, "tanh", name="column")
        narrow = layers.Dense(4, name="row")
        inputs = keras.Input((4,))
        x = narrow(shared(narrow(shared(inputs))))
        model = keras.Model(inputs, x)
        backward(model, normal(4))
        return gradients(model)

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
        layouts = {"tokens/embeddings": axes, "column/kernel": (None, "model")}
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


def test_gradients_of_our_rows(world_size):
    """Of a sum over rows they are one device's, for our rows; of a mean, whose
    divisor is that of our rows, they are larger by (all) / (our rows)."""

    def program():
        model = mlp()
        x = our_rows(normal(4)).requires_grad_()
        share = len(x) / ROWS
        y = model(x)
        of_sum = torch.autograd.grad(ops.sum(y**2), x, retain_graph=True)[0]
        of_mean, of_weight = torch.autograd.grad(
            ops.mean(y**2), [x, model.get_layer("whole").kernel.value]
        )
        seen = all_rows(of_sum), all_rows(of_mean * share), of_weight
        return [numpy(x) for x in seen]

    check(program, world_size)


def test_penalty_of_gradients_of_inputs(world_size):
    """As of a Wasserstein GAN's critic: a mean over rows of what is computed
    of each row's own gradient."""

    def program():
        model = mlp(norm="between")
        x = our_rows(normal(4)).requires_grad_()
        (of_rows,) = torch.autograd.grad(
            ops.sum(model(x)), x, create_graph=True
        )
        norms = ops.sqrt(ops.sum(of_rows**2, axis=1))
        ops.mean((norms - 1) ** 2).backward()
        return gradients(model)

    check(program, world_size)


def test_gradients_of_inputs(world_size):
    """Of a model's inputs, on the model axes: rows are not cut here."""

    def program():
        model = mlp()
        x = torch.tensor(normal(4), requires_grad=True)
        y = model(x)
        (grad,) = torch.autograd.grad(ops.sum(y**2), x, create_graph=False)
        assert not isinstance(grad, DTensor)
        loss = ops.mean(model(x) ** 2)
        loss.backward()
        return numpy(grad), numpy(x.grad), gradients(model)

    check(program, world_size)


def test_saliency_with_frozen_weights(world_size):
    """No parameter asks for a gradient, only the input does."""

    def program():
        model = mlp()
        model.trainable = False
        x = torch.tensor(normal(4), requires_grad=True)
        ops.sum(model(x)[:, 0]).backward()
        return numpy(x.grad), gradients(model)

    check(program, world_size)


def run_in_thread(function):
    """As autograd runs backward of what lies on a GPU."""
    with futures.ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(function).result()


in_threads = pytest.mark.parametrize(
    "run_backward", [lambda f: f(), run_in_thread], ids=["here", "in a thread"]
)


@in_threads
def test_recomputed_activations(world_size, run_backward):
    """Under `RematScope` backward runs layers again, with their collectives."""

    def program():
        with keras.RematScope(mode="full"):
            model = mlp()
            loss = ops.mean(model(our_rows(normal(4)), training=True) ** 2)
            run_backward(loss.backward)
        return gradients(model)

    check(program, world_size)


@in_threads
def test_torch_checkpoint(world_size, run_backward):
    def program():
        first, second = mlp(), layers.Dense(4, name="row")
        second.build((None, 2))
        y = torch.utils.checkpoint.checkpoint(
            lambda x: second(first(x)),
            our_rows(normal(4)),
            use_reentrant=False,
        )
        run_backward(ops.mean(y**2).backward)
        return gradients(first) | {
            v.name: numpy(v.value.grad) for v in second.variables
        }

    check(program, world_size)
