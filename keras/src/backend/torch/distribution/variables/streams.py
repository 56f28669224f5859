"""Weights on their way into a file: one piece after the other.

The process that writes never holds a weight that is larger than a piece, and
the others hold nothing beside their shards. While it writes a piece it
receives the next one.
"""

import collections
import functools
import math

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.mesh import together
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import laid_out

# Bytes of a piece; a single row of a tensor may be more.
PIECE = 8 << 20
# Messages of a process that may be under way.
UNDER_WAY = 2

WRITER = 0


def to_write(value):
    """What a file is written from: see `processes.in_pieces`."""
    stored = getattr(value, "_value", value)
    if not isinstance(stored, torch.Tensor) or stored.is_meta:
        return value
    dtype = numpy_dtype(stored.dtype)
    if dtype is None:
        return value
    if isinstance(stored, DTensor):
        if laid_out.layout_of(stored).is_partial:
            return value
        return Pieces(stored, dtype)
    kind = Whole if process_group.is_first() else Absent
    return kind(stored, dtype)


def gathered_by_writer(stored):
    """The whole of a DTensor on the process that writes, None on the others.

    Collective: every process calls it.
    """
    layout = laid_out.layout_of(stored)
    if layout.is_partial:
        whole = laid_out.gathered(stored)
        return whole if process_group.is_first() else None
    whole = None
    if process_group.is_first():
        # Before the others begin to send: where there is no room, all hear it.
        whole = stored._local_tensor.new_empty(layout.shape)
    together.go_on()
    for rows, piece in _pieces(stored):
        whole[rows].copy_(piece)
    return whole


class Absent:
    """A value that another process writes.

    Attributes:
        shape: tuple.
        dtype: numpy's.
    """

    def __init__(self, x, dtype):
        self.shape = tuple(x.shape)
        self.dtype = dtype

    def __iter__(self):
        return iter(())


class Whole(Absent):
    """A value that every process has, on the one that writes it."""

    def __init__(self, x, dtype):
        super().__init__(x, dtype)
        self._x = x

    def __iter__(self):
        yield ..., _as_numpy(self._x.detach().cpu().contiguous())


class Pieces(Absent):
    """A weight of which each process stores a shard.

    Iterating over it gives the process that writes pairs of a slice of the
    first dim and a numpy array of these rows, to be used before the next but
    one, and the others nothing.

    Collective: every process iterates to the end.
    """

    def __init__(self, x, dtype):
        super().__init__(x, dtype)
        self._x = x

    def __iter__(self):
        together.go_on()
        for rows, piece in _pieces(self._x):
            yield rows, _as_numpy(piece)


def numpy_dtype(dtype):
    """numpy's, None where it has none."""
    if dtype == torch.bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        return None


def _as_numpy(x):
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def ranges_of_all(layout):
    """The part of each process: dict from ranks to pairs of start and stop for
    each dim."""
    mesh = layout.mesh.mesh
    return _ranges_of_all(
        tuple(mesh.flatten().tolist()),
        tuple(mesh.shape),
        tuple(layout.placements),
        tuple(layout.shape),
    )


# An optimizer asks in each step.
@functools.lru_cache(maxsize=1024)
def _ranges_of_all(ranks, mesh_shape, placements, shape):
    mesh = torch.tensor(ranks, device="cpu").view(mesh_shape)
    pairs = cuts.from_placements(placements, mesh_shape)
    found = {}
    for rank in sorted(ranks):
        position = (mesh == rank).nonzero()[0].tolist()
        box = [(0, size) for size in shape]
        for dim, axis in pairs:
            line = list(position)
            line[axis] = slice(None)
            # The order of a process group is that of its ranks.
            peers = sorted(mesh[tuple(line)].tolist())
            first, after = box[dim]
            start, stop = collectives.shard_range(
                after - first, len(peers), peers.index(rank)
            )
            box[dim] = first + start, first + stop
        found[rank] = tuple(box)
    return found


def boxes(layout):
    """The part of each process that somebody has to send, as `ranges_of_all`.
    Of equal parts, that of the process that writes, or of the first one."""
    found = {}
    for rank, box in ranges_of_all(layout).items():
        found.setdefault(box, rank)
    return {rank: box for box, rank in found.items()}


def _pieces(x):
    """Pairs of a slice of rows and these rows of a DTensor, on the host, on
    the process that writes.

    Collective: every process iterates to the end. All talk on the host, so
    that no GPU holds what is not its own.
    """
    layout, local = laid_out.layout_of(x), x._local_tensor.detach()
    parts = boxes(layout)
    rank, itemsize = dist.get_rank(), local.element_size()
    rows = layout.shape[0]
    row_bytes = max(1, math.prod(layout.shape[1:]) * itemsize)
    step = max(1, PIECE // row_bytes)
    pieces = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
    if rank == WRITER:
        yield from _receive(pieces, parts, local, layout.shape)
    elif rank in parts:
        _send(pieces, parts[rank], local)


def _send(pieces, box, local):
    under_way = collections.deque()
    for rows in pieces:
        ours = _rows_of(box, rows)
        if ours is None:
            continue
        start = box[0][0]
        part = local[ours.start - start : ours.stop - start].cpu().contiguous()
        if len(under_way) == UNDER_WAY:
            under_way.popleft().wait()
        under_way.append(dist.isend(_bytes(part), WRITER))
    for message in under_way:
        message.wait()


def _receive(pieces, parts, local, shape):
    before = None
    # Of two pieces: what is yielded has been used when the next but one comes.
    memory = {}, {}
    for i, rows in enumerate(pieces):
        piece = _Piece(rows, parts, local, shape, memory[i % 2])
        if before is not None:
            yield before.rows, before.whole()
        before = piece
    if before is not None:
        yield before.rows, before.whole()


class _Piece:
    """Rows of a weight that are on their way here.

    Args:
        rows: slice.
        parts: dict of `boxes`.
        local: our shard.
        shape: tuple, of the whole.
        memory: dict, what an earlier piece leaves to be used again.
    """

    def __init__(self, rows, parts, local, shape, memory):
        self.rows = rows
        self._memory = memory
        self._rows = self._empty(
            "rows", (rows.stop - rows.start, *shape[1:]), local.dtype
        )
        self._messages = []
        for rank, box in parts.items():
            theirs = _rows_of(box, rows)
            if theirs is None:
                continue
            where = (
                slice(theirs.start - rows.start, theirs.stop - rows.start),
                *(slice(*pair) for pair in box[1:]),
            )
            target = self._rows[where]
            if rank == WRITER:
                start = box[0][0]
                target.copy_(local[theirs.start - start : theirs.stop - start])
                continue
            buffer = target
            if not target.is_contiguous():
                buffer = self._empty(rank, target.shape, local.dtype)
            message = dist.irecv(_bytes(buffer), rank)
            self._messages.append((message, buffer, target))

    def _empty(self, key, shape, dtype):
        size = math.prod(shape)
        kept = self._memory.get(key)
        if kept is None or kept.numel() < size:
            kept = self._memory[key] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)

    def whole(self):
        """Waits for the rows."""
        for message, buffer, target in self._messages:
            message.wait()
            if buffer is not target:
                target.copy_(buffer)
        self._messages = []
        return self._rows


def _rows_of(box, rows):
    """The rows of a box among these; None if it has no number there."""
    start, stop = max(box[0][0], rows.start), min(box[0][1], rows.stop)
    if start >= stop or any(a >= b for a, b in box[1:]):
        return None
    return slice(start, stop)


def _bytes(x):
    return x.view(-1).view(torch.uint8)
