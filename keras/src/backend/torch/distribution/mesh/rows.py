"""Rows of a batch: which are local, and what they weigh.

A loss or a regulariser on a data shard is a mean over local rows. The global
value is the mean over data shards, weighted with their share of the rows: the
shares add up to 1, for uneven batches too. So whatever does not depend on rows
(weight regularisers) counts once.

Gradients are a weighted mean over data shards too. In a step of Keras's own
code the weight is the share. Where user code computes on the global
batch (see `global_rows`), rows of several batches may meet, so there all shards
weigh the same, and the loss of a shard is made to fit.
"""

import contextlib
import functools
import itertools

import torch
import torch.distributed as dist

from keras.src import tree
from keras.src.backend.torch.distribution.mesh.context import current


class Rows:
    """How the rows of one batch are spread over the data shards.

    Args:
        counts: tuple of ints, the rows of each data shard, in order.
        index: int, the data shard of this process.
        entries: int, how many entries of a dim belong to one row.

    Attributes:
        local: number of entries on this data shard.
        total: number of entries on all data shards.
        start: our first entry among all.
        share: our part of them, 0 to 1.
        weight: what gradients of local rows count with; None for the share.
        context: the `Context`, where user code computes on all rows.
    """

    weight_of_gradients = None
    context = None

    def __init__(self, counts, index, entries=1):
        self.counts, self.index, self.entries = tuple(counts), index, entries
        self.local = self.counts[index] * entries
        self.total = sum(self.counts) * entries
        self.start = sum(self.counts[:index]) * entries
        self._of = {entries: self}

    @property
    def group(self):
        """The process group of the data axis."""
        return self.context.data_group

    @property
    def has_empty(self):
        """Whether some data shard has no rows."""
        return not min(self.counts)

    @property
    def share(self):
        return self.local / self.total if self.total else 0.0

    @property
    def weight(self):
        if self.weight_of_gradients is None:
            return self.share
        return self.weight_of_gradients

    def with_entries(self, entries):
        """The same rows in a dim with so many entries for each."""
        known = self._of.get(entries)
        if known is None:
            known = self._of[entries] = Rows(self.counts, self.index, entries)
            known._of = self._of
            known.weight_of_gradients = self.weight_of_gradients
            known.context = self.context
        return known

    def cut(self, x, dim):
        """Our entries (a view) of a whole tensor along `dim`."""
        return x.narrow(dim, self.start, self.local)

    def ranges(self):
        """Where the entries of each data shard start and stop among all."""
        stops = [n * self.entries for n in itertools.accumulate(self.counts)]
        return list(zip([0, *stops], stops))


class Batch(list):
    """The `[data]` that Keras hands to a train function, with its rows.

    Args:
        data: nested arrays.
        rows: the `Rows`.
        facts: dict, of the batch that processes must have in common: see
            `agreement`.
    """

    def __init__(self, data, rows, facts=None):
        super().__init__([data])
        self.rows = rows
        self.facts = facts or {}


def context_of_local_rows():
    """The `Context` where local rows of a batch that is spread over several
    data shards are computed on, else None."""
    if _current[0] is None:
        return None
    context = current()
    return context if context and context.data_size > 1 else None


# The rows of the step under way. Not local to a thread, since the backward
# hooks that read it may run in autograd's own threads.
_current = [None]


@contextlib.contextmanager
def current_rows(rows):
    """Within it, losses and gradients are those of this batch."""
    previous, _current[0] = _current[0], rows
    try:
        yield
    finally:
        _current[0] = previous


def get_current_rows():
    """The `Rows` of the batch of the step under way, None outside of one."""
    return _current[0]


def weight(context):
    """What our gradients count with: 1 / data shards outside of a step."""
    rows = _current[0]
    return 1.0 / context.data_size if rows is None else rows.weight


def share(context):
    """Our share of the global batch: 1 / data shards outside of a step."""
    rows = _current[0]
    return 1.0 / context.data_size if rows is None else rows.share


def has_rows():
    """Whether this process has rows, so that what it computes counts."""
    rows = _current[0]
    return rows is None or bool(rows.local)


def split_evenly(total, shards, index):
    """The `Rows` of a batch that is cut by `split`."""
    return Rows(_even_counts(total, shards), index)


# Thousands of shards have the same rows in nearly each step.
@functools.lru_cache(maxsize=64)
def _even_counts(total, shards):
    size, rest = divmod(total, shards)
    return (size + 1,) * rest + (size,) * (shards - rest)


def split(total, shards, index):
    """Where local rows start and stop; shards differ by one row at most.

    >>> [split(7, 3, i) for i in range(3)]
    [(0, 3), (3, 5), (5, 7)]
    """
    size, rest = divmod(total, shards)
    start = index * size + min(index, rest)
    return start, start + size + (index < rest)


def count(data):
    """Rows of a nested batch: the length of its first array."""
    for leaf in tree.flatten(data):
        if leaf is not None:
            return leaf.shape[0] if len(leaf.shape) else 1
    return 0


def cut(data, context):
    """Local rows of a global batch, as a `Batch`.

    Args:
        data: nested structure of arrays or tensors, all with the global
            number of rows in dim 0. With one data shard, any.

    Raises:
        ValueError: if an array has another number of rows.
    """
    total = count(data)
    if context.data_size == 1:
        return Batch(data, split_evenly(total, 1, 0))
    start, stop = split(total, context.data_size, context.data_index)

    def local_of(x):
        if x is None:
            return None
        if not len(x.shape) or x.shape[0] != total:
            leaves = [leaf for leaf in tree.flatten(data) if leaf is not None]
            raise ValueError(
                "Where batches are split, all arrays of a batch must have the "
                "same number of rows. Received arrays of the shapes: "
                f"{[tuple(leaf.shape) for leaf in leaves]}"
            )
        return x[start:stop]

    rows = split_evenly(total, context.data_size, context.data_index)
    start, stop = with_a_row(start, stop)
    return Batch(tree.map_structure(local_of, data), rows)


def with_a_row(start, stop):
    """Our range of rows, or the first row where we have none.

    Much code fails on no rows. A process without any computes on a row that
    is not its own and that weighs nothing: `Rows.local` is 0.
    """
    return (start, stop) if stop > start else (0, 1)


def agree(local, context):
    """`Rows` of a batch whose rows were local from the start.

    Collective: every process of the data axis calls it.
    """
    if context.data_group is None:
        return Rows([local], 0)
    return Rows(counts(local, context.data_group), context.data_index)


def counts(local, group):
    """The number of rows of every process of a group, in its order.

    Collective: every process of `group` calls it.
    """
    mine = torch.tensor([local])
    everyone = mine.new_empty(dist.get_world_size(group))
    dist.all_gather_single(everyone, mine, group=group)
    return everyone.tolist()
