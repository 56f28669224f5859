"""Rules of functions that mix the entries of some dims."""

import math

import torch

from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_addend
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import map_tensors
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.global_rows.table import ALIASES
from keras.src.backend.torch.distribution.global_rows.table import bind
from keras.src.backend.torch.distribution.global_rows.table import dims_of
from keras.src.backend.torch.distribution.global_rows.table import rule
from keras.src.backend.torch.distribution.global_rows.table import split
from keras.src.backend.torch.distribution.global_rows.table import tensors_of
from keras.src.backend.torch.distribution.mesh import rows as rows_lib
from keras.src.backend.torch.distribution.tensors import sharded


def along(func, args, kwargs, names="input dim", default=None, first=None):
    """Functions that mix the entries of some dims, and treat others alike.

    Args:
        names: of the arguments, in order; all others go through by keyword.
        default: the dim where none is given, None for all.
        first: what the second argument must not be, for this meaning.
    """
    bound = _bound_along(args, kwargs, names)
    if bound is None:
        return NotImplemented
    x, where = bound
    if not is_rows(x) or isinstance(where, bool) or x.rows.has_empty:
        return NotImplemented
    where = default if where is None else where
    dims = dims_of(where, x.ndim)
    if dims is None or not x.ndim or x.at in dims:
        return NotImplemented
    y = func(x.local, *args[1:], **kwargs)

    def wrap(y):
        at = x.at
        if y.ndim != x.ndim:
            at -= sum(d < at for d in dims)
        return GlobalTensor(y, at, x.rows)

    return map_tensors(wrap, y)


def _bound_along(args, kwargs, names):
    """The tensor, and the dims that a function is asked for."""
    names = split(names)
    values = dict(zip(names, args))
    for name, x in kwargs.items():
        name = ALIASES.get(name, name)
        if name in values:
            return None
        values[name] = x
    if "input" not in values or values.pop("out", None) is not None:
        return None
    others = [v for k, v in values.items() if k != "input"]
    others += args[len(names) :]
    if tensors_of(others, {}) != []:
        return None
    return values["input"], values.get("dim")


rule(
    """
    aminmax argmax argmin logsumexp nansum nanmean prod count_nonzero
    cumsum cumprod cummax cummin logcumsumexp softmax log_softmax softmin
    max min median nanmedian
    """
)(along)
rule("sort argsort glu mode", default=-1)(along)
rule("unbind", default=0)(along)
rule("topk kthvalue", names="input k dim", default=-1)(along)
rule("norm", names="input p dim")(along)
rule("linalg_norm linalg_vector_norm", names="input ord dim")(along)
rule("normalize", names="input p dim", default=1)(along)
rule("diff", names="input n dim", default=-1)(along)


@rule("amax amin all any")
def extreme(func, args, kwargs):
    """As `along`; over rows, where no gradient asks which entry it was, each
    data shard's are compared.

    Collective along the data axis if the rows are reduced.
    """
    y = along(func, args, kwargs)
    bound = bind("input dim keepdim", args, kwargs)
    if y is not NotImplemented or bound is None:
        return y
    x, where = bound["input"], bound.get("dim")
    if not is_rows(x) or isinstance(where, bool):
        return NotImplemented
    dims = dims_of(where, x.ndim)
    if (
        dims is None
        or len(dims) > 1
        and func.__name__ in ("all", "any")
        and where is not None
        or x.rows.has_empty
        or x.requires_grad
        and torch.is_grad_enabled()
    ):
        return NotImplemented
    part = whole_local(x)
    for dim in sorted(set(dims), reverse=True):
        part = getattr(torch, func.__name__)(part, dim, keepdim=True)
    each = rows_lib.Rows([1] * len(x.rows.counts), x.rows.index)
    each.context = x.rows.context
    parts = carrier.gathered(part, x.at, each)
    y = getattr(torch, func.__name__)(parts, x.at, keepdim=True)
    if bound.get("keepdim"):
        return y
    return y.squeeze(tuple(set(dims)))


def whole_local(x):
    """Local rows, whole on the model axes."""
    return sharded.whole(x.local)


@rule("flip fliplr flipud roll")
def moved_along(func, args, kwargs):
    x, *rest = args
    name = func.__name__
    if not is_rows(x) or tensors_of(args[1:], kwargs) != []:
        return NotImplemented
    if name == "roll":
        bound = bind("input shifts dims", args, kwargs)
        where = None if bound is None else bound.get("dims")
    elif name == "flip":
        where = kwargs.get("dims", rest)
        if len(rest) == 1 and not isinstance(rest[0], int):
            where = rest[0]
    else:
        where = 1 if name == "fliplr" else 0
    dims = dims_of(where, x.ndim)
    if where is None or dims is None or x.at in dims:
        return NotImplemented
    return x.like(func(x.local, *rest, **kwargs))


@rule("sum mean")
def sums(func, args, kwargs):
    """Over rows, addends; they are added up when they are needed."""
    bound = bind("input dim keepdim dtype", args, kwargs)
    if bound is None or isinstance(bound.get("dim"), bool):
        return NotImplemented
    x = bound.pop("input")
    if not is_rows(x) and not is_addend(x):
        return NotImplemented
    dims = dims_of(bound.get("dim"), x.ndim)
    if dims is None or not x.ndim and not is_addend(x):
        return NotImplemented
    if not dims:  # An empty list of dims means all.
        dims = list(range(x.ndim))
    floats = x.dtype.is_floating_point
    if x.at is None:
        if not floats:
            return NotImplemented
        return carrier.addend(func(x.local, *args[1:], **kwargs), x.rows)
    if x.at not in dims:
        y = func(x.local, *args[1:], **kwargs)
        gone = 0 if bound.get("keepdim") else sum(d < x.at for d in set(dims))
        return GlobalTensor(y, x.at - gone, x.rows)
    dtype = bound.get("dtype")
    if func.__name__ == "mean" and not (dtype or x.dtype).is_floating_point:
        return NotImplemented
    y = torch.sum(x.local, dims, bool(bound.get("keepdim")), dtype=dtype)
    if y.is_complex():
        return NotImplemented
    if func.__name__ == "mean":
        count = math.prod(x.shape[d] for d in set(dims))
        if not count:
            return NotImplemented
        y = y / count
    return carrier.addend(y, x.rows)


def _root(variance):
    """The square root, of zero with the gradient zero: as torch's `std`."""
    zero = variance == 0
    root = torch.sqrt(variance.masked_fill(zero, 1.0))
    return root.masked_fill(zero, 0.0)


@rule("var std var_mean std_mean")
def variance(func, args, kwargs):
    """Over rows, from two sums over them."""
    name = func.__name__
    bound = bind("input dim unbiased keepdim correction", args, kwargs)
    if bound is None:
        return NotImplemented
    x, where = bound["input"], bound.get("dim")
    if not is_rows(x) or tensors_of(list(bound.values())[1:], {}) != []:
        return NotImplemented
    if isinstance(where, bool) or "correction" in bound and len(args) > 2:
        return NotImplemented
    if bound.get("unbiased") is not None and "correction" in bound:
        return NotImplemented
    dims = dims_of(where, x.ndim)
    if dims is None or not x.dtype.is_floating_point:
        return NotImplemented
    dims = dims or list(range(x.ndim))
    if x.at not in dims:
        return along(func, args, kwargs)
    correction = 1 if bound.get("unbiased", True) else 0
    if bound.get("correction") is not None:
        correction = bound["correction"]
    count = math.prod(x.shape[d] for d in dims)
    if count - correction <= 0:
        return NotImplemented
    mean = whole(torch.mean(x, dims, keepdim=True))
    squares = torch.square(x - mean)
    keepdim = bool(bound.get("keepdim"))
    y = torch.sum(squares, dims, keepdim=keepdim) / (count - correction)
    if name.startswith("std"):
        y = _root(y)
    if not name.endswith("_mean"):
        return y
    return y, mean if keepdim else mean.squeeze(dims)
