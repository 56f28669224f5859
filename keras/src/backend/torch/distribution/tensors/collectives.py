"""Collectives on plain tensors that autograd can differentiate.

The algebra of tensor parallelism over one mesh axis: what is the identity in
one direction is a sum in the other (`AllReduce`, `AllReduceGradient`), what is
a slice in one direction is a gather in the other (`AllGather`, `Slice`). After
Megatron-LM (Shoeybi et al., 2019), section 3.

Shards follow `torch.chunk`: all of size ceil(n / shards) but the last ones.

Backward of each is the forward of another, and of that one the first's again.
So under `create_graph=True`, where autograd runs backward in grad mode, it
calls that function. Otherwise it does not: a call takes longer than the rest.

Collective, all of them, forward or backward: every process of `group`.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.modes import modes

# What both gloo and NCCL send in torch 2.13. Other numbers travel as bytes.
SENT = {
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.uint8,
}


def whole_gradient(grad):
    """A gradient as a plain, whole tensor.

    Where plain tensors and DTensors meet in a layer's own code, the gradient
    of the plain one may arrive as a DTensor.
    """
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def weighted(x, weight):
    """`x * weight`, and zero for no weight: a mean of no rows is NaN."""
    return x * weight if weight else torch.zeros_like(x)


def shard_range(size, shards, index):
    """Where shard `index` of a dim starts and stops."""
    width = -(-size // shards)
    start = min(index * width, size)
    return start, min(start + width, size)


def shard_of(x, dim, group):
    """Our shard (a view) of a whole tensor along `dim`."""
    start, stop = shard_range(
        x.shape[dim], dist.get_world_size(group), dist.get_rank(group)
    )
    return x.narrow(dim, start, stop - start)


def gather_each(x, group):
    """The tensors of all processes of a group, in a new first dim.

    Args:
        x: tensor, of one shape and dtype on all processes.
        group: the process group.
    """
    result = x.new_empty((dist.get_world_size(group), *x.shape))
    gather_into(result, x, group)
    return result


def gather_into(result, x, group):
    """Writes the tensors of all processes of a group, one after the other.

    Args:
        result: contiguous tensor, of as many numbers as all of them.
        x: tensor, of one shape and dtype on all processes.
        group: the process group.
    """
    all_shards, local = result.view(-1), x.contiguous().view(-1)
    if x.dtype not in SENT:
        all_shards, local = (
            all_shards.view(torch.uint8),
            local.view(torch.uint8),
        )
    dist.all_gather_single(all_shards, local, group=group)


def all_gather(x, dim, size, group):
    """The whole tensor, of `size` along `dim`, from the shards of a group."""
    shards = dist.get_world_size(group)
    width = -(-size // shards)
    if x.shape[dim] != width:
        padding = list(x.shape)
        padding[dim] = width - x.shape[dim]
        x = torch.cat([x, x.new_zeros(padding)], dim)
    result = gather_each(x, group)
    if dim == 0:
        # Not by `view`: a dim that another axis has cut may be empty.
        result = result.flatten(0, 1)
    else:
        result = torch.cat(result.unbind(0), dim)
    return result if result.shape[dim] == size else result.narrow(dim, 0, size)


def reduce_scatter(x, dim, group):
    """Our shard along `dim` of the sum of a whole tensor over a group."""
    shards = dist.get_world_size(group)
    size = x.shape[dim]
    width = -(-size // shards)
    if width * shards != size:
        padding = list(x.shape)
        padding[dim] = width * shards - size
        x = torch.cat([x, x.new_zeros(padding)], dim)
    if dim:
        x = torch.cat(x.chunk(shards, dim), 0)
    x = x.contiguous()
    result = x.new_empty((x.shape[0] // shards, *x.shape[1:]))
    dist.reduce_scatter_single(result, x, group=group)
    start, stop = shard_range(size, shards, dist.get_rank(group))
    if result.shape[dim] == stop - start:
        return result
    # A new tensor, no view: the caller may write into it.
    return result.narrow(dim, 0, stop - start).clone()


class AllReduce(torch.autograd.Function):
    """Sum of partial results: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        if x.is_contiguous():
            ctx.mark_dirty(x)
        else:
            x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = whole_gradient(grad)
        if torch.is_grad_enabled():
            grad = AllReduceGradient.apply(grad, ctx.group)
        return grad, None


class GradientSum:
    """A sum over processes that the gradient of a tensor is due for.

    The function that alone makes this gradient may begin with the sum while it
    computes others.

    Args:
        group: process group.

    Attributes:
        users: int, how many functions have taken the tensor.
        is_done: whether the gradient that is on its way has been summed.
    """

    def __init__(self, group):
        self.group = group
        self.users, self.is_done = 0, False

    def begin(self, grad):
        """Sums a gradient in place; returns what is to be waited for, or None
        where others make parts of the gradient too.

        Collective along the group.
        """
        if self.users > 1 or torch.is_grad_enabled():
            return None
        self.is_done = True
        return dist.all_reduce(grad, group=self.group, async_op=True)


class AllReduceGradient(torch.autograd.Function):
    """A whole tensor that each process uses a part of the weights on:
    identity forward, all-reduce backward.

    Args of `apply`:
        x: tensor.
        group: process group.
        due: the `GradientSum` that users of the result may begin, or None.
    """

    @staticmethod
    def forward(ctx, x, group, due=None):
        ctx.group, ctx.due = group, due
        # Whoever waits in backward is asked for the layer: see `mesh.watch`.
        ctx.layer = modes.layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = whole_gradient(grad)
        if torch.is_grad_enabled():
            return AllReduce.apply(grad.clone(), ctx.group), None, None
        if ctx.due is not None and ctx.due.is_done:
            ctx.due.is_done = False
            return grad, None, None
        # In place: what comes from our own products is nobody else's.
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None, None


class AllGather(torch.autograd.Function):
    """Shards become the whole; all processes do the same with it, so each
    takes its own slice of the gradient."""

    @staticmethod
    def forward(ctx, x, dim, size, group):
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, size, group)

    @staticmethod
    def backward(ctx, grad):
        grad = whole_gradient(grad)
        if torch.is_grad_enabled():
            grad = Slice.apply(grad, ctx.dim, ctx.group)
        else:
            grad = shard_of(grad, ctx.dim, ctx.group).contiguous()
        return grad, *(None,) * 3


class AllGatherPartial(torch.autograd.Function):
    """Shards become the whole, that each process uses a part of the weights
    on: all-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx, x, dim, size, group):
        ctx.dim, ctx.group, ctx.layer = dim, group, modes.layer
        # Or each product that needs it so would make, and save, a copy.
        return all_gather(x, dim, size, group).contiguous()

    @staticmethod
    def backward(ctx, grad):
        grad = whole_gradient(grad)
        if torch.is_grad_enabled():
            grad = ReduceScatter.apply(grad, ctx.dim, ctx.group)
        else:
            grad = reduce_scatter(grad, ctx.dim, ctx.group)
        return grad, *(None,) * 3


class GatheredAgain:
    """What has been gathered, for autograd to ask for again.

    See `resharding`: where its hooks are on, what autograd saves of a tensor
    that bears this mark is the shard, and how to gather it.

    Args:
        x: plain tensor, our shard.
        dim, size, group: of `all_gather`.
    """

    is_kept = False

    def __init__(self, x, dim, size, group):
        self.x, self.version = x.detach(), x._version
        self.arguments = dim, size, group
        self.packs = {}  # 0 -> how often autograd has saved it
        self.whole, self.due = None, 0

    def mark(self, whole):
        """Lets the hooks know what has been gathered, and views of it."""
        setattr(whole.untyped_storage(), marks.UNSHARDED, (self, 0))

    def again(self, index, kept):
        """The whole tensor, gathered once for all that was saved of it.

        Collective along the group: every process of it calls it, as backward
        has the same graph on all.
        """
        if self.x._version != self.version:
            raise RuntimeError(
                "What is needed for gradient computation has been modified by "
                "an inplace operation after a layer was called with it. "
                f"Received: a shard of shape {tuple(self.x.shape)} at version "
                f"{self.x._version}; expected version {self.version}"
            )
        if not self.due:
            self.whole = all_gather(self.x, *self.arguments).contiguous()
            self.due = self.packs[index]
        whole = self.whole
        self.due -= 1
        if not self.due:
            self.whole = None
        return whole


class ReduceScatter(torch.autograd.Function):
    """Shards of the sum of partial results: reduce-scatter forward, all-gather
    backward."""

    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.size, ctx.group = dim, x.shape[dim], group
        ctx.layer = modes.layer
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        grad = whole_gradient(grad)
        if torch.is_grad_enabled():
            grad = AllGatherPartial.apply(grad, ctx.dim, ctx.size, ctx.group)
        else:
            grad = all_gather(grad, ctx.dim, ctx.size, ctx.group)
        return grad, None, None


class Slice(torch.autograd.Function):
    """Our shard of a whole tensor: slice forward, all-gather backward."""

    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.size, ctx.group = dim, x.shape[dim], group
        ctx.layer = modes.layer
        return shard_of(x, dim, group).clone()

    @staticmethod
    def backward(ctx, grad):
        grad = whole_gradient(grad)
        if torch.is_grad_enabled():
            grad = AllGather.apply(grad, ctx.dim, ctx.size, ctx.group)
        else:
            grad = all_gather(grad, ctx.dim, ctx.size, ctx.group)
        return grad, None, None


class SumOverData(torch.autograd.Function):
    """Sum over data shards of statistics of their rows.

    Forward: all-reduce; what a shard without rows computed on is not its own,
    and does not count. Backward: a gradient on shard i belongs to the loss of
    shard i, which counts with weight_i, and leaves here for gradients that are
    going to be weighted with that of this shard: (sum of weight_i *
    gradient_i) / (our weight).
    """

    @staticmethod
    def forward(ctx, x, weight, group, counts=None):
        counts = bool(weight) if counts is None else counts
        ctx.weight, ctx.group, ctx.counts = weight, group, counts
        x = x.clone() if counts else torch.zeros_like(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = whole_gradient(grad)
        grad = MeanOfLosses.apply(grad, ctx.weight, ctx.group)
        if not ctx.counts:
            grad = grad * 0
        return grad, None, None, None


class MeanOfLosses(torch.autograd.Function):
    """What backward of `SumOverData` gives: (sum of weight_i * x_i) / (our
    weight). Backward: gradients of what is so divided add up unweighted."""

    @staticmethod
    def forward(ctx, x, weight, group):
        ctx.weight, ctx.group = weight, group
        x = weighted(x, weight).contiguous()
        dist.all_reduce(x, group=group)
        return x / weight if weight else torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        grad = whole_gradient(grad)
        return SumOverData.apply(grad, ctx.weight, ctx.group), None, None


class ReduceNow(torch.autograd.Function):
    """Weighted mean over data shards of a gradient: sum of weight_j * g_j.
    Backward is forward: see `buckets.Reduce`."""

    @staticmethod
    def forward(ctx, grad, weight, group):
        ctx.weight, ctx.group = weight, group
        grad = weighted(grad, weight).contiguous()
        dist.all_reduce(grad, group=group)
        return grad

    @staticmethod
    def backward(ctx, grad):
        grad = whole_gradient(grad)
        return ReduceNow.apply(grad, ctx.weight, ctx.group), None, None
