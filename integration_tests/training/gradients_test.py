"""Gradients of weights are those of one device, however they are asked for."""

import datetime
import functools
import time
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.distributed.tensor import DTensor

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from integration_tests.training.gradient_programs import backward
from integration_tests.training.gradient_programs import check
from integration_tests.training.gradient_programs import distributions
from integration_tests.training.gradient_programs import gradients
from integration_tests.training.gradient_programs import local_rows
from integration_tests.training.gradient_programs import mlp
from integration_tests.training.gradient_programs import normal
from integration_tests.training.gradient_programs import numpy
from integration_tests.training.gradient_programs import run
from integration_tests.training.gradient_programs import weights
from keras import layers
from keras import ops
from keras.src.backend.torch.distribution.gradients.reducer import Reducer
from keras.src.backend.torch.distribution.tensors.sharded import whole
from keras.src.backend.torch.distribution.variables.weights import ShardedTensor

pytestmark = pytest.mark.world(2, 4)


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
        x = local_rows(normal(4))
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
            grads = grad(ops.mean(model(local_rows(normal(4))) ** 2), model)
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
            loss = ops.mean(model(local_rows(normal(4) + step)) ** 2)
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
                ops.mean(model(local_rows(normal(4))) ** 2),
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
        x = local_rows(normal(4))

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
        x = local_rows(normal(4))
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
        y = model(local_rows(normal(4)))
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

        noise, real = local_rows(noise), local_rows(real)
        for _ in range(3):
            fake = generator(noise).detach()
            loss = ops.mean(critic(fake) ** 2) - ops.mean(critic(real))
            step(critic, optimizers[0], loss)
            step(generator, optimizers[1], -ops.mean(critic(generator(noise))))
        return weights(generator), weights(critic)

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
        x = local_rows(normal(4))
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
