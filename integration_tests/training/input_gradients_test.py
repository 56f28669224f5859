"""Gradients of inputs, and activations that are computed again."""

from concurrent import futures

import pytest
import torch
import torch.utils.checkpoint
from torch.distributed.tensor import DTensor

import keras
from integration_tests.training.gradient_programs import ROWS
from integration_tests.training.gradient_programs import all_rows
from integration_tests.training.gradient_programs import check
from integration_tests.training.gradient_programs import gradients
from integration_tests.training.gradient_programs import local_rows
from integration_tests.training.gradient_programs import mlp
from integration_tests.training.gradient_programs import normal
from integration_tests.training.gradient_programs import numpy
from keras import layers
from keras import ops

pytestmark = pytest.mark.world(2, 4)


def test_gradients_of_our_rows(world_size):
    """Of a sum over rows they are one device's, for local rows; of a mean,
    whose divisor is that of local rows, they are larger by (all) / (local
    rows)."""

    def program():
        model = mlp()
        x = local_rows(normal(4)).requires_grad_()
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
        x = local_rows(normal(4)).requires_grad_()
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
            loss = ops.mean(model(local_rows(normal(4)), training=True) ** 2)
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
            local_rows(normal(4)),
            use_reentrant=False,
        )
        run_backward(ops.mean(y**2).backward)
        return gradients(first) | {
            v.name: numpy(v.value.grad) for v in second.variables
        }

    check(program, world_size)
