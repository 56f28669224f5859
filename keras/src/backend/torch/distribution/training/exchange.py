"""Batches that one process has read: every one is sent its rows of them."""

import dataclasses
import pickle
import zlib

import numpy as np
import torch
import torch.distributed as dist

from keras.src import tree
from keras.src.backend.torch import core
from keras.src.backend.torch.distribution.mesh import rows


@dataclasses.dataclass
class Leaf:
    """An array of a batch, without its numbers; which one in a list of them."""

    place: int
    shape: tuple
    dtype: torch.dtype

    def part(self, start, stop):
        """How many rows, and bytes, a range of rows has."""
        shape = (stop - start, *self.shape[1:])
        return shape, int(np.prod(shape)) * self.dtype.itemsize


class Read:
    """A batch that this process has read.

    Attributes:
        skeleton: the batch, with a `Leaf` for each array.
        leaves: list of the arrays, as tensors of the host.
    """

    def __init__(self, batch):
        self.leaves = []
        # As Keras does: None is no array.
        self.skeleton = tree.map_structure(
            self._take, batch, none_is_leaf=False
        )

    def _take(self, x):
        x = core.convert_to_tensor(x)
        if x.device.type != "cpu" or x.layout is not torch.strided:
            raise NotSent(f"an array on {x.device}, {x.layout}")
        self.leaves.append(x.detach())
        return Leaf(len(self.leaves) - 1, tuple(x.shape), x.dtype)


class NotSent(Exception):
    """What one process cannot send to others."""


def exchange(mine, indices, context):
    """Sends each process its rows of what this one has read.

    Collective: every process calls it.

    Args:
        mine: a `Read`, an error, or None for no batch.
        indices: list, of what all processes have read.
        context: the `Context`.

    Returns:
        Tuple of what each process has read, by rank (nested `Leaf`s, the text
        of an error, or None), and lists of our rows of each; a pair of None
        if some cannot be sent.
    """
    said = [None] * dist.get_world_size()
    state = zlib.crc32(torch.get_rng_state().numpy())
    dist.all_gather_object(said, (_described(mine, context), state, indices))
    said, states, orders = zip(*said)
    if any(order != indices for order in orders):
        raise ValueError(
            "Every process must read the same batches of a `PyDataset`, in one "
            f"order. Received, from process 0 on: {orders[:8]}"
        )
    if len(set(states)) > 1:
        raise ValueError(
            "A `PyDataset` with several workers must draw random numbers of "
            "torch's for every batch or for none, so that all processes draw "
            "the same. It drew none for its first batch. Draw in a layer, or "
            "from a generator of your own."
        )
    if any(isinstance(skeleton, NotSent) for skeleton in said):
        return None, None
    ours = [_sizes(skeleton, context, context.data_index) for skeleton in said]
    leaves = mine.leaves if isinstance(mine, Read) else []
    pieces, given = [], []
    for shard in context.shards:
        start, stop = _range(said[dist.get_rank()], context, shard)
        parts = [
            (leaf[start:stop] if leaf.ndim and stop else leaf)
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            for leaf in leaves
        ]
        pieces += parts
        given.append(sum(len(part) for part in parts))
    taken = [sum(size for _, _, size in sizes) for sizes in ours]
    sent = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
    received = torch.empty(sum(taken), dtype=torch.uint8)
    dist.all_to_all_single(received, sent, taken, given)
    numbers = iter(received.split([size for x in ours for _, _, size in x]))
    return said, [
        # Copies: of their own memory, which is aligned.
        [
            next(numbers).clone().view(dtype).view(shape)
            for shape, dtype, _ in sizes
        ]
        for sizes in ours
    ]


def _described(mine, context):
    if isinstance(mine, NotSent):
        return mine
    if isinstance(mine, Exception):
        return f"{type(mine).__name__}: {mine}"
    if mine is None:
        return None
    skeleton = mine.skeleton
    leaves = _leaves(skeleton)
    if not leaves or (
        context.data_size > 1
        and any(leaf.shape[:1] != (total_of(skeleton),) for leaf in leaves)
    ):
        # All say so where they cut it.
        return NotSent()
    try:
        pickle.dumps(skeleton)
    except Exception:
        # A class of the user's that others may not find.
        return NotSent()
    return skeleton


def _leaves(skeleton):
    if skeleton is None or isinstance(skeleton, str):
        return []
    found = [x for x in tree.flatten(skeleton) if x is not None]
    return sorted(found, key=lambda leaf: leaf.place)


def total_of(skeleton):
    shape = _leaves(skeleton)[0].shape
    return shape[0] if shape else 1


def _range(skeleton, context, shard):
    """Rows of a data shard; 0 and 0 for all that there is."""
    if context.data_size == 1 or not _leaves(skeleton):
        return 0, 0
    total = total_of(skeleton)
    start, stop = rows.split(total, context.data_size, shard)
    start, stop = rows.with_a_row(start, stop)
    return start, min(stop, total)


def _sizes(skeleton, context, shard):
    """Shape, dtype and bytes of what a data shard is sent of each array."""
    start, stop = _range(skeleton, context, shard)
    found = []
    for leaf in _leaves(skeleton):
        shape, size = leaf.part(start, stop)
        if not stop:
            shape = leaf.shape
            size = int(np.prod(shape)) * leaf.dtype.itemsize
        found.append((shape, leaf.dtype, size))
    return found
