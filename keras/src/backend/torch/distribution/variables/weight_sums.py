"""Sums, means and norms of all entries of a weight: of each process one number.

Collective, all of them: every process of the weight's mesh calls it.
"""

import contextlib
import inspect

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import weight_entries


def _sum(x, dim=None, keepdim=False, *, dtype=None):
    if not _is_of_all(x, dim, keepdim):
        return NotImplemented
    return _total(torch.sum, x, dtype)


def _mean(x, dim=None, keepdim=False, *, dtype=None):
    if not _is_of_all(x, dim, keepdim):
        return NotImplemented
    dtype = dtype or x.dtype
    if not (dtype.is_floating_point or dtype.is_complex) or not x.numel():
        return NotImplemented
    total = _total(torch.sum, x, dtype)
    return total if total is NotImplemented else total / x.numel()


def _total(func, x, dtype):
    # Of an empty shard the sum is zero.
    local = x._local_tensor
    if torch.is_grad_enabled() and x.requires_grad:
        local = laid_out.Local.apply(x)
    total = func(local, dtype=dtype)
    if total.dtype not in collectives.SENT:
        return NotImplemented
    return laid_out.SumOfShards.apply(total, x.sharding)


def _norm(x, ord=None, dim=None, keepdim=False, *, dtype=None):
    """Without autograd: at zero, its gradient is none of a sum of squares."""
    order = 2 if ord in (None, "fro") else ord
    asks = torch.is_grad_enabled() and x.requires_grad
    if asks or not _is_of_all(x, dim, keepdim) or not x.numel():
        return NotImplemented
    if order == float("inf"):
        op = dist.ReduceOp.MAX
    elif order in (1, 2):
        op = dist.ReduceOp.SUM
    else:
        return NotImplemented
    local = x._local_tensor
    if not local.numel():
        local = local.new_zeros(1)
    local = torch.linalg.vector_norm(local, order, dtype=dtype)
    if local.dtype not in collectives.SENT:
        return NotImplemented
    if op == dist.ReduceOp.SUM:
        local = local**order
    total = laid_out.reduce_over_shards(local, x.sharding, op)
    return total if op == dist.ReduceOp.MAX else total ** (1 / order)


def _matrix_norm(x, ord=None, dim=None, keepdim=False, *, dtype=None):
    # Of a matrix, a number as `ord` means another norm.
    if ord is not None and x.ndim != 1:
        return NotImplemented
    return _norm(x, ord, dim, keepdim, dtype=dtype)


def _old_norm(x, p="fro", dim=None, keepdim=False, dtype=None):
    return _norm(x, p, dim, keepdim, dtype=dtype)


def _is_of_all(x, dim, keepdim):
    if keepdim or x.sharding.is_partial:
        return False
    if dim is None or dim == () or dim == []:
        return True
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if not all(isinstance(d, int) for d in dims):
        return False
    return len({d % x.ndim for d in dims}) == x.ndim


def _reduction(function):
    signature = inspect.signature(function)

    def reduction(args, kwargs, tracks):
        if "axis" in kwargs:
            kwargs = {**kwargs, "dim": kwargs["axis"]}
            del kwargs["axis"]
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return NotImplemented
        x = args[0] if args else None
        others = (*args[1:], *kwargs.values())
        if not sharded.is_weight(x) or list(weight_entries.tensors_of(others)):
            return NotImplemented
        with contextlib.nullcontext() if tracks else torch.no_grad():
            return function(*args, **kwargs)

    return reduction


REDUCTIONS = {
    "sum": _reduction(_sum),
    "mean": _reduction(_mean),
    "norm": _reduction(_old_norm),
    "linalg_norm": _reduction(_matrix_norm),
    "linalg_vector_norm": _reduction(_norm),
}
OF_ONE_NUMBER = {
    "_foreach_norm": torch.linalg.vector_norm,
    "_foreach_max": torch.max,
}
