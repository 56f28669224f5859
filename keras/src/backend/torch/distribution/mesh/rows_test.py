import types

import numpy as np
import pytest
import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.batch import gathers
from keras.src.backend.torch.distribution.mesh import rows


def make_context(shards, index):
    return types.SimpleNamespace(
        data_size=shards, data_index=index, data_group=None
    )


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("total", [0, 1, 2, 3, 4, 7, 8, 29, 64])
def test_split_gives_every_row_once_and_is_balanced(total, shards):
    pieces = [rows.split(total, shards, i) for i in range(shards)]
    ours = [row for start, stop in pieces for row in range(start, stop)]
    assert ours == list(range(total))
    sizes = [stop - start for start, stop in pieces]
    assert max(sizes) - min(sizes) <= 1
    # `gather` pads to the size of the first one.
    assert sizes[0] == max(sizes)


def test_split_of_fewer_rows_than_shards():
    assert [rows.split(2, 4, i) for i in range(4)] == [
        (0, 1),
        (1, 2),
        (2, 2),
        (2, 2),
    ]


@pytest.mark.parametrize("total", [1, 3, 4, 6, 9])
def test_weights_of_all_shards_add_up_to_one(total):
    weights = []
    for index in range(4):
        weights.append(rows.split_evenly(total, 4, index).weight)
    assert sum(weights) == pytest.approx(1)
    assert weights[0] == -(-total // 4) / total


def test_weight_of_an_empty_batch():
    assert rows.Rows([0, 0], 0).weight == 0.0


def test_weight_outside_of_a_step_is_equal_for_all_shards():
    assert rows.weight(make_context(4, 1)) == 0.25


def test_current_rows():
    outer, inner = rows.Rows([1, 3], 0), rows.Rows([1, 3], 1)
    assert rows.get_current_rows() is None
    with rows.current_rows(outer):
        with pytest.raises(KeyError):
            with rows.current_rows(inner):
                assert rows.weight(make_context(2, 0)) == 0.75
                raise KeyError
        assert rows.get_current_rows() is outer
        assert rows.weight(make_context(2, 0)) == 0.25
    assert rows.get_current_rows() is None


def test_count():
    assert rows.count((None, {"a": np.zeros((3, 2))})) == 3
    assert rows.count((np.zeros((0, 2)), None)) == 0
    assert rows.count(None) == 0


def test_cut_keeps_the_structure():
    x = np.arange(10).reshape(5, 2)
    y = torch.arange(5)
    batches = [
        rows.cut(({"x": x}, y, None), make_context(3, i)) for i in range(3)
    ]
    for batch, (start, stop) in zip(batches, [(0, 2), (2, 4), (4, 5)]):
        ((features, labels, weights),) = batch
        np.testing.assert_array_equal(features["x"], x[start:stop])
        assert labels.tolist() == list(range(start, stop))
        assert weights is None
        assert batch.rows.local == stop - start
        assert (batch.rows.total, batch.rows.start) == (5, start)


def test_cut_of_arrays_of_different_lengths():
    with pytest.raises(
        ValueError, match=r"same number of rows.*\(4,\), \(3,\)"
    ):
        rows.cut((np.zeros(4), np.zeros(3)), make_context(2, 0))


@pytest.mark.parametrize("total", [1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_gather_undoes_cut(on_threads, total, dtype):
    x = (torch.arange(total * 2).reshape(total, 2) % 3).to(dtype)
    contexts = [make_context(3, rank) for rank in range(3)]
    batches = [rows.cut(x, context) for context in contexts]

    def gather(rank):
        with rows.current_rows(batches[rank].rows):
            return gathers.gather(batches[rank][0], contexts[rank])

    for result in on_threads(3, gather):
        assert result.dtype == dtype
        assert torch.equal(result, x)


def test_agree(on_threads):
    def agree(rank):
        context = make_context(3, rank)
        context.data_group = dist.group.WORLD
        return rows.agree([4, 0, 1][rank], context)

    results = on_threads(3, agree)
    assert [r.local for r in results] == [4, 0, 1]
    assert [r.total for r in results] == [5, 5, 5]
    assert [r.start for r in results] == [0, 4, 4]


def test_counts(on_threads):
    everyone = on_threads(3, lambda rank: rows.counts(rank * 2, None))
    assert everyone == [[0, 2, 4]] * 3


def test_entries_of_rows():
    ours = rows.Rows([3, 2], 1)
    steps = ours.with_entries(4)
    assert (steps.local, steps.total, steps.start) == (8, 20, 12)
    assert steps.ranges() == [(0, 12), (12, 20)]
    assert steps.with_entries(1) is ours and ours.with_entries(4) is steps
    assert steps.cut(torch.arange(20), 0).tolist() == list(range(12, 20))


def test_gradients_may_weigh_alike():
    ours = rows.Rows([3, 1], 0)
    ours.weight_of_gradients = 0.5
    with rows.current_rows(ours):
        assert rows.weight(make_context(2, 0)) == 0.5
        assert rows.share(make_context(2, 0)) == 0.75
    assert ours.with_entries(2).weight == 0.5
