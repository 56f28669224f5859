"""Rules of products: what is summed over rows is an addend."""

import string

import torch

from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import leaf_of_all
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.global_rows.table import align
from keras.src.backend.torch.distribution.global_rows.table import bind
from keras.src.backend.torch.distribution.global_rows.table import rule


def _two(args, kwargs):
    """The two operands of a product, sums added up; None for other ones."""
    for second in ("other", "mat2", "vec2", "vec", "tensor"):
        bound = bind(f"input {second}", args, kwargs)
        if bound is not None and len(bound) == 2:
            break
    else:
        return None
    a, b = bound.values()
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return None
    a, b = [whole(x) if not is_rows(x) else x for x in (a, b)]
    if not is_rows(a) and not is_rows(b):
        return None
    return a, b


def _contracted(function, a, dim_of_a, b, dim_of_b):
    """A sum over rows of products, as an addend."""
    rows = (a if is_rows(a) else b).rows
    for x, dim in ((a, dim_of_a), (b, dim_of_b)):
        if is_rows(x) and (x.at != dim or x.rows is not rows):
            return NotImplemented
        if x.shape[dim] != rows.total:
            return NotImplemented  # torch's error.
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
        return NotImplemented
    parts = [
        carrier.cut_rows(a, dim_of_a, rows),
        carrier.cut_rows(b, dim_of_b, rows),
    ]
    return carrier.addend(function(*parts), rows)


@rule("dot vdot inner")
def dot(func, args, kwargs):
    two = _two(args, kwargs)
    if two is None:
        return NotImplemented
    a, b = two
    if func.__name__ == "inner" and b.ndim == 1 and a.ndim > 1:
        return _times_vector(a, b)
    if a.ndim != 1 or b.ndim != 1:
        return NotImplemented
    return _contracted(torch.dot, a, 0, b, 0)


@rule("matmul mm bmm mv __rmatmul__")
def product(func, args, kwargs):
    two = _two(args, kwargs)
    if two is None:
        return NotImplemented
    a, b = reversed(two) if func.__name__ == "__rmatmul__" else two
    if func.__name__ in ("mm", "bmm", "mv"):
        # They broadcast nothing.
        dims = {"mm": (2, 2), "bmm": (3, 3), "mv": (2, 1)}[func.__name__]
        if (a.ndim, b.ndim) != dims:
            return NotImplemented
        if func.__name__ == "bmm" and a.shape[0] != b.shape[0]:
            return NotImplemented
    if not a.ndim or not b.ndim:
        return NotImplemented
    if a.ndim == 1 and b.ndim == 1:
        return _contracted(torch.dot, a, 0, b, 0)
    if b.ndim == 1:
        return _times_vector(a, b)
    if a.ndim == 1:
        if is_rows(b) and b.ndim != 2 or not is_rows(a) and b.at != 0:
            return _vector_times(a, b)
        return _contracted(torch.matmul, a, 0, b, b.ndim - 2)
    ndim = max(a.ndim, b.ndim)
    # Seen from the result's end: -2 a row, -1 a column; others are aligned.
    of_a = a.at - a.ndim if is_rows(a) else None
    of_b = b.at - b.ndim if is_rows(b) else None
    if of_a == -1 or of_b == -2 and of_a is None:
        return _contracted(torch.matmul, a, a.ndim - 1, b, b.ndim - 2)
    if of_a == -2:
        b = leaf_of_all(whole(b), a.rows)
        return GlobalTensor(torch.matmul(a.local, b), ndim - 2, a.rows)
    if of_b == -1:
        a = leaf_of_all(whole(a), b.rows)
        return GlobalTensor(torch.matmul(a, b.local), ndim - 1, b.rows)
    if of_b == -2:  # Rows of `a` are among the leading dims.
        b = whole(b)
    aligned = align([a, b], ndim)
    if aligned is None:
        return NotImplemented
    rows, dim, local = aligned
    return GlobalTensor(torch.matmul(*local), dim, rows)


def _times_vector(a, b):
    if is_rows(b) or a.at == a.ndim - 1:
        return _contracted(torch.matmul, a, a.ndim - 1, b, 0)
    b = leaf_of_all(b, a.rows)
    return GlobalTensor(torch.matmul(a.local, b), a.at, a.rows)


def _vector_times(a, b):
    if is_rows(a) or b.at == b.ndim - 2:
        return NotImplemented
    a = leaf_of_all(a, b.rows)
    at = b.at if b.at < b.ndim - 2 else b.ndim - 2
    return GlobalTensor(torch.matmul(a, b.local), at, b.rows)


@rule("linear")
def linear(func, args, kwargs):
    bound = bind("input weight bias", args, kwargs)
    if bound is None or "weight" not in bound:
        return NotImplemented
    x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
    if not is_rows(x) or x.at == x.ndim - 1:
        return NotImplemented
    if is_rows(weight) or is_rows(bias):
        return NotImplemented
    weight, bias = whole(weight), whole(bias)
    weight = leaf_of_all(weight, x.rows)
    if bias is not None:
        bias = leaf_of_all(bias, x.rows)
    return GlobalTensor(func(x.local, weight, bias), x.at, x.rows)


@rule("outer ger")
def outer(func, args, kwargs):
    two = _two(args, kwargs)
    if two is None or any(x.ndim != 1 for x in two):
        return NotImplemented
    return two[0].unsqueeze(1) * two[1].unsqueeze(0)


@rule("cdist")
def distances(func, args, kwargs):
    """Rows of the first with all of the second."""
    bound = bind("x1 x2 p compute_mode", args, kwargs)
    if bound is None or "x2" not in bound:
        return NotImplemented
    a, b = bound.pop("x1"), bound.pop("x2")
    if not is_rows(a) or a.ndim != 2 or b.ndim != 2 or a.at != 0:
        return NotImplemented
    b = leaf_of_all(whole(b), a.rows)
    return GlobalTensor(func(a.local, b, **bound), 0, a.rows)


@rule("tensordot")
def tensordot(func, args, kwargs):
    bound = bind("a b dims out", args, kwargs)
    if bound is None or len(bound) < 2 or bound.get("out") is not None:
        return NotImplemented
    a, b, dims = bound["a"], bound["b"], bound.get("dims", 2)
    if isinstance(dims, int):
        dims = [range(a.ndim - dims, a.ndim), range(dims)]
    if not isinstance(dims, (list, tuple)) or len(dims) != 2:
        return NotImplemented
    of_a, of_b = [
        [d]
        if isinstance(d, int)
        else [*d]
        if isinstance(d, (list, tuple, range))
        else None
        for d in dims
    ]
    if of_a is None or of_b is None or len(of_a) != len(of_b):
        return NotImplemented
    if any(type(d) is not int for d in (*of_a, *of_b)):
        return NotImplemented
    if a.ndim + b.ndim > 26:
        return NotImplemented
    letters = "abcdefghijklmnopqrstuvwxyz"
    first, second = [*letters[: a.ndim]], [*letters[a.ndim :][: b.ndim]]
    for i, j in zip(of_a, of_b):
        second[j % b.ndim] = first[i % a.ndim]
    both = set(first) & set(second)
    output = [x for x in (*first, *second) if x not in both]
    equation = f"{''.join(first)},{''.join(second)}->{''.join(output)}"
    return einsum(torch.einsum, (equation, a, b), {})


def _without_dots(inputs, output, operands):
    """An equation with letters for the dots, where all have as many dims."""
    counts = {
        x.ndim - len(letters.replace("...", ""))
        for letters, x in zip(inputs, operands)
        if "..." in letters
    }
    if len(counts) != 1 or not 0 <= (count := counts.pop()) < 10:
        return None
    used = set("".join([*inputs, output]))
    free = [c for c in string.ascii_uppercase if c not in used]
    dots = "".join(free[:count])
    if len(dots) < count:
        return None
    equation = f"{','.join(inputs)}->{output}".replace("...", dots)
    return None if "." in equation else equation


@rule("einsum")
def einsum(func, args, kwargs):
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    if kwargs or not isinstance(equation, str):
        return NotImplemented
    equation = equation.replace(" ", "")
    if equation.count("->") != 1:
        return NotImplemented
    inputs, output = equation.split("->")
    inputs = inputs.split(",")
    if "." in equation:
        if len(inputs) != len(operands):
            return NotImplemented
        equation = _without_dots(inputs, output, operands)
        if equation is None:
            return NotImplemented
        inputs, output = equation.split("->")
        inputs = inputs.split(",")
    first = next((i for i, x in enumerate(operands) if is_rows(x)), None)
    if first is None or len(inputs) != len(operands):
        return NotImplemented
    if any(len(s) != x.ndim for s, x in zip(inputs, operands)):
        return NotImplemented
    rows, letter = operands[first].rows, inputs[first][operands[first].at]
    local = []
    for x, letters in zip(operands, inputs):
        own = letters.count(letter)
        if is_rows(x) and x.rows is rows and own == 1:
            if letters[x.at] == letter:
                local.append(x.local)
                continue
        x = leaf_of_all(whole(x), rows)
        if own > 1:
            return NotImplemented
        if own:
            dim = letters.index(letter)
            if x.shape[dim] != rows.total:
                return NotImplemented
            x = rows.cut(x, dim)
        local.append(x)
    if letter in output:
        y = func(equation, *local)
        return GlobalTensor(y, output.index(letter), rows)
    if not all(x.dtype.is_floating_point for x in local):
        return NotImplemented
    return carrier.addend(func(equation, *local), rows)
