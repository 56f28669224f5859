import types

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.backend.torch import nn
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded
from keras_torch_distribution.src.backend.torch import nn as overlay


def test_overlay_is_in_place():
    assert backend.nn.moments is overlay.moments
    assert backend.nn.dot_product_attention is overlay.dot_product_attention


def test_attention_does_not_break_the_graph_of_a_compiled_step():
    attend = torch.compile(
        nn.dot_product_attention, backend="eager", fullgraph=True
    )
    query, key, value = torch.randn(3, 2, 5, 3, 4)
    torch.testing.assert_close(
        attend(query, key, value, is_causal=True),
        nn.dot_product_attention(query, key, value, is_causal=True),
    )


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axes", [0, [0, 1], (-1,)])
def test_moments_without_a_distribution(axes, keepdims):
    x = torch.randn(4, 3, 2)
    axes_tuple = (axes,) if isinstance(axes, int) else tuple(axes)
    mean, variance = nn.moments(x, axes, keepdims)
    expected_variance, expected_mean = torch.var_mean(
        x, axes_tuple, correction=0, keepdim=keepdims
    )
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(variance, expected_variance)


def in_a_step(rank, world_size, total, function):
    """Calls it as a layer in a step, on the rows of one data shard."""
    context = types.SimpleNamespace(
        data_size=world_size, data_index=rank, data_group=dist.group.WORLD
    )
    # As `set_distribution` does, for this thread.
    global_state.set_global_attribute(
        "distribution",
        types.SimpleNamespace(**{marks.CONTEXT: context}),
    )
    start, stop = rows.split(total, world_size, rank)
    modes.calls += 1
    try:
        with rows.current_rows(rows.split_evenly(total, world_size, rank)):
            return function(start, stop)
    finally:
        modes.calls -= 1
        global_state.set_global_attribute("distribution", None)


# The last shard has fewer rows, and none.
@pytest.mark.parametrize("total", [6, 5, 2])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axes", [(0,), (0, 1), (-3, 2)])
def test_moments_are_those_of_the_global_batch(
    on_threads, total, axes, keepdims
):
    torch.manual_seed(0)
    x = (torch.randn(total, 3, 2) + 1).requires_grad_()
    expected = nn.moments(x, axes, keepdims)
    (expected[0].sum() + 2 * expected[1].sum()).backward()

    def run(rank):
        def function(start, stop):
            ours = x.detach()[start:stop].clone().requires_grad_()
            mean, variance = nn.moments(ours, axes, keepdims)
            # Every shard has the same loss, which is that of the batch too.
            (mean.sum() + 2 * variance.sum()).backward()
            weight = (stop - start) / total
            return mean.detach(), variance.detach(), weight * ours.grad

        return in_a_step(rank, 3, total, function)

    means, variances, grads = zip(*on_threads(3, run))
    for mean, variance in zip(means, variances):
        torch.testing.assert_close(mean, expected[0].detach())
        torch.testing.assert_close(variance, expected[1].detach())
    torch.testing.assert_close(torch.cat(grads), x.grad)


def test_moments_of_each_row_are_local(on_threads):
    x = torch.randn(4, 3)

    def run(rank):
        return in_a_step(
            rank, 2, 4, lambda start, stop: nn.moments(x[start:stop], -1)[0]
        )

    means = torch.cat(on_threads(2, run))
    torch.testing.assert_close(means, x.mean(-1))


def attention_inputs(heads=4, shared=None):
    torch.manual_seed(0)
    shapes = [(2, 5, n, 3) for n in (heads, shared or heads, shared or heads)]
    return [torch.randn(shape) for shape in shapes]


def test_attention_without_a_distribution():
    query, key, value = attention_inputs()
    bias = torch.randn(2, 4, 5, 5)
    y = nn.dot_product_attention(query, key, value, bias=bias)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 3**0.5
    weights = torch.softmax(scores + bias, -1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True},
        {"mask": torch.rand(2, 1, 5, 5) > 0.3},
        {"bias": torch.randn(2, 4, 5, 5)},
        {"bias": torch.randn(1, 4, 1, 5)},
    ],
)
def test_attention_on_local_heads(fake_world, arguments, shared):
    inputs = attention_inputs(4, shared)
    expected = nn.dot_product_attention(*inputs, **arguments)
    pieces = []
    for rank in range(2):
        fake_world(2, rank)
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("model",))
        y = nn.dot_product_attention(
            *[
                sharded.wrap(
                    collectives.shard_of(x, 2, mesh.get_group()),
                    mesh,
                    (Shard(2),),
                    tuple(x.shape),
                )
                for x in inputs
            ],
            **arguments,
        )
        assert y.placements == (Shard(2),)
        assert y.shape == expected.shape
        pieces.append(sharded.local_of(y))
    torch.testing.assert_close(torch.cat(pieces, 2), expected)


def test_attention_of_a_plain_key(fake_world):
    # A cache, say: it is cut like the query.
    inputs = attention_inputs()
    expected = nn.dot_product_attention(*inputs)
    fake_world(2, rank=1)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("model",))
    query = sharded.wrap(
        inputs[0][:, :, 2:].contiguous(), mesh, (Shard(2),), (2, 5, 4, 3)
    )
    y = nn.dot_product_attention(query, *inputs[1:])
    torch.testing.assert_close(sharded.local_of(y), expected[:, :, 2:])


def test_attention_where_heads_can_not_be_cut(fake_world):
    # Two query heads of one key head lie on two processes.
    fake_world(2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("model",))
    query, key, value = attention_inputs(6, 3)
    query = sharded.wrap(
        query[:, :, :3].contiguous(), mesh, (Shard(2),), (2, 5, 6, 3)
    )
    y = nn.dot_product_attention(query, key, value)
    assert y.placements == (Replicate(),)
    assert y.shape == (2, 5, 6, 3)


def test_gradient_of_a_bias_that_all_heads_share(fake_world, monkeypatch):
    # One head for each process: the bias has the shape of the local scores,
    # and autograd may hand the same gradient to both.
    fake_world(2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("model",))
    reduced = []

    def all_reduce(x, *args, **kwargs):
        reduced.append(x)
        x.mul_(10.0)

    def run():
        query, key, value = [
            x[:, :, :1].contiguous().requires_grad_()
            for x in attention_inputs(2)
        ]
        bias = torch.zeros(2, 1, 5, 5, requires_grad=True)
        y = nn.dot_product_attention(
            *[
                sharded.Enter.apply(x, mesh, (Shard(2),), (2, 5, 2, 3))
                for x in (query, key, value)
            ],
            bias=bias,
        )
        torch.square(sharded.Leave.apply(y)).sum().backward()
        return query.grad, key.grad, value.grad, bias.grad

    expected = run()
    monkeypatch.setattr(collectives.dist, "all_reduce", all_reduce)
    actual = run()
    assert len(reduced) == 1
    torch.testing.assert_close(actual[:3], expected[:3])
    torch.testing.assert_close(actual[3], 10 * expected[3])


def test_cross_entropy_without_a_distribution():
    logits, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    loss = nn.sparse_categorical_crossentropy(target, logits, from_logits=True)
    expected = torch.nn.functional.cross_entropy(
        logits, target, reduction="none"
    )
    assert not isinstance(loss, DTensor)
    torch.testing.assert_close(loss, expected)
