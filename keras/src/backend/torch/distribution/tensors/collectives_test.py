import types

import pytest
import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.batch import gathers
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.tensors import collectives

WORLD = 3
# Even shards, uneven ones, a shard of nothing, and nothing at all.
SIZES = (6, 7, 4, 2, 1)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 8, 9, 16, 17])
def test_shard_range_cuts_as_torch_does(size, shards):
    ranges = [collectives.shard_range(size, shards, i) for i in range(shards)]
    x = torch.arange(size)
    pieces = [x[start:stop].tolist() for start, stop in ranges]
    expected = [piece.tolist() for piece in x.chunk(shards)] if size else []
    expected += [[]] * (shards - len(expected))
    assert pieces == expected


def whole(size, dim, seed=0):
    shape = [2, 3, 4]
    shape[dim] = size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def shard(x, dim, rank):
    start, stop = collectives.shard_range(x.shape[dim], WORLD, rank)
    return x.narrow(dim, start, stop - start)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_all_gather_undoes_shard_of(on_threads, size, dim):
    x = whole(size, dim)

    def run(rank):
        ours = collectives.shard_of(x, dim, dist.group.WORLD)
        assert torch.equal(ours, shard(x, dim, rank))
        return collectives.all_gather(ours, dim, size, dist.group.WORLD)

    for result in on_threads(WORLD, run):
        assert torch.equal(result, x)


@pytest.mark.parametrize("dim", [0, 2])
def test_all_gather_of_nothing(on_threads, dim):
    """What another axis has cut may be empty here."""
    x = torch.ones(6, 0, 6)

    def run(rank):
        ours = collectives.shard_of(x, dim, dist.group.WORLD)
        return collectives.all_gather(ours, dim, 6, dist.group.WORLD)

    for result in on_threads(WORLD, run):
        assert result.shape == x.shape


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter(on_threads, size, dim):
    parts = [whole(size, dim, seed) for seed in range(WORLD)]
    results = on_threads(
        WORLD,
        lambda rank: collectives.reduce_scatter(
            parts[rank], dim, dist.group.WORLD
        ),
    )
    for rank, result in enumerate(results):
        torch.testing.assert_close(result, shard(sum(parts), dim, rank))


def forward_and_backward(on_threads, function, inputs, grads):
    """Outputs and gradients of the inputs, by rank."""

    def run(rank):
        x = inputs[rank].clone().requires_grad_()
        y = function(x * 1, rank)  # As in a layer, the input is no leaf.
        y.backward(grads[rank])
        return y.detach(), x.grad

    return zip(*on_threads(WORLD, run))


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_all_reduce(on_threads, is_contiguous):
    inputs = [whole(5, 1, seed) for seed in range(WORLD)]
    if not is_contiguous:
        inputs = [x.transpose(0, 2) for x in inputs]
    grads = [torch.full_like(inputs[0], 2.0)] * WORLD
    outputs, input_grads = forward_and_backward(
        on_threads,
        lambda x, _: collectives.AllReduce.apply(x, dist.group.WORLD),
        inputs,
        grads,
    )
    for y, grad in zip(outputs, input_grads):
        torch.testing.assert_close(y, sum(inputs))
        torch.testing.assert_close(grad, grads[0])


def test_all_reduce_gradient(on_threads):
    inputs = [whole(5, 1)] * WORLD
    # Each process has its part of the weights.
    weights = [whole(5, 1, seed + 1) for seed in range(WORLD)]
    outputs, input_grads = forward_and_backward(
        on_threads,
        lambda x, rank: (
            weights[rank]
            * collectives.AllReduceGradient.apply(x, dist.group.WORLD)
        ),
        inputs,
        [torch.ones_like(inputs[0])] * WORLD,
    )
    for rank, (y, grad) in enumerate(zip(outputs, input_grads)):
        torch.testing.assert_close(y, weights[rank] * inputs[0])
        torch.testing.assert_close(grad, sum(weights))


@pytest.mark.parametrize("size", [6, 7, 2])
def test_all_gather_takes_its_slice_of_the_gradient(on_threads, size):
    x, grad = whole(size, 1), whole(size, 1, 9)
    outputs, input_grads = forward_and_backward(
        on_threads,
        lambda x, _: collectives.AllGather.apply(x, 1, size, dist.group.WORLD),
        [shard(x, 1, rank) for rank in range(WORLD)],
        [grad] * WORLD,
    )
    for rank, (y, ours) in enumerate(zip(outputs, input_grads)):
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(ours, shard(grad, 1, rank))


@pytest.mark.parametrize("size", [6, 7, 2])
def test_all_gather_partial_sums_the_gradient(on_threads, size):
    x = whole(size, 1)
    grads = [whole(size, 1, seed) for seed in range(WORLD)]
    outputs, input_grads = forward_and_backward(
        on_threads,
        lambda x, _: collectives.AllGatherPartial.apply(
            x, 1, size, dist.group.WORLD
        ),
        [shard(x, 1, rank) for rank in range(WORLD)],
        grads,
    )
    for rank, (y, ours) in enumerate(zip(outputs, input_grads)):
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(ours, shard(sum(grads), 1, rank))


@pytest.mark.parametrize("size", [6, 7, 2])
def test_slice_gathers_the_gradient(on_threads, size):
    x, grad = whole(size, 1), whole(size, 1, 9)
    outputs, input_grads = forward_and_backward(
        on_threads,
        lambda x, _: collectives.Slice.apply(x, 1, dist.group.WORLD),
        [x] * WORLD,
        [shard(grad, 1, rank) for rank in range(WORLD)],
    )
    for rank, (y, ours) in enumerate(zip(outputs, input_grads)):
        torch.testing.assert_close(y, shard(x, 1, rank))
        torch.testing.assert_close(ours, grad)


def test_sum_over_data_is_that_of_one_device(on_threads):
    # loss = sum_i weight_i * loss_i(s), s = sum_i x_i; the gradients that
    # leave are weighted later, with our weight.
    weights = (0.5, 0.3, 0.2)
    inputs = [torch.tensor([1.0 + rank, 2.0]) for rank in range(WORLD)]

    def loss(s, rank):
        return ((rank + 1) * s**2).sum()

    def run(rank):
        x = inputs[rank].clone().requires_grad_()
        s = collectives.SumOverData.apply(x, weights[rank], dist.group.WORLD)
        loss(s, rank).backward()
        return weights[rank] * x.grad

    x = torch.stack(inputs).requires_grad_()
    sum(
        weight * loss(x.sum(0), rank) for rank, weight in enumerate(weights)
    ).backward()
    torch.testing.assert_close(torch.stack(on_threads(WORLD, run)), x.grad)


def test_sum_over_data_of_a_shard_without_rows(on_threads):
    def run(rank):
        x = torch.ones(2, requires_grad=True)
        weight = (1.0, 0.0)[rank]
        collectives.SumOverData.apply(
            x, weight, dist.group.WORLD
        ).sum().backward()
        return x.grad

    first, second = on_threads(2, run)
    torch.testing.assert_close(first, torch.ones(2))
    torch.testing.assert_close(second, torch.zeros(2))


FUNCTIONS = {
    "sum": lambda x, weight, context: collectives.SumOverData.apply(
        x, weight, context.data_group
    ),
    "gather": lambda x, weight, context: gathers.GatherForLoss.apply(
        x, context
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_over_data_can_be_differentiated(on_threads, name):
    """Losses f_i of all rows, with weights w_i; then losses of h_j, the
    gradient of all f_i for the rows of shard j, divided by w_j."""
    counts, total = (3, 2, 0), 5
    x = whole(total, 0)
    factors = torch.tensor([1.0, 2.0, 3.0])

    def first(everything, factor):
        return factor * (everything.sum(0) ** 3 + everything.prod(0)).sum()

    def second(h, factor):
        return factor * (h**2).sum()

    def run(rank):
        context = types.SimpleNamespace(
            data_size=3, data_index=rank, data_group=dist.group.WORLD
        )
        start = sum(counts[:rank])
        ours = rows.Rows(counts, rank)
        with rows.current_rows(ours):
            # Where there are none, another's row.
            start, stop = rows.with_a_row(start, start + counts[rank])
            mine = x[start:stop].clone().requires_grad_()
            if name == "sum":
                padded = torch.zeros_like(x)
                padded[start:stop] = mine
                everything = FUNCTIONS[name](padded, ours.weight, context)
            else:
                everything = FUNCTIONS[name](mine, ours.weight, context)
            loss = first(everything, factors[rank])
            (h,) = torch.autograd.grad(loss, mine, create_graph=True)
            (grad,) = torch.autograd.grad(second(h, factors[rank]), mine)
        return collectives.weighted(grad, ours.weight)[: counts[rank]]

    results = on_threads(3, run)

    weights = torch.tensor(counts) / total
    everything = x.clone().requires_grad_()
    loss = first(everything, (weights * factors).sum())
    (gradient,) = torch.autograd.grad(loss, everything, create_graph=True)
    h = [part / w for part, w in zip(gradient.split(counts), weights)]
    sum(
        w * second(*pair) for w, *pair in zip(weights[:2], h, factors)
    ).backward()
    torch.testing.assert_close(torch.cat(results), everything.grad)
