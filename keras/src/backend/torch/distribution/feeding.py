"""Batches for this process: cut from the global ones, or local already."""

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution import process_group
from keras.src.backend.torch.distribution import rows
from keras.src.distribution import distribution_lib
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.data_adapter import DataAdapter


class ShardedDataAdapter(DataAdapter):
    """Wraps the adapter that one device would use.

    Every process passes the same global data. Of arrays each process reads its
    own rows only; batches of any other source are cut after they are made.
    Shuffling draws on torch's global generator, whose state is the same on all
    processes, so that all see one permutation: that of one device.
    """

    def __init__(self, adapter, context):
        self.adapter = adapter
        self.context = context

    def get_torch_dataloader(self):
        loader = self.adapter.get_torch_dataloader()
        if isinstance(self.adapter, ArrayDataAdapter):
            # A loader too: it draws on the random state as one device's does.
            return torch.utils.data.DataLoader(
                _OurRows(loader.dataset, self.context),
                batch_sampler=loader.batch_sampler,
                collate_fn=loader.collate_fn,
            )
        return (rows.cut(batch, self.context) for batch in loader)

    @property
    def num_batches(self):
        return self.adapter.num_batches

    @property
    def batch_size(self):
        return self.adapter.batch_size

    @property
    def has_partial_batch(self):
        return self.adapter.has_partial_batch

    @property
    def partial_batch_size(self):
        return self.adapter.partial_batch_size

    def on_epoch_begin(self):
        self.adapter.on_epoch_begin()

    def on_epoch_end(self):
        self.adapter.on_epoch_end()


class LocalDataAdapter(ShardedDataAdapter):
    """Wraps an adapter whose rows are local already.

    Collective with every batch: the data shards agree on the global number of
    rows, and find out if one of them runs out of batches before the others.
    """

    def get_torch_dataloader(self):
        iterator = iter(self.adapter.get_torch_dataloader())
        while True:
            batch = next(iterator, None)
            self._check_all_have_one(batch is not None)
            if batch is None:
                return
            local = rows.count(batch)
            yield rows.Batch(batch, rows.agree_on_total(local, self.context))

    def _check_all_have_one(self, has_one):
        counts = torch.tensor([int(has_one)])
        dist.all_reduce(counts)
        world = dist.get_world_size()
        if int(counts) not in (0, world):
            raise ValueError(
                "With `auto_shard_dataset=False` every process must have the "
                f"same number of batches. {world - int(counts)} of {world} "
                "processes ran out of data before the others; process "
                f"{process_group.process_id()} "
                f"{'has another batch' if has_one else 'has none left'}."
            )


class _OurRows(torch.utils.data.Dataset):
    """Reads our rows of the global batches of an array dataset."""

    def __init__(self, dataset, context):
        self.dataset = dataset
        self.context = context

    def __getitems__(self, indices):
        total = len(indices)
        start, stop = rows.split(
            total, self.context.data_size, self.context.data_index
        )
        ours = rows.Rows(stop - start, total, start)
        start, stop = rows.with_a_row(start, stop)
        data = self.dataset.__getitems__(indices[start:stop])
        return rows.Batch(data, ours)

    def __len__(self):
        return len(self.dataset)


def data_adapter(context, **arguments):
    """The adapter for `fit`'s arguments under a distribution.

    The adapter inside is made as if there were no distribution: released Keras
    refuses anything but a `tf.data.Dataset` for several processes.
    """
    distribution = distribution_lib.distribution()
    distribution_lib.set_distribution(None)
    try:
        adapter = data_adapters.get_data_adapter(**arguments)
    finally:
        distribution_lib.set_distribution(distribution)
    if context.auto_shard:
        return ShardedDataAdapter(adapter, context)
    check_same_number_of_batches(adapter, arguments.get("steps_per_epoch"))
    return LocalDataAdapter(adapter, context)


def check_same_number_of_batches(adapter, steps_per_epoch):
    """Raises where processes would take different numbers of local batches.

    One that knows its number does not ask for a batch beyond it, so that the
    others would wait for it.

    Collective: every process calls it.
    """
    numbers = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, (adapter.num_batches, steps_per_epoch))
    if any(other != numbers[0] for other in numbers):
        batches, steps = zip(*numbers)
        raise ValueError(
            "With `auto_shard_dataset=False` every process must have the same "
            "number of batches and of steps. Received, from process 0 on: "
            f"batches={list(batches)}, steps_per_epoch={list(steps)}"
        )


def to_batch(data, context):
    """The `rows.Batch` of what `train_on_batch` and its like are handed.

    Collective with `auto_shard_dataset=False`: every process calls it.

    Args:
        data: nested arrays, global rows or local ones as the distribution
            says.
    """
    if context.auto_shard:
        return rows.cut(data, context)
    local = rows.count(data)
    return rows.Batch(data, rows.agree_on_total(local, context))
