"""Buckets: gradients that one collective reduces, in one flat buffer."""

import collections
import copy

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.tensors import collectives

LEAST, MOST = 2**20, 25 * 2**20  # bytes; torch's DDP has the same two


def build(gradients):
    """Cuts gradients into buckets of one dtype and device each.

    The first is small, so that it is on its way early, and the last ones are,
    as backward does not hide them; between, each is about as large as all
    before it, up to `MOST`.

    Args:
        gradients: iterable of triples in the order of the result: a number,
            a tensor like the gradient (of which memory is not needed), and
            the device.
    """
    gradients = list(gradients)
    left = collections.Counter()
    for _, like, device in gradients:
        left[like.dtype, device] += _bytes(like)
    done = collections.Counter()
    buckets, open_buckets, limits = [], {}, {}
    for number, like, device in gradients:
        key = (like.dtype, device)
        bucket = open_buckets.get(key)
        if bucket is None or bucket.bytes >= limits[key]:
            limits[key] = max(LEAST, min(done[key], left[key] // 2, MOST))
            bucket = open_buckets[key] = Bucket(*key)
            buckets.append(bucket)
        bucket.add(number, like)
        done[key] += _bytes(like)
        left[key] -= _bytes(like)
    return buckets


def _bytes(x):
    return x.numel() * x.element_size()


class Bucket:
    """Gradients that one collective reduces in one flat buffer.

    The buffer is a new one in each pass: its parts become the gradients, and
    the program may keep them.
    """

    def __init__(self, dtype, device):
        self.dtype, self.device = dtype, device
        self.numbers, self.shapes, self.sizes = [], [], []
        self.bytes = 0
        self.buffer = None
        self.work = None

    def add(self, number, local):
        self.numbers.append(number)
        self.shapes.append(local.shape)
        self.sizes.append(local.numel())
        self.bytes += _bytes(local)

    def start(self, grads, weight, group, owed=None):
        """Starts to reduce.

        Collective: every process of `group` calls it.

        Args:
            grads: dict from numbers to local gradients.
            weight: what they are multiplied with.
            group: process group.
            owed: dict from numbers to lists of tensors to add, unweighted.
        """
        self.buffer = torch.empty(
            sum(self.sizes), dtype=self.dtype, device=self.device
        )
        with torch.no_grad():
            for number, part in self._parts():
                # Of no rows, a gradient may be NaN.
                if number in grads and weight:
                    torch.mul(grads[number], weight, out=part)
                else:
                    part.zero_()
                for more in owed.get(number, ()) if owed else ():
                    part.add_(more)
        self.work = dist.all_reduce(self.buffer, group=group, async_op=True)

    def finish(self):
        """Waits, and gives the reduced gradients by number."""
        # Let go of first: a group does not end while its work is kept.
        work, self.work = self.work, None
        work.wait()
        parts = list(self._parts())
        self.buffer = None
        return parts

    def _parts(self):
        pieces = self.buffer.split(self.sizes)
        for number, piece, shape in zip(self.numbers, pieces, self.shapes):
            yield number, piece.view(shape)


class Schedule:
    """Buckets in the order in which all processes reduce them, each as soon as
    it, and all before it, are full.

    Attributes:
        started: list of the buckets that have been handed out.
    """

    def __init__(self, buckets):
        self.started = []
        self._waiting = collections.deque(buckets)
        self._bucket_of = {
            n: bucket for bucket in buckets for n in bucket.numbers
        }
        self._missing = {id(bucket): len(bucket.numbers) for bucket in buckets}

    def __contains__(self, number):
        return number in self._bucket_of

    def fill(self, number):
        """Takes note of a gradient, and yields the buckets to start now."""
        if number not in self:
            return
        self._missing[id(self._bucket_of[number])] -= 1
        while self._waiting and not self._missing[id(self._waiting[0])]:
            yield self._next()

    def rest(self, surprises=()):
        """Yields the buckets that are left, and then others."""
        self._waiting.extend(surprises)
        while self._waiting:
            yield self._next()

    def _next(self):
        self.started.append(self._waiting.popleft())
        return self.started[-1]


def reduce(bucket, grads, weight, group, owed=None):
    """The reduced gradients of a bucket, by number, for autograd to
    differentiate.

    Collective: every process of `group` calls it.

    Args:
        bucket: the `Bucket`.
        grads: dict from numbers to local gradients.
        weight, group, owed: as for `Bucket.start`.
    """
    reduced = Reduce.apply(
        bucket, tuple(grads), weight, group, owed, *grads.values()
    )
    return dict(zip(bucket.numbers, reduced))


class Reduce(torch.autograd.Function):
    """Weighted mean over data shards of the gradients of a bucket.

    G = sum of weight_j * g_j. A gradient on shard i belongs to the loss of
    shard i, which counts with weight_i; what leaves here on shard j is going
    to be weighted with weight_j, as g_j was. So it is, on every shard,
    sum of weight_i * gradient_i: backward is forward.

    Collective, forward and backward: every process of `group`.
    """

    @staticmethod
    def forward(ctx, bucket, numbers, weight, group, owed, *grads):
        ctx.bucket, ctx.numbers = bucket, numbers
        ctx.weight, ctx.group = weight, group
        # A copy: the bucket itself may be under way in this pass.
        bucket = copy.copy(bucket)
        bucket.start(dict(zip(numbers, grads)), weight, group, owed)
        # Nobody may write into views that a function returns.
        return tuple(part.clone() for _, part in bucket.finish())

    @staticmethod
    def backward(ctx, *grads):
        numbers = ctx.bucket.numbers
        grads = map(collectives.whole_gradient, grads)
        reduced = reduce(
            ctx.bucket, dict(zip(numbers, grads)), ctx.weight, ctx.group
        )
        return *(None,) * 5, *(reduced[n] for n in ctx.numbers)
