"""torch modules inside of Keras models, parallel by a plan of their own."""

import numpy as np
import pytest
import torch
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.distributed.tensor.parallel import RowwiseParallel

import keras
from integration_tests.harness import parity
from keras import layers
from keras.src.backend.torch import distribution_lib as backend_lib

pytestmark = [pytest.mark.world(2, 4), pytest.mark.limit(60)]


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 12)
        self.down = torch.nn.Linear(12, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def make_model(plan=None, when="before"):
    torch.manual_seed(3)
    block = Block()
    if plan is not None and when == "before":
        plan(block)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.TorchModuleWrapper(block, name="block"),
            layers.Dense(4, name="out"),
        ]
    )
    if plan is not None and when == "after":
        plan(block)
    return model


def data():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((7, 6)).astype("float32")
    y = rng.standard_normal((7, 4)).astype("float32")
    return x, y


def test_replicated(world_size):
    distribution = keras.distribution.DataParallel()
    parity.assert_parity(make_model, *data(), distribution)
    distribution = parity.model_parallel((1, world_size), {})
    parity.assert_parity(make_model, *data(), distribution)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_plan_written_by_hand(momentum, world_size):
    """The plan is applied before Keras takes the module's parameters."""

    def optimizer():
        return keras.optimizers.SGD(0.1, momentum=momentum)

    expected = parity.train(make_model, *data(), optimizer=optimizer)
    shape = (2, 2) if world_size == 4 else (1, 2)
    distribution = parity.model_parallel(shape, {})
    actual = parity.train(
        lambda: make_model(plan_for(distribution)),
        *data(),
        distribution,
        optimizer=optimizer,
    )
    parity.assert_same(actual, expected)


def test_plan_after_keras_took_the_parameters(world_size):
    shape = (1, world_size)
    distribution = parity.model_parallel(shape, {})
    with distribution.scope():
        with pytest.raises(ValueError, match="Apply the plan first"):
            make_model(plan_for(distribution), "after")


def plan_for(distribution):
    def plan(block):
        backend_lib.parallelize_torch_module(
            block,
            distribution.device_mesh.backend_mesh["model"],
            {"up": ColwiseParallel(), "down": RowwiseParallel()},
        )

    return plan
