"""What makes a function of shards gather is known to all processes."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.ops import operators
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.tensors import trials

pytestmark = pytest.mark.world(2)


class Failing(TorchDispatchMode):
    """Raises an error where numbers are multiplied."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mul.Tensor:
            assert isinstance(args[0], DTensor)
            if sharded.local_of(args[0]).device.type != "meta":
                raise self.error
        return func(*args, **(kwargs or {}))


class Squared(keras.layers.Layer):
    """Computes on shards; the error, if any, comes on one process alone."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error
        self.built = True

    def call(self, x):
        mesh = current().model_mesh
        x = sharded.Enter.apply(x, mesh, (Shard(0),), (4,))
        failing = contextlib.nullcontext()
        if self.error is not None:
            failing = Failing(self.error)
        with failing:
            self.placements = (x * x).placements
        return torch.zeros(1)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError, dist.DistBackendError, RuntimeError]
)
def test_an_error_of_one_process_is_its_error(error, rank):
    """It is no reason to gather: the others would not, and all would wait."""
    with parity.model_parallel((1, 2), {}).scope():
        x = torch.arange(2.0)
        failing = Squared(error("It breaks.") if rank else None)
        try:
            failing(x)
            said = failing.placements
        except error as raised:
            said = str(raised)
    first, second = everyone.gather(said)
    assert first == (Shard(0),)
    assert "It breaks." in second


def test_a_missing_rule_is_found_without_numbers():
    with parity.model_parallel((1, 2), {}).scope():
        mesh = current().model_mesh
        seen = []

        def reshape(func, args, kwargs, mesh):
            seen.append({x.to_local().device.type for x in args[:1]})
            return operators.on_dtensors(func, args, kwargs, mesh)

        def why(shape, requires_grad=False, **kwargs):
            x = torch.zeros(3, 8, requires_grad=requires_grad)
            x = sharded.Enter.apply(x, mesh, (Shard(0),), (6, 8))
            return trials.why_not(
                reshape, torch.reshape, (x, shape), kwargs, mesh
            )

        trials._found.clear()
        assert why((6, 2, 4)) is None
        assert why((6, 2, 4)) is None
        assert len(seen) == 1
        assert why((6, 2, 4), requires_grad=True) is None
        assert len(seen) == 2
        # What torch refuses for any tensor it refuses for shards.
        assert "RuntimeError" in why((5, 5))
        assert seen == [{"meta"}] * 3
        # What cannot be looked up is tried each time.
        assert why(torch.zeros(2).numpy()) == why(torch.zeros(2).numpy())
        assert len(seen) == 5


def test_a_trial_is_not_counted_as_saved_for_backward():
    """Activation checkpointing counts what backward needs."""
    kept = []
    with parity.model_parallel((1, 2), {}).scope():
        trials._found.clear()
        x = torch.arange(2.0, requires_grad=True)
        for _ in range(2):
            count = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x: count.append(x) or x, lambda x: x
            ):
                Squared()(x)
            kept.append(len(count))
    assert kept[0] == kept[1] > 0
