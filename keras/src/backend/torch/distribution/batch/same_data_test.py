import types

import numpy as np
import pytest

from keras.src.backend.torch.distribution.batch import same_data


def make_context(shards, auto_shard=True):
    return types.SimpleNamespace(
        shards=shards,
        auto_shard=auto_shard,
        model_size=len(shards) // len(set(shards)),
    )


def adapter_of(num_batches):
    return types.SimpleNamespace(
        num_batches=num_batches, batch_size=4, partial_batch_size=None
    )


def outcomes(on_threads, world, function):
    def run(rank):
        try:
            function(rank)
        except ValueError as error:
            return str(error)
        return "same"

    return on_threads(world, run)


@pytest.mark.parametrize("auto_shard", [True, False])
def test_numbers_of_batches(on_threads, auto_shard):
    context = make_context([0, 1, 2], auto_shard)

    def check(rank):
        same_data.check_source(adapter_of((3, 3, 2)[rank]), None, None, context)

    for text in outcomes(on_threads, 3, check):
        assert "batches=[3, 3, 2], steps_per_epoch=[None, None, None]" in text
        assert ("batch_size=[4, 4, 4]" in text) == auto_shard
    outcome = outcomes(
        on_threads,
        3,
        lambda rank: same_data.check_source(adapter_of(3), 2, None, context),
    )
    assert outcome == ["same"] * 3


def test_arrays(on_threads):
    x = np.random.default_rng(0).standard_normal((500, 3))

    def check(rank, context, of_rank):
        arrays = [of_rank[rank], None, None]
        same_data.check_source(adapter_of(3), None, arrays, context)

    def run(context, of_rank):
        return outcomes(
            on_threads, 4, lambda rank: check(rank, context, of_rank)
        )

    whole = make_context([0, 0, 1, 1])
    assert run(whole, [x] * 4) == ["same"] * 4
    for other in (x[::-1], x + 1, x.astype("float32")[:, ::-1], x[:, :2]):
        for text in run(whole, [x, x, other, x]):
            assert "in the data" in text and "on process 2" in text
    local = make_context([0, 0, 1, 1], auto_shard=False)
    assert run(local, [x, x, x + 1, x + 1]) == ["same"] * 4
    for text in run(local, [x, x, x + 1, x]):
        assert "on process 2" in text and "process 0" not in text
