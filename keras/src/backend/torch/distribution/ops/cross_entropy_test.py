import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.ops import cross_entropy
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded

WORLD = 3


# Even shards, uneven ones, and a shard without classes.
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("classes", [6, 7, 2])
def test_is_that_of_one_device(on_threads, classes, once):
    torch.manual_seed(0)
    # Far apart: exponentials overflow where the maximum is a local one.
    logits = torch.randn(5, classes) * 100.0
    target = torch.tensor([0, 1, classes - 1, cross_entropy.IGNORED, 1])
    upstream_grad = torch.randn(5)
    logits.requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        logits, target, reduction="none"
    )
    expected.backward(upstream_grad)

    def run(rank):
        start, stop = collectives.shard_range(classes, WORLD, rank)
        ours = logits.detach()[:, start:stop].clone().requires_grad_()
        losses = cross_entropy._CrossEntropy.apply(
            ours, target, start, dist.group.WORLD, once
        )
        losses.backward(upstream_grad)
        return losses.detach(), ours.grad

    losses, grads = zip(*on_threads(WORLD, run))
    for loss in losses:
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(torch.cat(grads, 1), logits.grad)


def test_of_whole_classes():
    torch.manual_seed(0)
    logits = (torch.randn(5, 3, 4) * 100.0).requires_grad_()
    target = torch.randint(4, (5, 3))
    target[1, 2] = cross_entropy.IGNORED
    grad = torch.randn(5, 3)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), reduction="none"
    ).view(5, 3)
    expected.backward(grad)
    expected_grad, logits.grad = logits.grad, None
    for scope in (contextlib.nullcontext(), modes.running_backward_once()):
        with scope:
            losses = cross_entropy.sparse_cross_entropy(target, logits)
        losses.backward(grad)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(logits.grad, expected_grad)
        logits.grad = None


def test_backward_twice():
    logits = torch.randn(5, 4, requires_grad=True)
    losses = cross_entropy.sparse_cross_entropy(torch.arange(5) % 4, logits)
    first, second = [
        torch.autograd.grad(losses.sum(), logits, retain_graph=True)[0]
        for _ in range(2)
    ]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    "placements, axis",
    [
        ((Replicate(), Shard(2)), 1),
        ((Shard(2), Replicate()), 0),
        ((Replicate(), Replicate()), None),
        ((Replicate(), Shard(1)), None),
        ((Shard(1), Shard(2)), None),
        ((Partial(), Shard(2)), None),
    ],
)
def test_class_axis_of(fake_world, placements, axis):
    fake_world(4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    logits = sharded.wrap(torch.zeros(3, 4, 5), mesh, placements, (3, 4, 5))
    assert cross_entropy.class_axis_of(logits) == axis


@pytest.mark.parametrize("target", [-1, 4, 5])
def test_target_that_is_no_class(fake_world, target):
    fake_world(2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("model",))
    logits = sharded.wrap(torch.zeros(3, 2), mesh, (Shard(1),), (3, 4))
    with pytest.raises(IndexError, match=f"Target {target}.*4 classes"):
        cross_entropy.sparse_cross_entropy(torch.tensor([0, target, 1]), logits)
