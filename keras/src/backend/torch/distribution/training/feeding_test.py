import types

import numpy as np
import pytest
import torch
import torch.distributed as dist

from keras.src.backend.torch import trainer
from keras.src.backend.torch.distribution.batch import same_data
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.training import feeding
from keras.src.backend.torch.distribution.training import whole_batches
from keras.src.distribution import distribution_lib
from keras.src.distribution.distribution_lib import DataParallel
from keras.src.distribution.distribution_lib import DeviceMesh
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.utils import rng_utils


def make_context(index, size=2, auto_shard=True):
    return types.SimpleNamespace(
        data_size=size,
        model_size=1,
        data_index=index,
        shards=list(range(size)),
        data_ranks=range(size),
        data_group=None,
        auto_shard=auto_shard,
    )


def arrays(total=10):
    x = np.arange(total * 2, dtype="float32").reshape(total, 2)
    return x, x[:, 0].copy()


def batches_of(adapter):
    adapter.on_epoch_begin()
    batches = list(adapter.get_torch_dataloader())
    adapter.on_epoch_end()
    return batches


def numbers(leaf):
    """The first column of a batch: a number for each row."""
    leaf = np.asarray(leaf)
    return (leaf[:, 0] if leaf.ndim > 1 else leaf).tolist()


SOURCES = {
    "arrays": lambda: {"x": arrays()[0], "y": arrays()[1], "batch_size": 4},
    "tensors": lambda: {
        "x": torch.tensor(arrays()[0]),
        "y": torch.tensor(arrays()[1]),
        "batch_size": 4,
    },
    "generator": lambda: {
        "x": (
            (x, y)
            for x, y in zip(
                np.split(arrays()[0], [4, 8]), np.split(arrays()[1], [4, 8])
            )
        )
    },
    "loader": lambda: {
        "x": torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(
                *[torch.tensor(a) for a in arrays()]
            ),
            batch_size=4,
        )
    },
}


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_shards_of_a_batch_are_those_of_one_device(source, shards, on_threads):
    expected = batches_of(get_data_adapter(**SOURCES[source]()))

    def run(rank):
        adapter = get_data_adapter(**SOURCES[source]())
        context = make_context(rank, shards)
        return batches_of(feeding.ShardedDataAdapter(adapter, context))

    ours = on_threads(shards, run)
    for batch, *pieces in zip(expected, *ours, strict=True):
        total = len(batch[0])
        for i in range(2):
            # A shard without rows is handed one that weighs nothing.
            ours = [numbers(p[0][i])[: p.rows.local] for p in pieces]
            assert sum(ours, []) == numbers(batch[i])
        for index, piece in enumerate(pieces):
            start, stop = rows.split(total, shards, index)
            assert piece.rows.local == stop - start
            assert len(piece[0][0]) == max(1, stop - start)
            assert (piece.rows.total, piece.rows.start) == (total, start)


@pytest.mark.parametrize("shuffle", [True, "batch"])
def test_shuffles_as_one_device(shuffle):
    x, y = arrays(32)

    def epochs(context):
        rng_utils.set_random_seed(7)
        adapter = get_data_adapter(x=x, y=y, batch_size=8, shuffle=shuffle)
        if context is not None:
            adapter = feeding.ShardedDataAdapter(adapter, context)
        batches = batches_of(adapter) + batches_of(adapter)
        return batches, torch.randint(1 << 30, ())

    expected, following = epochs(None)
    ours = [epochs(make_context(index)) for index in range(2)]
    assert numbers(expected[0][0]) != numbers(expected[4][0])
    for i, batch in enumerate(expected):
        pieces = [batches[i][0][0] for batches, _ in ours]
        assert sum(map(numbers, pieces), []) == numbers(batch[0])
    # What is drawn after an epoch is the same as well.
    assert [state for _, state in ours] == [following] * 2


def test_reads_our_rows_of_arrays_only(monkeypatch):
    read = []
    adapter = get_data_adapter(x=arrays()[0], batch_size=4)
    loader = adapter.get_torch_dataloader()
    getitems = loader.dataset.__getitems__

    def logged(indices):
        read.extend(indices)
        return getitems(indices)

    monkeypatch.setattr(loader.dataset, "__getitems__", logged, raising=False)
    monkeypatch.setattr(adapter, "get_torch_dataloader", lambda: loader)
    batches_of(feeding.ShardedDataAdapter(adapter, make_context(1)))
    assert read == [2, 3, 6, 7, 9]


def test_says_of_itself_what_its_adapter_says():
    x, y = arrays()
    adapter = get_data_adapter(x=x, y=y, batch_size=4)
    sharded = feeding.ShardedDataAdapter(adapter, make_context(0))
    assert sharded.num_batches == 3
    assert sharded.batch_size == 4
    assert sharded.has_partial_batch
    assert sharded.partial_batch_size == 2


def world_context(rank, size):
    context = make_context(rank, size, auto_shard=False)
    context.data_group = dist.group.WORLD
    return context


def test_local_rows_are_counted_over_processes(on_threads):
    sizes = ((4, 2), (4, 0), (1, 1))

    def run(rank):
        adapter = get_data_adapter(
            x=((np.ones((size, 2)),) for size in sizes[rank])
        )
        local = feeding.LocalDataAdapter(adapter, world_context(rank, 3))
        return [
            (len(b[0][0]), b.rows.local, b.rows.total)
            for b in batches_of(local)
        ]

    assert on_threads(3, run) == [
        [(size, size, total) for size, total in zip(ours, (9, 3))]
        for ours in sizes
    ]


def test_all_say_that_one_ran_out_of_batches(on_threads):
    def run(rank):
        adapter = types.SimpleNamespace(
            get_torch_dataloader=lambda: [np.ones((2, 2))] * (1 + rank)
        )
        local = feeding.LocalDataAdapter(adapter, world_context(rank, 2))
        loader = local.get_torch_dataloader()
        assert next(loader).rows.total == 4
        with pytest.raises(ValueError) as error:
            next(loader)
        return str(error.value)

    first, second = on_threads(2, run)
    for message in (first, second):
        assert "auto_shard_dataset=False" in message
        assert "1 of 2 processes ran out of data" in message
    assert "process 0 has none left" in first
    assert "process 1 has another batch" in second


def test_to_batch(on_threads):
    x, _ = arrays(5)
    batch = feeding.to_batch((x,), make_context(1))
    assert numbers(batch[0][0]) == numbers(x[3:])
    assert batch.rows.total == 5

    def run(rank):
        batch = feeding.to_batch((x[: 1 + rank],), world_context(rank, 2))
        return len(batch[0][0]), batch.rows.local, batch.rows.total

    assert on_threads(2, run) == [(1, 1, 3), (2, 2, 3)]


def data_parallel(**kwargs):
    mesh = DeviceMesh((2,), ["batch"], ["cpu:0", "cpu:1"])
    return DataParallel(device_mesh=mesh, **kwargs)


def test_data_adapter_puts_the_distribution_back(fake_world):
    fake_world(2)
    distribution = data_parallel()
    x, y = arrays()
    with distribution.scope():
        context = context_lib.current()
        adapter = feeding.data_adapter(context, x=x, y=y, batch_size=4)
        assert type(adapter) is feeding.ShardedDataAdapter
        assert distribution_lib.distribution() is distribution
        with pytest.raises(ValueError):
            feeding.data_adapter(context, x=x, y=y[:3], batch_size=4)
        assert distribution_lib.distribution() is distribution


def test_data_adapter_of_local_rows(fake_world, monkeypatch):
    fake_world(2)
    monkeypatch.setattr(same_data, "check_source", lambda *args: None)
    with data_parallel(auto_shard_dataset=False).scope():
        adapter = feeding.data_adapter(
            context_lib.current(), x=arrays()[0], batch_size=4
        )
    assert type(adapter) is feeding.LocalDataAdapter


@pytest.mark.parametrize("is_distributed", [True, False])
def test_epoch_iterator(fake_world, is_distributed):
    x, y = arrays()
    fake_world(2 if is_distributed else 1, rank=0)
    distribution = (
        data_parallel()
        if is_distributed
        else DataParallel(device_mesh=DeviceMesh((1,), ["batch"], ["cpu:0"]))
    )
    with distribution.scope():
        iterator = trainer.TorchEpochIterator(x, y, batch_size=4)
        assert (
            isinstance(iterator.data_adapter, feeding.ShardedDataAdapter)
            == is_distributed
        )
        with iterator.catch_stop_iteration():
            data = [data for _, _, data in iterator]
    sizes = [2, 2, 1] if is_distributed else [4, 4, 2]
    assert [len(batch[0][0]) for batch in data] == sizes
    assert all(isinstance(b, rows.Batch) == is_distributed for b in data)


@pytest.mark.parametrize(
    "source, auto_shard",
    [
        ("arrays", True),
        ("arrays", False),
        ("tensors", True),
        ("tensors", False),
        ("generator", True),
    ],
)
def test_arrays_are_copied_to_a_gpu_in_passing(
    source, auto_shard, on_threads, monkeypatch
):
    """From pinned memory, and without waiting. There need be no GPU."""
    said = []
    to = torch.Tensor.to

    def pin_memory(x):
        said.append("pinned")
        return x

    def copy(x, *args, **kwargs):
        if args and args[0] == "cuda:0":
            said.append(kwargs)
            return x
        return to(x, *args, **kwargs)

    kind = (
        feeding.ShardedDataAdapter if auto_shard else feeding.LocalDataAdapter
    )

    def run(rank):
        adapter = get_data_adapter(**SOURCES[source]())
        context = make_context(0, 1, auto_shard)
        return batches_of(kind(adapter, context))

    [expected] = on_threads(1, run)
    monkeypatch.setattr(whole_batches, "gpu", lambda: "cuda:0")
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    [actual] = on_threads(1, run)
    # Of three batches, x and y.
    assert said == ["pinned", {"non_blocking": True}] * 6
    for one, other in zip(actual, expected, strict=True):
        for a, b in zip(one[0], other[0], strict=True):
            assert torch.equal(a, b)


def test_a_whole_batch_is_cut_before_it_is_moved(on_threads, monkeypatch):
    moved = []
    to_device = whole_batches.to_device

    def logged(x):
        moved.append((type(x), len(x)))
        return to_device(x)

    monkeypatch.setattr(whole_batches, "to_device", logged)

    def run(rank):
        adapter = get_data_adapter(**SOURCES["generator"]())
        context = make_context(rank)
        return batches_of(feeding.ShardedDataAdapter(adapter, context))

    on_threads(2, run)
    # Of batches of 4, 4 and 2 rows, x and y, on each of two.
    assert sorted(n for _, n in moved) == [1] * 4 + [2] * 8
    assert {kind for kind, _ in moved} == {np.ndarray}
