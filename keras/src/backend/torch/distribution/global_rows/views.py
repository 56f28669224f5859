"""Rules of functions that move entries: views, joins, parts, indices."""

import math

import torch

from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows import table
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_addend
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import leaf_of_all
from keras.src.backend.torch.distribution.global_rows.carrier import map_tensors
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.global_rows.table import align
from keras.src.backend.torch.distribution.global_rows.table import bind
from keras.src.backend.torch.distribution.global_rows.table import dims_of
from keras.src.backend.torch.distribution.global_rows.table import rule
from keras.src.backend.torch.distribution.global_rows.table import tensors_of


def of_ints(values):
    """Ints given one by one or in a sequence, None if they are not ints."""
    if len(values) == 1 and not isinstance(values[0], int):
        values = values[0]
    if not isinstance(values, (list, tuple)):
        return None
    if any(type(n) is not int for n in values):
        return None
    return list(values)


def _sequence(args, kwargs, name):
    """The tensor, and ints in an argument of this name or one by one."""
    if not args:
        return None
    if kwargs:
        if len(args) > 1 or list(kwargs) != [name]:
            return None
        return args[0], of_ints([kwargs[name]])
    return args[0], of_ints(args[1:])


# ---- the order of dims -------------------------------------------------------


def order_of(func, args, kwargs):
    """The dims of a tensor in a new order, None if that is not all."""
    name, ndim = func.__name__, args[0].ndim if args else 0
    if name == "t":
        return list(reversed(range(ndim))) if ndim < 3 else None
    if name == "permute":
        bound = _sequence(args, kwargs, "dims")
        return (
            None
            if bound is None or bound[1] is None
            else (dims_of(bound[1], ndim))
        )
    if name in ("transpose", "swapaxes", "swapdims"):
        first, second = {
            "transpose": ("dim0", "dim1"),
            "swapdims": ("dim0", "dim1"),
            "swapaxes": ("axis0", "axis1"),
        }[name]
        bound = bind(f"input {first} {second}", args, kwargs)
        if bound is None or len(bound) < 3:
            return None
        dims = dims_of([bound[first], bound[second]], ndim)
        if dims is None:
            return None
        order = list(range(ndim))
        order[dims[0]], order[dims[1]] = dims[1], dims[0]
        return order
    bound = bind("input source destination", args, kwargs)
    if bound is None or len(bound) < 3:
        return None
    source = dims_of(bound["source"], ndim)
    destination = dims_of(bound["destination"], ndim)
    if source is None or destination is None:
        return None
    order = [d for d in range(ndim) if d not in source]
    for place, dim in sorted(zip(destination, source)):
        order.insert(place, dim)
    return order


@rule("t permute transpose swapaxes swapdims movedim moveaxis")
def reordered(func, args, kwargs):
    x = args[0] if args else None
    if is_addend(x):
        return carrier.addend(func(x.local, *args[1:], **kwargs), x.rows)
    order = order_of(func, args, kwargs) if is_rows(x) else None
    if order is None or sorted(order) != list(range(x.ndim)):
        return NotImplemented
    y = func(x.local, *args[1:], **kwargs)
    return GlobalTensor(y, order.index(x.at), x.rows)


@rule("adjoint")
def matrix_transposed(func, args, kwargs):
    (x,) = args
    if not is_rows(x) or x.ndim < 2 or x.is_complex():
        return NotImplemented
    return torch.transpose(x, -1, -2)


@rule("unsqueeze")
def unsqueezed(func, args, kwargs):
    bound = bind("input dim", args, kwargs)
    x = None if bound is None else bound["input"]
    if is_addend(x):
        return carrier.addend(func(x.local, *args[1:], **kwargs), x.rows)
    if not is_rows(x) or type(bound.get("dim")) is not int:
        return NotImplemented
    dim = bound["dim"] % (x.ndim + 1)
    y = func(x.local, *args[1:], **kwargs)
    return GlobalTensor(y, x.at + (dim <= x.at), x.rows)


@rule("squeeze")
def squeezed(func, args, kwargs):
    bound = bind("input dim", args, kwargs)
    x = None if bound is None else bound["input"]
    if is_addend(x):
        return carrier.addend(func(x.local, *args[1:], **kwargs), x.rows)
    if not is_rows(x):
        return NotImplemented
    dims = dims_of(bound.get("dim"), x.ndim)
    if dims is None:
        return NotImplemented
    dims = [d for d in dims if x.shape[d] == 1]
    if x.at in dims:
        return NotImplemented
    # Those that are one on all processes: local rows may be one by chance.
    y = torch.squeeze(x.local, tuple(dims))
    return GlobalTensor(y, x.at - sum(d < x.at for d in dims), x.rows)


# ---- the shape ---------------------------------------------------------------


def shape_of(func, args, kwargs):
    """The global shape that is asked for, None if that is none."""
    x, name = args[0], func.__name__
    if name in ("reshape_as", "view_as"):
        return list(args[1].shape) if len(args) == 2 and not kwargs else None
    if name == "ravel":
        return [-1] if len(args) == 1 and not kwargs else None
    if name in ("reshape", "view"):
        key = "size" if name == "view" else "shape"
        bound = _sequence(args, kwargs, key)
        return None if bound is None else bound[1]
    if name == "flatten":
        bound = bind("input start_dim end_dim", args, kwargs)
        if bound is None or not x.ndim:
            return None
        ends = bound.get("start_dim", 0), bound.get("end_dim", -1)
        dims = dims_of(list(ends), x.ndim)
        if dims is None or dims[0] > dims[1]:
            return None
        first, last = dims
        size = math.prod(x.shape[first : last + 1])
        return [*x.shape[:first], size, *x.shape[last + 1 :]]
    bound = bind("input dim sizes", args, kwargs)  # unflatten
    if bound is None or type(bound.get("dim")) is not int:
        return None
    sizes = of_ints([bound.get("sizes")])
    dims = dims_of(bound["dim"], x.ndim)
    if sizes is None or dims is None:
        return None
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        if not rest or x.shape[dims[0]] % rest:
            return None
        sizes[sizes.index(-1)] = x.shape[dims[0]] // rest
    return [*x.shape[: dims[0]], *sizes, *x.shape[dims[0] + 1 :]]


@rule("reshape view reshape_as view_as ravel flatten unflatten")
def reshaped(func, args, kwargs):
    """Rows stay rows where they begin a dim, with whole rows in each entry, or
    whole entries in each row."""
    x = args[0] if args else None
    if is_addend(x):
        if len(args) > 1 and isinstance(args[1], torch.dtype):
            return NotImplemented
        args = map_tensors(whole, args)
        return carrier.addend(func(x.local, *args[1:], **kwargs), x.rows)
    shape = shape_of(func, args, kwargs) if is_rows(x) else None
    if shape is None or any(n < -1 for n in shape) or not x.numel():
        return NotImplemented
    if shape.count(-1) == 1:
        rest = -math.prod(shape)
        if not rest or x.numel() % rest:
            return NotImplemented
        shape[shape.index(-1)] = x.numel() // rest
    if math.prod(shape) != x.numel():
        return NotImplemented
    rows, before = x.rows, math.prod(x.shape[: x.at])
    number = sum(rows.counts)
    dims = [
        dim
        for dim, size in enumerate(shape)
        if math.prod(shape[:dim]) == before and size % number == 0
    ]
    if not dims:
        return NotImplemented
    dim = dims[0]
    new = rows.with_entries(shape[dim] // number)
    local = (*shape[:dim], new.local, *shape[dim + 1 :])
    return GlobalTensor(x.local.reshape(local), dim, new)


@rule("expand expand_as broadcast_to")
def expanded(func, args, kwargs):
    x = args[0] if args else None
    if not is_rows(x):
        return NotImplemented
    if func.__name__ == "expand_as":
        shape = list(args[1].shape) if len(args) == 2 else None
    else:
        bound = _sequence(args, kwargs, "size")
        shape = None if bound is None else bound[1]
    if shape is None or len(shape) < x.ndim:
        return NotImplemented
    at = x.at + len(shape) - x.ndim
    if shape[at] not in (-1, x.rows.total):
        return NotImplemented
    shape[at] = x.rows.local
    return GlobalTensor(x.local.expand(shape), at, x.rows)


@rule("repeat tile")
def repeated(func, args, kwargs):
    bound = _sequence(args, kwargs, "dims")
    if bound is None or bound[1] is None or not is_rows(bound[0]):
        return NotImplemented
    x, times = bound
    if len(times) < x.ndim:
        if func.__name__ == "repeat":
            return NotImplemented
        times = [1] * (x.ndim - len(times)) + times
    at = x.at + len(times) - x.ndim
    if times[at] != 1:
        return NotImplemented
    return GlobalTensor(x.local.repeat(times), at, x.rows)


@rule("repeat_interleave")
def repeated_one_by_one(func, args, kwargs):
    bound = bind("input repeats dim", args, kwargs)
    if bound is None or type(bound.get("repeats")) is not int:
        return NotImplemented
    x, times, dim = bound["input"], bound["repeats"], bound.get("dim")
    if not is_rows(x) or type(dim) is not int or times < 1:
        return NotImplemented
    dim %= x.ndim
    rows = (
        x.rows if dim != x.at else x.rows.with_entries(x.rows.entries * times)
    )
    y = torch.repeat_interleave(x.local, times, dim)
    return GlobalTensor(y, x.at, rows)


@rule("tril triu")
def triangle(func, args, kwargs):
    x = args[0] if args else None
    if not is_rows(x) or x.at >= x.ndim - 2 or x.rows.has_empty:
        return NotImplemented
    return x.like(func(x.local, *args[1:], **kwargs))


# ---- joins and parts ---------------------------------------------------------


@rule("hstack")
def joined_columns(func, args, kwargs):
    tensors = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(tensors, (list, tuple)) or not tensors:
        return NotImplemented
    if any(x.ndim < 2 for x in tensors):
        return NotImplemented
    return joined(torch.cat, (tensors, 1), {})


@rule("cat concat concatenate stack")
def joined(func, args, kwargs):
    name = "tensors" if "tensors" in kwargs else "input"
    bound = bind(f"{name} dim", args, kwargs)
    if bound is None or not isinstance(bound.get(name), (list, tuple)):
        return NotImplemented
    tensors, where = list(bound[name]), bound.get("dim", 0)
    if any(not isinstance(x, torch.Tensor) for x in tensors):
        return NotImplemented
    if type(where) is not int:
        return NotImplemented
    new, ndim = func.__name__ == "stack", tensors[0].ndim
    if any(x.ndim != ndim for x in tensors):
        return NotImplemented
    where %= ndim + new
    box = next((x for x in tensors if is_rows(x)), None)
    if box is None:
        return _joined_addends(func, tensors, where)
    aligned = align(tensors, ndim)
    if aligned is None:
        return NotImplemented
    rows, at, local = aligned
    if any(x.shape[at] != rows.total for x in tensors) and (new or where != at):
        return NotImplemented
    if where == at and not new:
        return NotImplemented
    y = func(local, where)
    return GlobalTensor(y, at + (new and where <= at), rows)


def _joined_addends(func, tensors, where):
    box = next((x for x in tensors if is_addend(x)), None)
    if (
        box is None
        or not box.dtype.is_floating_point
        or any(x.dtype != box.dtype for x in tensors)
        or any(type(x) is GlobalTensor and not is_addend(x) for x in tensors)
    ):
        return NotImplemented
    rows = box.rows
    parts = [
        x.local if is_addend(x) else carrier.part_of(leaf_of_all(x, rows), rows)
        for x in tensors
    ]
    return carrier.addend(func(parts, where), rows)


@rule("split chunk tensor_split split_with_sizes")
def split(func, args, kwargs):
    name = func.__name__
    second = {"chunk": "chunks", "tensor_split": "indices_or_sections"}
    second = second.get(name, "split_size_or_sections")
    if "split_size" in kwargs:
        second = "split_size"
    bound = bind(f"input {second} dim", args, kwargs)
    if bound is None or tensors_of([bound.get(second)], {}) != []:
        return NotImplemented
    x, dim = bound["input"], bound.get("dim", 0)
    if not is_rows(x) or type(dim) is not int or dim % x.ndim == x.at:
        return NotImplemented
    y = func(x.local, *args[1:], **kwargs)
    return type(y)(x.like(part) for part in y)


@rule("narrow select")
def part(func, args, kwargs):
    name = func.__name__
    names = "input dim index" if name == "select" else "input dim start length"
    bound = bind(names, args, kwargs)
    if bound is None or tensors_of(list(bound.values())[1:], {}) != []:
        return NotImplemented
    x, dim = bound["input"], bound.get("dim")
    if not is_rows(x) or type(dim) is not int or dim % x.ndim == x.at:
        return NotImplemented
    y = func(x.local, *args[1:], **kwargs)
    gone = name == "select" and dim % x.ndim < x.at
    return GlobalTensor(y, x.at - gone, x.rows)


# ---- indices -----------------------------------------------------------------


def _is_basic(i):
    if isinstance(i, slice):
        return all(
            n is None or type(n) is int for n in (i.start, i.stop, i.step)
        )
    return i is None or i is Ellipsis or type(i) is int


def place_of_rows(x, index):
    """Where the rows are in `x[index]` of basic indices; None if they are
    indexed themselves."""
    known = sum(i is not None and i is not Ellipsis for i in index)
    at = dim = 0
    for i in (*index, Ellipsis):
        if i is None:
            dim += 1
        elif i is Ellipsis:
            skipped = x.ndim - known
            if at <= x.at < at + skipped:
                return dim + x.at - at
            at, dim, known = at + skipped, dim + skipped, x.ndim
        else:
            if at == x.at:
                return dim if i == slice(None) else None
            at, dim = at + 1, dim + isinstance(i, slice)
    return None


def as_basic(index):
    """An index as a tuple, None where it copies or is no index of numpy's basic
    kind."""
    index = index if isinstance(index, tuple) else (index,)
    if all(map(_is_basic, index)) and index.count(Ellipsis) < 2:
        return index
    return None


@rule("__getitem__")
def indexed(func, args, kwargs):
    x, index = args
    if is_rows(index) and type(x) is not GlobalTensor:
        # Entries of a table, one for each row.
        if index.dtype in (torch.bool, torch.uint8) or not x.ndim:
            return NotImplemented
        x = leaf_of_all(x, index.rows)
        return GlobalTensor(x[index.local], index.at, index.rows)
    basic = as_basic(index) if type(x) is GlobalTensor else None
    if basic is None:
        return NotImplemented
    if is_addend(x):
        return carrier.addend(x.local[basic], x.rows)
    if not is_rows(x):
        return NotImplemented
    at = place_of_rows(x, basic)
    if at is None:
        return NotImplemented
    return GlobalTensor(x.local[basic], at, x.rows)


@rule("__setitem__")
def assigned(func, args, kwargs):
    x, index, value = args
    basic = as_basic(index) if is_rows(x) else None
    if basic is None or place_of_rows(x, basic) is None:
        return NotImplemented
    part = x[basic]
    if type(value) in (bool, int, float):
        part.local.fill_(value)
        return None
    if not isinstance(value, torch.Tensor):
        return NotImplemented
    if value.ndim > part.ndim:
        return NotImplemented
    y = table.RULES["copy_"](torch.Tensor.copy_, (part, value), {})
    return NotImplemented if y is NotImplemented else None


@rule("index_select")
def selected(func, args, kwargs):
    bound = bind("input dim index", args, kwargs)
    if bound is None or type(bound.get("index")) is GlobalTensor:
        return NotImplemented
    x, dim = bound["input"], bound.get("dim")
    if not is_rows(x) or type(dim) is not int or dim % x.ndim == x.at:
        return NotImplemented
    return x.like(func(x.local, *args[1:], **kwargs))


@rule("gather take_along_dim")
def picked(func, args, kwargs):
    """Entries along a dim other than the rows, as an index with the same rows
    says."""
    names = "input dim index sparse_grad"
    if func.__name__ == "take_along_dim":
        names = "input index dim"
    bound = bind(names, args, kwargs)
    if bound is None or type(bound.get("dim")) is not int:
        return NotImplemented
    x, dim, index = bound["input"], bound["dim"], bound["index"]
    if not is_rows(x) or not isinstance(index, torch.Tensor):
        return NotImplemented
    if index.ndim != x.ndim or dim % x.ndim == x.at or x.rows.has_empty:
        return NotImplemented
    if index.shape[x.at] != x.rows.total:
        return NotImplemented
    index = carrier.cut_rows(index, x.at, x.rows)
    rest = (
        {"sparse_grad": bound["sparse_grad"]} if "sparse_grad" in bound else {}
    )
    if func.__name__ == "gather":
        return x.like(torch.gather(x.local, dim, index, **rest))
    return x.like(torch.take_along_dim(x.local, index, dim))


@rule("bucketize")
def bucketed(func, args, kwargs):
    if len(args) != 2:
        return NotImplemented
    x, boundaries = args
    if not is_rows(x) or type(boundaries) is not torch.Tensor:
        return NotImplemented
    return x.like(func(x.local, boundaries, **kwargs))


@rule("one_hot")
def one_hot(func, args, kwargs):
    bound = bind("input num_classes", args, kwargs)
    if bound is None:
        return NotImplemented
    x, classes = bound["input"], bound.get("num_classes", -1)
    if not is_rows(x) or type(classes) is not int or classes < 0:
        return NotImplemented
    return GlobalTensor(func(x.local, classes), x.at, x.rows)


@rule("embedding")
def looked_up(func, args, kwargs):
    bound = bind(
        "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
        args,
        kwargs,
    )
    if bound is None or bound.get("max_norm") is not None:
        return NotImplemented
    if bound.get("scale_grad_by_freq") or bound.get("sparse"):
        return NotImplemented
    x, weight = bound.pop("input"), bound.pop("weight")
    if not is_rows(x) or type(weight) is GlobalTensor:
        return NotImplemented
    weight = leaf_of_all(weight, x.rows)
    if func is torch.embedding:
        return NotImplemented
    return GlobalTensor(func(x.local, weight, **bound), x.at, x.rows)
