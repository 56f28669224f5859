"""Batches of a `PyDataset`, each of which one process reads for all.

Of n processes each reads every n-th batch; then every one sends the others
their rows. So n batches take the time of one.

That is done where a dataset has `workers=2`, or more, or processes that work:
one device then reads several batches at once, ahead of the steps and in no
fixed order, so that what is read by an index depends on nothing but the index.
With one worker nobody can know: a dataset may draw from a generator of its own,
or be changed between two batches. There all read all, one after the other.

The first batch of an epoch is read by all. It tells whether they read the same
data, and whether reading draws on the random generators that all processes must
draw on alike; where it does, all read all, one after the other.
"""

import collections
import itertools
import logging

import torch
import torch.distributed as dist

from keras.src import tree
from keras.src.backend.torch import core
from keras.src.backend.torch.distribution.mesh import failures
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.training import exchange
from keras.src.backend.torch.distribution.training import random_states
from keras.src.backend.torch.distribution.training import whole_batches
from keras.src.trainers.data_adapters import py_dataset_adapter
from keras.src.trainers.data_adapters.py_dataset_adapter import OrderedEnqueuer
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDataset
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter

logger = logging.getLogger("keras.distribution")


class Agreed(rows.Batch):
    """A batch of which all processes know that all have it."""


def reading(adapter, context):
    """A `Reading` for the adapter of a `PyDataset` whose batches may be read in
    any order, by any process; else None.

    Args:
        adapter: Keras's data adapter.
        context: the `Context`.
    """
    if type(adapter) is not PyDatasetAdapter or not context.auto_shard:
        return None
    if dist.get_world_size() == 1 or adapter.num_batches is None:
        return None
    if adapter.enqueuer is None:
        name = type(adapter.py_dataset).__name__
        if context.says_first("read by all", name):
            logger.info(
                "Every process reads all batches of `%s`, one after the other, "
                "as one device does. With `workers=2` each reads some, and "
                "sends the others their rows.",
                name,
            )
        return None
    return Reading(adapter, context)


class Reading(torch.utils.data.IterableDataset):
    """The batches of an epoch, as `rows.Batch`.

    Collective, with the first batch of each `n` of n processes: every process
    iterates over it.

    Args:
        adapter: a `PyDatasetAdapter`, whose enqueuer gives indices from now on.
        context: the `Context`.
    """

    def __init__(self, adapter, context):
        self.adapter, self.context = adapter, context
        self.enqueuer = adapter.enqueuer  # of the batches
        dataset = adapter.py_dataset
        # In the order in which one device's enqueuer gives them, which keeps
        # what it has read ahead for the next epoch.
        adapter.enqueuer = OrderedEnqueuer(
            _Indices(dataset),
            max_queue_size=dataset.max_queue_size,
            shuffle=adapter.shuffle,
        )
        self._back = collections.deque()  # indices, read and not given
        self._is_over = False  # whether all read all batches

    def loader(self):
        """A loader, which draws a seed as one device's does."""
        return torch.utils.data.DataLoader(
            self, batch_size=None, collate_fn=whole_batches.as_it_is
        )

    def __iter__(self):
        indices = self._indices()
        if not self._is_over:
            index = next(indices, None)
            if index is None:
                return
            before = random_states.mark()
            first = self._whole(index)
            draws = random_states.mark() != before
            # All are to find the same.
            first.facts["batch, whether reading it draws"] = draws
            yield first
            if draws:
                # Threads would draw in another order on each process.
                self._end("it draws random numbers")
            else:
                yield from self._rounds(indices)
        yield from map(self._whole, indices)

    def _indices(self):
        """The indices of an epoch, in order."""
        enqueuer, number = self.adapter.enqueuer, self.adapter.num_batches
        enqueuer.start()
        given = enqueuer.get()
        for _ in range(number):
            yield self._back.popleft() if self._back else next(given)[0]
        enqueuer.stop()

    def _whole(self, index):
        data = self.adapter._standardize_batch(self.adapter.py_dataset[index])
        return whole_batches.cut_and_moved(data, self.context)

    def _end(self, reason):
        """From now on all read all, one after the other."""
        self._is_over = True
        logger.info(
            "Every process reads all batches of %s: %s.",
            type(self.adapter.py_dataset).__name__,
            reason,
        )

    def _rounds(self, indices):
        """Rounds in which each worker of each process reads a batch."""
        world, rank = dist.get_world_size(), dist.get_rank()
        workers = self.adapter.py_dataset.workers
        now = list(itertools.islice(indices, world * workers))
        if not now:
            return
        self.enqueuer._send_py_dataset()
        pool = self.enqueuer.executor_fn(py_dataset_adapter._SHARED_SEQUENCES)
        try:
            coming = self._begin(pool, now[rank::world])
            while now:
                reads = [self._read(each) for each in coming]
                following = list(itertools.islice(indices, world * workers))
                # They are read while this round's are computed on.
                coming = self._begin(pool, following[rank::world])
                for place in range(0, len(now), world):
                    mine = reads[place // world : place // world + 1]
                    part = now[place : place + world]
                    mine = mine[0] if mine else None
                    said, received = exchange.exchange(mine, part, self.context)
                    if said is None:
                        self._end("one is not made of arrays alone")
                        yield from map(self._whole, now[place:])
                        yield from map(self._whole, following)
                        return
                    for reader, index in enumerate(part):
                        batch = self._batch(index, reader, mine, said, received)
                        now[place + reader] = None
                        yield batch
                now, following = following, []
        except GeneratorExit:
            left = [i for i in (*now, *following) if i is not None]
            self._back.extendleft(reversed(left))
            raise
        finally:
            pool.terminate()
            py_dataset_adapter._SHARED_SEQUENCES[self.enqueuer.uid] = None

    def _begin(self, pool, indices):
        uid = self.enqueuer.uid
        return [
            pool.apply_async(py_dataset_adapter.get_index, (uid, index))
            for index in indices
        ]

    def _read(self, coming):
        """A batch that this process reads, or an `Exception`."""
        try:
            batch = self.adapter._standardize_batch(coming.get())
            with core.device_scope("cpu"):
                return exchange.Read(batch)
        except Exception as error:
            return error

    def _batch(self, index, reader, mine, said, received):
        skeleton = said[reader]
        if isinstance(skeleton, str):
            if isinstance(mine, Exception) and reader == dist.get_rank():
                raise mine
            text = f"Process {reader} could not read a batch: {skeleton}"
            raise failures.as_error({"rank": reader, "text": text})
        leaves = received[reader]
        data = tree.map_structure(
            lambda leaf: whole_batches.to_device(leaves[leaf.place]),
            skeleton,
            none_is_leaf=False,
        )
        total = exchange.total_of(skeleton)
        size, own = self.context.data_size, self.context.data_index
        return Agreed(
            data,
            rows.split_evenly(total, size, own),
            {"batch, order of its rows": (index, total)},
        )


class _Indices(PyDataset):
    """The indices of a dataset, in place of its batches."""

    def __init__(self, dataset):
        super().__init__()
        self.dataset = dataset

    @property
    def num_batches(self):
        return self.dataset.num_batches

    def __getitem__(self, index):
        return (index,)
