"""Collectives of weights that the data axis cuts, while others compute.

A `Gather` makes some weights whole, a `Reduction` takes the weighted mean of
their gradients and leaves each data shard its part. Each is one collective in
one buffer, which is the only memory of full size that it takes.
"""

import math
import weakref

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.mesh import trail
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import laid_out

# From so many bytes a shard on, gloo gathers by broadcasts into the buffer.
# Its own gather makes another buffer of full size, and copies.
BROADCAST_BYTES = 2**18


class Part:
    """A weight of one dtype, as a part of a `Gather` or a `Reduction`.

    Whether the weight still lives here must not matter: elsewhere it may. A
    dead one takes part with zeros, which nobody reads.

    Attributes:
        layout: the `Layout` of the weight.
        dtype: of the gathered weight. Stored it may be wider.
        axis: the mesh axis that is gathered; it cuts `dim`, of `size`.
        shard_shape: of our shard.
        shape: of every shard in a buffer: our own, padded.
        numel: of it.
    """

    def __init__(self, weight, dtype, context, siblings):
        self._weight, self._siblings = weakref.ref(weight), siblings
        self.layout = laid_out.layout_of(weight)
        self.dtype, self.device, self._name = dtype, weight.device, None
        (self.axis,) = context.cuts_data(self.layout.placements)
        self.dim = self.layout.placements[self.axis].dim
        self.size = self.layout.shape[self.dim]
        self.shard_shape = tuple(weight._local_tensor.shape)
        shards = self.layout.mesh.size(self.axis)
        shape = list(self.shard_shape)
        shape[self.dim] = -(-self.size // shards)
        self.shape, self.numel = tuple(shape), math.prod(shape)
        self.bytes = self.numel * shards * dtype.itemsize

    @property
    def cut(self):
        """Of `laid_out.levels`, what is gathered."""
        return self.dim, self.axis, self.size

    @property
    def weight(self):
        """The stored weight, None if it has been freed."""
        return self._weight()

    @property
    def name(self):
        """What all processes call it, None where that is not known."""
        weight = self.weight
        if weight is not None:
            # It may have been freed elsewhere, and not here.
            self._name = weight.__dict__.get(marks.NAME)
        return self._name

    @property
    def kind(self):
        """What the parts of one collective share."""
        return self.axis, self.dtype, self.device

    @property
    def version(self):
        """A number that each write into the weight changes."""
        weight = self.weight
        return 0 if weight is None else weight._local_tensor._version

    @property
    def may_change_unseen(self):
        """Whether the program holds memory of it that has no version."""
        return marks.HANDED_OUT in self._siblings

    def own(self, piece):
        """Of what a buffer has for a shard, our shard."""
        piece = piece.view(self.shape)
        return piece.narrow(self.dim, 0, self.shard_shape[self.dim])


def part_of(weight, dtype, context):
    """The `Part` of a stored weight, the same one each time."""
    parts = weight.__dict__.setdefault(marks.PARTS, {})
    part = parts.get(dtype)
    if part is None or part.layout.context is not context:
        part = parts[dtype] = Part(weight, dtype, context, parts)
    return part


def _pieces(parts, buffer):
    """The part of a buffer's last dim that each part has."""
    return buffer.split([part.numel for part in parts], -1)


def in_words(what, parts):
    """Which weights are communicated, in words."""
    names = [part.name or str(tuple(part.layout.shape)) for part in parts]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{what} {', '.join(names[:2])}{more}"


class Gather:
    """Weights that are being made whole.

    Collective along the axis of the parts: every process of it makes one, of
    the same parts, in the same order.

    Args:
        parts: tuple of `Part`s of one kind.
        context: the `Context`.
    """

    @torch.no_grad()
    def __init__(self, parts, context):
        self.parts = parts
        self.versions = [part.version for part in parts]
        first = parts[0]
        group = context.mesh.get_group(first.axis)
        shards, rank = dist.get_world_size(group), dist.get_rank(group)
        width = sum(part.numel for part in parts)
        self._buffer = torch.empty(
            (shards, width), dtype=first.dtype, device=first.device
        )
        for part, piece in zip(parts, _pieces(parts, self._buffer[rank])):
            trail.note_gather(part.name)
            if part.shard_shape != part.shape or part.weight is None:
                piece.zero_()
            if part.weight is not None:
                local = part.weight._local_tensor.detach()
                part.own(piece).copy_(local)
        self._works = _gather_in_place(self._buffer, rank, group)

    def waits_for(self):
        """What it makes whole, in words, for who waits: see `mesh.watch`."""
        return in_words("weights", self.parts)

    def wait(self):
        # Let go of first: a group does not end while its work is kept.
        works, self._works = self._works, []
        for work in works:
            work.wait()

    @torch.no_grad()
    def finish(self):
        """Waits; the whole weights, each with memory of its own."""
        self.wait()
        buffer, self._buffer = self._buffer, None
        shards = buffer.shape[0]
        result = []
        for part, piece in zip(self.parts, _pieces(self.parts, buffer)):
            shape = list(part.shape)
            shape[part.dim] *= shards
            if len(self.parts) == 1 and not part.dim:
                whole = piece.view(shape)
            else:
                rows_of_shards = [row.view(part.shape) for row in piece]
                whole = torch.cat(rows_of_shards, part.dim)
            result.append(whole.narrow(part.dim, 0, part.size))
        return result


def _gather_in_place(buffer, rank, group):
    """Starts to fill a buffer, of which each process has its own row."""
    if buffer.dtype not in collectives.SENT:
        buffer = buffer.view(torch.uint8)
    own = buffer[rank]
    if buffer.device.type == "cpu" and own.nbytes >= BROADCAST_BYTES:
        return [
            dist.broadcast(row, group=group, group_src=i, async_op=True)
            for i, row in enumerate(buffer)
        ]
    return [
        dist.all_gather_single(buffer.view(-1), own, group=group, async_op=True)
    ]


class Reduction:
    """Gradients whose weighted mean over data shards is taken.

    Collective along the data axis, when it starts: every process of it starts
    one, of the same parts, in the same order.

    Args:
        context: the `Context`.
    """

    def __init__(self, context):
        self._context = context
        self._parts, self._grads, self._shards = [], [], []
        self._work = self._buffer = self._result = None
        self.bytes = 0
        self.has_started = False

    def takes(self, parts):
        """Whether these parts may be reduced with those that it has."""
        return (
            not self.has_started
            and bool(self._parts)
            and self._parts[0].kind == parts[0].kind
        )

    @torch.no_grad()
    def add(self, parts, grads):
        """Adds gradients.

        Args:
            parts: tuple of `Part`s of one kind.
            grads: for each the gradient of the whole, of this data shard's
                loss, or None, which counts as zero.

        Returns:
            For each part our shard of the mean, None where there was no
            gradient. They get their memory, and their numbers, by `finish`.
        """
        shards = [
            None if grad is None else _without_memory(grad, part.shard_shape)
            for part, grad in zip(parts, grads)
        ]
        self._parts += parts
        self._grads += grads
        self._shards += shards
        self.bytes += sum(part.bytes for part in parts)
        return shards

    @torch.no_grad()
    def start(self):
        """Starts to communicate."""
        self.has_started = True
        parts, first = self._parts, self._parts[0]
        group = self._context.mesh.get_group(first.axis)
        shards, rank = dist.get_world_size(group), dist.get_rank(group)
        weight = rows.weight(self._context)
        # Half precision is not added up in half precision.
        buffer = torch.empty(
            (shards, sum(part.numel for part in parts)),
            dtype=torch.promote_types(first.dtype, torch.float32),
            device=first.device,
        )
        pieces = _pieces(parts, buffer)
        for part, piece, grad in zip(parts, pieces, self._grads):
            _put(part, piece, grad, weight)
        self._grads = None
        self.bytes = buffer.nbytes
        if buffer.device.type == "cpu":
            # gloo reduces and scatters by this very sum, of another buffer.
            self._result = buffer[rank]
            self._work = dist.all_reduce(buffer, group=group, async_op=True)
        else:
            self._result = buffer.new_empty(buffer.shape[1])
            # Flat: gloo, where it serves GPUs, goes by the first dim.
            self._work = dist.reduce_scatter_single(
                self._result, buffer.view(-1), group=group, async_op=True
            )
        self._buffer = buffer

    def waits_for(self):
        """What it reduces, in words, for who waits: see `mesh.watch`."""
        return in_words("gradients of", self._parts)

    @torch.no_grad()
    def finish(self):
        """Waits, and fills the shards. Does nothing the next time.

        Collective along data axes that do not cut the weights.
        """
        if self._work is None:
            return
        work, self._work = self._work, None
        work.wait()
        # Over data axes that do not cut, shards are added up, small as they
        # are (hybrid sharding).
        for axis in self._context.data_axes:
            if axis != self._parts[0].axis:
                group = self._context.mesh.get_group(axis)
                dist.all_reduce(self._result, group=group)
        pieces = _pieces(self._parts, self._result)
        for part, piece, shard in zip(self._parts, pieces, self._shards):
            if shard is not None:
                memory = shard.untyped_storage()
                if not memory.nbytes():
                    memory.resize_(shard.numel() * shard.element_size())
                shard.copy_(part.own(piece))
        self._buffer = self._result = self._shards = None


def _without_memory(like, shape):
    """A new tensor that gets its memory later: on a GPU at once, as only torch
    built for it empties its memory, which the simulated one has not."""
    x = like.new_empty(shape)
    if x.device.type == "cpu":
        x.untyped_storage().resize_(0)
    return x


def _put(part, piece, grad, weight):
    """Writes a weighted gradient into what a buffer has of each shard."""
    # Of no rows, a gradient may be NaN.
    if grad is None or not weight:
        piece.zero_()
        return
    width, shards = part.shape[part.dim], piece.shape[0]
    if width * shards == part.size and width:
        source = grad.unflatten(part.dim, (shards, width)).movedim(part.dim, 0)
        target = piece.unflatten(-1, part.shape)
        if grad.dtype == piece.dtype:
            torch.mul(source, weight, out=target)
        else:
            target.copy_(source).mul_(weight)
        return
    piece.zero_()
    for i, row in enumerate(piece):
        start, stop = collectives.shard_range(part.size, shards, i)
        row = row.view(part.shape).narrow(part.dim, 0, stop - start)
        row.copy_(grad.narrow(part.dim, start, stop - start)).mul_(weight)
