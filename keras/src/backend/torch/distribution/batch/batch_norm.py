"""torch's batch norm, over the rows of the global batch.

torch modules inside of a Keras model call `torch.nn.functional`; in a step they
are handed the global batch (see `global_rows`), whose table computes what looks
at all rows from the statistics of all data shards.

With `w` the share of a shard in the rows, and its mean `m` and variance `v`:
mean = sum(w m), variance = sum(w (v + (m - mean)^2)), which does not subtract
large squares. The running variance is torch's, n / (n - 1) times that, of the
global n.
"""

import contextlib
import types

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded


@contextlib.contextmanager
def without_own_synchronization(module):
    """Within it, in a step, torch's `SyncBatchNorm` is a plain batch norm: its
    own counts a row once for each process that has it, and lets no process have
    fewer rows."""
    with contextlib.ExitStack() as stack:
        if modes.step is not None or rows.get_current_rows() is not None:
            for each in module.modules():
                if isinstance(each, torch.nn.SyncBatchNorm):
                    stack.enter_context(_as_plain_batch_norm(each))
        yield


@contextlib.contextmanager
def _as_plain_batch_norm(module):
    module.forward = types.MethodType(torch.nn.BatchNorm1d.forward, module)
    try:
        yield
    finally:
        del module.forward


def batch_norm(
    context,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    """As torch's, of the global batch if it is one of statistics.

    Collective along the data axis if `training`, forward and backward: every
    process of it calls it in a step.
    """
    if not training or input.device.type == "meta":
        return F.batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
        )
    x = sharded.whole(input)
    size = x.numel() // max(x.shape[1], 1)
    now = rows.get_current_rows()
    count = size // max(now.local, 1) * now.total
    if count <= 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got "
            f"{count} in the global batch. Received: input of shape "
            f"{tuple(x.shape)}"
        )
    mean, variance = _statistics(x, now.share, context)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = variance * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return _BatchNorm.apply(
        x,
        sharded.whole(weight),
        sharded.whole(bias),
        mean,
        variance,
        eps,
        now.weight,
        count,
        context.data_group,
    )


def native_batch_norm(
    context,
    input,
    weight,
    bias,
    running_mean,
    running_var,
    training,
    momentum,
    eps,
    cudnn_enabled,
):
    """`torch.batch_norm`, of all rows: see `batch_norm`."""
    return batch_norm(
        context,
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
    )


def instance_norm(
    context, input, running_mean=None, running_var=None, *args, **kwargs
):
    """As torch's; running statistics are means over the global rows.

    Collective along the data axis if they are written: every process of it
    calls it in a step.
    """
    kept = [x for x in (running_mean, running_var) if x is not None]
    before = [x._version for x in kept]
    output = F.instance_norm(input, running_mean, running_var, *args, **kwargs)
    if [x._version for x in kept] == before or input.device.type == "meta":
        return output
    with torch.no_grad():
        parts = torch.cat([x.flatten() for x in kept])
        parts = collectives.weighted(parts, rows.share(context))
        dist.all_reduce(parts, group=context.data_group)
        for x, part in zip(kept, parts.split([x.numel() for x in kept])):
            x.copy_(part.view_as(x))
    return output


def _statistics(x, weight, context):
    """Mean and (biased) variance of each channel in the global batch."""
    with torch.no_grad():
        x = _wide(x)
        variance, mean = torch.var_mean(x, _dims(x), correction=0)
        share = torch.full_like(mean[:1], weight)
        own = torch.cat([mean, variance, share])
        # What is computed without rows does not count.
        own = own if weight else torch.zeros_like(own)
        shards = collectives.gather_each(own, context.data_group)
        means, variances, shares = shards.split(
            [x.shape[1], x.shape[1], 1], dim=1
        )
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
    return mean, variance


class _BatchNorm(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias.

    A gradient on a shard is that of the shard's own loss, which counts with
    a weight `w`. With the sums over all shards of w dy and of w dy y, y before
    weight and bias, and n values of a channel in the global batch:

        dx = weight / std * (dy - (sum(w dy) + y sum(w dy y)) / (n w))
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, eps, counts, size, group):
        ctx.counts, ctx.size, ctx.group = counts, size, group
        ctx.dtype_of_bias = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        wide = _wide(x)
        weight, bias = [
            None if p is None else p.to(wide.dtype) for p in (weight, bias)
        ]
        y = F.batch_norm(wide, mean, variance, weight, bias, False, 0.0, eps)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, inverse = ctx.saved_tensors
        grad = collectives.whole_gradient(grad)
        dims, shape = _dims(x), (1, -1) + (1,) * (x.ndim - 2)
        y = (_wide(x) - mean.view(shape)) * inverse.view(shape)
        dy = grad.to(y.dtype)
        sums = torch.stack([dy.sum(dims), (dy * y).sum(dims)])
        grads = [None] * 9
        if weight is not None:
            grads[1] = sums[1].to(weight.dtype)
            inverse = inverse * weight.to(inverse.dtype)
        if ctx.dtype_of_bias is not None:
            grads[2] = sums[0].to(ctx.dtype_of_bias)
        if ctx.needs_input_grad[0]:
            sums = collectives.weighted(sums, ctx.counts)
            dist.all_reduce(sums, group=ctx.group)
            grads[0] = torch.zeros_like(x)
            if ctx.counts:
                size = ctx.size * ctx.counts
                first, second = [s.view(shape) / size for s in sums]
                dx = inverse.view(shape) * (dy - first - y * second)
                grads[0] = dx.to(x.dtype)
        return tuple(grads)


def _dims(x):
    return [dim for dim in range(x.ndim) if dim != 1]


def _wide(x):
    # Half precision is not added up in half precision.
    return x.to(torch.promote_types(x.dtype, torch.float32))
