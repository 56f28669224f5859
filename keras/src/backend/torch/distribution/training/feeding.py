"""Batches for this process: cut from the global ones, or local already."""

import functools

import numpy as np
import torch

from keras.src import tree
from keras.src.backend.torch.distribution.batch import same_data
from keras.src.backend.torch.distribution.global_rows import borders
from keras.src.backend.torch.distribution.mesh import agreement
from keras.src.backend.torch.distribution.mesh import failures
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.training import by_index
from keras.src.backend.torch.distribution.training import own_rows
from keras.src.backend.torch.distribution.training import whole_batches
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.data_adapter import DataAdapter
from keras.src.trainers.data_adapters.torch_data_loader_adapter import (
    TorchDataLoaderAdapter,
)


class ShardedDataAdapter(DataAdapter):
    """Wraps the adapter that one device would use.

    Every process passes the same global data. Of arrays, and of the dataset of
    a `DataLoader`, each process reads its own rows only; batches of any other
    source are cut after they are made. Shuffling draws on torch's global
    generator, whose state is the same on all processes, so that all see one
    permutation: that of one device.
    """

    def __init__(self, adapter, context):
        self.adapter = adapter
        self.context = context
        self._loader = None  # A user's, whose workers may outlive an epoch.
        self._reading = by_index.reading(adapter, context)

    def get_torch_dataloader(self):
        """An iterable of `rows.Batch`.

        Collective with every batch, but for arrays: every process reads it.
        """
        if self._reading is not None:
            return self._together(iter(self._reading.loader()))
        loader = self.adapter.get_torch_dataloader()
        if isinstance(self.adapter, ArrayDataAdapter):
            # A loader too: it draws on the random state as one device's does.
            dataset = own_rows.OurRows(
                own_rows.arrays_of(loader), self.context, draws=False
            )
            return torch.utils.data.DataLoader(
                dataset,
                batch_sampler=own_rows.sliced(loader.batch_sampler),
                collate_fn=functools.partial(
                    own_rows.collate_ours, loader.collate_fn
                ),
            )
        # Now, not with the first batch: here one device's loader draws a seed.
        return self._together(iter(self._reading_less(loader)))

    def _reading_less(self, loader):
        """A loader that reads local rows only, if that is possible."""
        # A subclass, or a collate function of the user's, may look at all rows
        # of a batch: to pad them to the longest, say.
        if (
            type(loader) is torch.utils.data.DataLoader
            and isinstance(self.adapter, TorchDataLoaderAdapter)
            and not isinstance(loader.dataset, torch.utils.data.IterableDataset)
            and loader.batch_sampler is not None
            and loader.collate_fn is torch.utils.data.default_collate
        ):
            if self._loader is None:
                self._loader = own_rows.loader_of_our_rows(loader, self.context)
            return self._loader
        return whole_batches.cutting(loader, self.context)

    def _together(self, iterator):
        """Batches as long as all processes have one; errors are raised by all.

        Collective with every batch: every process calls it.
        """
        while True:
            batch = error = None
            facts = {}
            try:
                batch = next(iterator, None)
                if batch is not None:
                    batch = self._batch_of(batch)
                    facts = batch.facts
            except Exception as e:
                error = e
            if isinstance(batch, by_index.Agreed):
                yield batch
                continue
            size = same_data.NONE
            if error is not None:
                size = same_data.FAILED
                failures.tell(error)
            elif batch is not None:
                size = batch.rows.total
            said = same_data.exchange(size, facts, self.context)
            if said is None:
                sizes, digests = [size], None
            else:
                sizes, digests = said
            if same_data.FAILED in sizes:
                failed = sizes.index(same_data.FAILED)
                raise error or failures.error_of(
                    failed, "could not read a batch"
                )
            if same_data.NONE in sizes:
                same_data.check_all_ended(sizes, self.context)
                return
            batch = self._agreed(batch, sizes)
            if digests is not None:
                same_data.check_rows(batch.facts, digests, self.context)
            yield batch

    def _batch_of(self, data):
        if isinstance(data, rows.Batch):
            return data
        return whole_batches.cut(data, self.context)

    def _agreed(self, batch, sizes):
        if any(size != sizes[0] for size in sizes):
            raise ValueError(
                "With `auto_shard_dataset=True` every process must pass the "
                "same data. Received batches of different sizes, from process "
                f"0 on: {sizes}"
            )
        return batch

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


class GlobalShapes:
    """Batches of local rows, as batches of the shapes of the global ones, for
    layers to be built for.

    Args:
        iterator: gives triples of the first and last step, and `rows.Batch`.
    """

    def __init__(self, iterator):
        self.iterator = iterator

    def __iter__(self):
        for first, last, batch in self.iterator:
            total = batch.rows.total
            yield (
                first,
                last,
                [tree.map_structure(lambda x: _global(x, total), batch[0])],
            )


def _global(x, total):
    if x is None or not len(x.shape):
        return x
    shape = (total, *x.shape[1:])
    if isinstance(x, torch.Tensor):
        return torch.empty(shape, dtype=x.dtype, device="meta")
    return np.broadcast_to(np.empty((), x.dtype), shape)


class LocalDataAdapter(ShardedDataAdapter):
    """Wraps an adapter whose rows are local already.

    Collective with every batch: the data shards agree on the global number of
    rows, and find out if one of them runs out of batches before the others.
    """

    def get_torch_dataloader(self):
        loader = self.adapter.get_torch_dataloader()
        if isinstance(self.adapter, ArrayDataAdapter):
            loader = torch.utils.data.DataLoader(
                own_rows.arrays_of(loader),
                batch_sampler=loader.batch_sampler,
                collate_fn=loader.collate_fn,
            )
        return self._together(iter(loader))

    def _batch_of(self, data):
        # Of the other data shards, `_agreed` tells.
        local_rows = rows.Rows([rows.count(data)], 0)
        return rows.Batch(data, local_rows, agreement.facts_of_batch(data))

    def _agreed(self, batch, sizes):
        if len(sizes) == 1:
            counts = sizes * self.context.data_size
        else:
            # The processes of a data shard have the same rows.
            counts = [sizes[rank] for rank in self.context.data_ranks]
        batch.rows = rows.Rows(counts, self.context.data_index)
        return batch


def data_adapter(context, **arguments):
    """The adapter for `fit`'s arguments under a distribution."""
    adapter = data_adapters.get_data_adapter(**arguments)
    arrays = None
    if isinstance(adapter, ArrayDataAdapter):
        arrays = [arguments.get(name) for name in agreement.PARTS_OF_DATA]
    steps = arguments.get("steps_per_epoch")
    same_data.check_source(adapter, steps, arrays, context)
    if context.auto_shard:
        same_data.check_sampler(adapter)
        return ShardedDataAdapter(adapter, context)
    return LocalDataAdapter(adapter, context)


def generators_of(adapter):
    """The generators of torch's that a user's `DataLoader` draws by."""
    adapter = getattr(adapter, "adapter", adapter)
    loader = getattr(adapter, "_dataloader", None)
    found = {}
    for name in (None, "sampler", "batch_sampler"):
        owner = loader if name is None else getattr(loader, name, None)
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def to_batch(data, context):
    """The `rows.Batch` of what `train_on_batch` and its like are handed.

    Collective with `auto_shard_dataset=False`, and within a step: every
    process calls it.

    Args:
        data: nested arrays, global rows or local ones as the distribution
            says. What a step hands to another model's is local: the step has
            been handed no other rows.
    """
    if modes.step is not None:
        return borders.batch_of(data, context)
    outer = rows.get_current_rows()
    if outer is None and context.auto_shard:
        return whole_batches.cut(data, context)
    local = rows.count(data)
    if outer is not None and not outer.local:
        local = 0  # What is computed without rows does not count.
    return rows.Batch(data, rows.agree(local, context))
