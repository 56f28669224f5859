"""Rows of a batch: which are ours, and what they weigh.

A loss or a regulariser on a data shard is a mean over local rows. The global
value is the weighted mean over data shards, with weight (local rows) / (global
rows): the weights of all shards add up to 1, for uneven batches too. Gradients
are the same weighted mean. So whatever does not depend on rows (weight
regularisers) counts once, and a mean over rows that a user wrote by hand is
right without knowing about it.
"""

import contextlib
import itertools

import torch
import torch.distributed as dist

from keras.src import tree
from keras.src.backend.torch.distribution import collectives
from keras.src.backend.torch.distribution import sharded


class Rows:
    """The rows of one batch.

    Attributes:
        local: number of rows on this data shard.
        total: number of rows on all data shards.
        start: our first row among all; None if rows were local from the start.
    """

    def __init__(self, local, total, start=None):
        self.local = local
        self.total = total
        self.start = start

    @property
    def weight(self):
        return self.local / self.total if self.total else 0.0


class Batch(list):
    """The `[data]` that Keras hands to a train function, with its rows."""

    def __init__(self, data, rows):
        super().__init__([data])
        self.rows = rows


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
    """Our share of the global batch: 1 / data shards outside of a step."""
    rows = _current[0]
    return 1.0 / context.data_size if rows is None else rows.weight


def split(total, shards, index):
    """Where our rows start and stop; shards differ by one row at most.

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
            return leaf.shape[0]
    return 0


def cut(data, context):
    """Our rows of a global batch, as a `Batch`.

    Args:
        data: nested structure of arrays or tensors, all with the global
            number of rows in dim 0.
    """
    total = count(data)
    start, stop = split(total, context.data_size, context.data_index)

    def ours(x):
        if x is None:
            return None
        if x.shape[0] != total:
            raise ValueError(
                "All arrays of a batch must have the same number of rows. "
                f"Received: {total} and {x.shape[0]}"
            )
        return x[start:stop]

    rows = Rows(stop - start, total, start)
    start, stop = with_a_row(start, stop)
    return Batch(tree.map_structure(ours, data), rows)


def with_a_row(start, stop):
    """Our range of rows, or the first row where we have none.

    Much code fails on no rows. A process without any computes on a row that
    is not its own and that weighs nothing: `Rows.local` is 0.
    """
    return (start, stop) if stop > start else (0, 1)


def agree_on_total(local, context):
    """`Rows` of a batch whose rows were local from the start.

    Collective: every process of the data axis calls it.
    """
    total = torch.tensor([local], dtype=torch.int64)
    if context.data_group is not None:
        dist.all_reduce(total, group=context.data_group)
    return Rows(local, int(total.item()))


def ranges(context):
    """Where the rows of each data shard start and stop among all.

    Collective if rows were local from the start: every process of the data
    axis calls it.
    """
    rows = get_current_rows()
    shards = context.data_size
    if rows.start is not None:
        return [split(rows.total, shards, i) for i in range(shards)]
    stops = list(itertools.accumulate(counts(rows.local, context.data_group)))
    return list(zip([0, *stops], stops))


def gather(x, context):
    """All rows, in order, of a tensor that holds our rows.

    Collective: every process of the data axis calls it, with the rows of
    `current_rows`.

    Args:
        x: tensor of shape `(local rows, ...)`.

    Returns:
        Tensor of shape `(global rows, ...)`.
    """
    sizes = [stop - start for start, stop in ranges(context)]
    x = x[: sizes[context.data_index]]
    padded = x.new_zeros((max(sizes), *x.shape[1:]))
    padded[: x.shape[0]] = x
    pieces = collectives.of_each_process(padded, context.data_group)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes)])


class GatherForLoss(torch.autograd.Function):
    """All rows, for a loss that looks at those of other shards.

    Collective, forward and backward. A gradient on shard i belongs to the loss
    of shard i: as in `collectives.SumOverData`, our rows get
    (sum of weight_i * gradient_i) / (our weight).
    """

    @staticmethod
    def forward(ctx, x, context):
        ctx.context, ctx.rows = context, len(x)
        ctx.weight = get_current_rows().weight
        ctx.ours = ranges(context)[context.data_index]
        return gather(x, context)

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad)
        grad = collectives.MeanOfLosses.apply(
            grad, ctx.weight, ctx.context.data_group
        )
        # Without rows of ours it is zero, for what we computed on instead.
        start, stop = ctx.ours if ctx.weight else (0, ctx.rows)
        return grad[start:stop], None


def counts(local, group):
    """The number of rows of every process of a group, in its order.

    Collective: every process of `group` calls it.
    """
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, local, group=group)
    return everyone


def assemble(batch, counts, mesh, axis, placements):
    """A global batch, as a DTensor, from the rows of each process.

    Collective if the processes' rows are not those that the placements give
    them (shards of `torch.chunk`'s sizes): every process of the axis calls it.
    """
    total = sum(counts)
    shape = (total, *batch.shape[1:])
    width = -(-total // len(counts))
    expected = [
        max(0, min(width, total - i * width)) for i in range(len(counts))
    ]
    group = mesh.get_group(axis)
    if counts != expected:
        everything = [None] * len(counts)
        dist.all_gather_object(everything, batch.cpu(), group=group)
        whole = torch.cat(everything).to(batch.device)
        start, stop = collectives.shard_range(
            total, len(counts), dist.get_rank(group)
        )
        batch = whole[start:stop]
    for other, placement in enumerate(placements):
        if other != axis and placement.is_shard():
            batch = collectives.shard_of(
                batch, placement.dim, mesh.get_group(other)
            )
    return sharded.wrap(batch.contiguous(), mesh, placements, shape)
