"""Rules of functions of single numbers, and of sums that are not added up."""

import torch

from keras.src.backend.torch.distribution.global_rows import aliases
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_addend
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import leaf_of_all
from keras.src.backend.torch.distribution.global_rows.carrier import local_of
from keras.src.backend.torch.distribution.global_rows.carrier import map_tensors
from keras.src.backend.torch.distribution.global_rows.table import align
from keras.src.backend.torch.distribution.global_rows.table import is_in_place
from keras.src.backend.torch.distribution.global_rows.table import rule
from keras.src.backend.torch.distribution.global_rows.table import tensors_of
from keras.src.backend.torch.distribution.global_rows.table import with_tensors


@rule(
    """
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin
    arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
    ceil celu clamp clamp_max clamp_min clip conj_physical copysign cos cosh
    deg2rad digamma div divide elu eq erf erfc erfinv exp exp2 expm1 fix
    float_power floor floor_divide fmax fmin fmod frac ge gelu greater
    greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot
    i0 isclose isfinite isinf isnan isneginf isposinf isreal le leaky_relu lerp
    less less_equal lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and
    logical_not logical_or logical_xor logit log_sigmoid lt masked_fill maximum
    minimum mish mul multiply nan_to_num ne neg negative nextafter not_equal
    positive pow rad2deg real reciprocal relu relu6 remainder round rsqrt rsub
    selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink
    softsign sqrt square sub subtract tan tanh tanhshrink threshold true_divide
    trunc xlogy _threshold

    __and__ __eq__ __floordiv__ __iand__ __ilshift__ __invert__ __ior__
    __irshift__ __ixor__ __lshift__ __or__ __rdiv__ __rfloordiv__
    __rlshift__ __rmod__ __rpow__ __rrshift__ __rshift__ __rsub__
    __xor__

    abs_ add_ addcdiv_ addcmul_ ceil_ clamp_ clamp_max_ clamp_min_ clip_ copy_
    cos_ div_ divide_ eq_ exp_ fill_ floor_ floor_divide_ ge_ gt_ le_ lerp_ log_
    logical_and_ logical_not_ logical_or_ lt_ masked_fill_ mul_ multiply_
    nan_to_num_ ne_ neg_ negative_ pow_ reciprocal_ relu_ remainder_ round_
    rsqrt_ sigmoid_ sign_ sin_ sqrt_ square_ sub_ subtract_ tanh_ trunc_ zero_
    """
)
def elementwise(func, args, kwargs):
    """Functions of tensors that are broadcast to each other."""
    y = NotImplemented if kwargs else _alike(func, args)
    return _elementwise(func, args, kwargs) if y is NotImplemented else y


_NUMBERS = frozenset((bool, float, int, str, type(None)))
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def _alike(func, args):
    """The usual case, quickly: the same rows in the same dim of as many dims,
    and what has no dim there."""
    first, local, plain = None, [], None
    for x in args:
        kind = type(x)
        if kind is GlobalTensor:
            if first is None:
                if x.at is None:
                    return _scaled(func, args)
                first = x
            elif (
                x.rows is not first.rows
                or x.at != first.at
                or len(x._global_shape) != len(first._global_shape)
            ):
                return NotImplemented
            local.append(x.local)
        elif kind in _NUMBERS:
            local.append(x)
        elif kind in _PLAIN:
            plain = [x] if plain is None else [*plain, x]
            local.append(x)
        else:
            return NotImplemented
    if first is None:
        return NotImplemented
    if plain is not None:
        most = len(first._global_shape) - first.at
        for x in plain:
            if x.dim() >= most:
                return NotImplemented
            if x.requires_grad:
                leaf_of_all(x, first.rows)
    in_place = is_in_place(func.__name__)
    if in_place and args[0] is not first:
        return NotImplemented
    y = func(*local)
    if in_place or y is first.local:  # `inplace=True`
        if not in_place:
            aliases.written_into(first)
        return first
    if y is NotImplemented:  # Python's operators, of what they cannot take.
        return y
    shape = first._global_shape if len(args) == 1 else None
    return GlobalTensor(y, first.at, first.rows, shape)


def _scaled(func, args):
    """A sum times a number, quickly."""
    x = args[0]
    if (
        len(args) != 2
        or type(args[1]) not in (float, int)
        or func.__name__ not in TIMES
        or not is_addend(x)
        or not x.dtype.is_floating_point
    ):
        return NotImplemented
    return carrier.addend(func(x.local, args[1]), x.rows)


@rule("where")
def where(func, args, kwargs):
    if len(args) + len(kwargs) < 3:
        return NotImplemented  # Positions.
    return elementwise(func, args, kwargs)


def _elementwise(func, args, kwargs):
    operands = tensors_of(args, kwargs)
    if operands is None or "out" in kwargs:
        return NotImplemented
    name = func.__name__
    if not any(map(is_rows, operands)):
        return addends(func, args, kwargs, operands)
    if any(x.is_complex() for x in operands):
        return NotImplemented
    aligned = align(operands, max(x.ndim for x in operands))
    if aligned is None:
        return NotImplemented
    rows, dim, local = aligned
    if is_in_place(name):
        a = args[0]
        if not (is_rows(a) and a.rows is rows and a.at == dim):
            return NotImplemented
        if a.ndim < max(x.ndim for x in operands):
            return NotImplemented  # torch's error.
        args, kwargs = with_tensors(args, kwargs, local)
        func(*args, **kwargs)
        return a
    args, kwargs = with_tensors(args, kwargs, local)
    y = func(*args, **kwargs)
    if y is NotImplemented:  # Python's operators, of what they cannot take.
        return y
    for x, own in zip(operands, local):
        if y is own and type(x) is GlobalTensor:  # `inplace=True`
            aliases.written_into(x)
            return x
    return GlobalTensor(y, dim, rows)


ADD = frozenset("add sub subtract __rsub__".split())
ADD_IN_PLACE = frozenset("add_ sub_ subtract_".split())
SCALE = frozenset("mul multiply".split())
DIVIDE = frozenset("div divide true_divide".split())
TIMES = SCALE | DIVIDE
NEGATE = frozenset("neg negative positive".split())


def addends(func, args, kwargs, operands):
    """Linear functions of sums that are not added up yet stay so."""
    name = func.__name__
    box = next((x for x in operands if is_addend(x)), None)
    if box is None or kwargs or len(args) > 2:
        return NotImplemented
    if any(type(x) is GlobalTensor and not is_addend(x) for x in operands):
        return NotImplemented
    if name in NEGATE:
        return carrier.addend(func(box.local), box.rows)
    if len(args) != 2 or any(isinstance(x, bool) for x in args):
        return NotImplemented
    if any(x.is_complex() or x.dtype is torch.bool for x in operands):
        return NotImplemented
    a, b = args
    both = is_addend(a) and is_addend(b)
    if name in ADD or name in ADD_IN_PLACE:
        if both and a.rows.group is not b.rows.group:
            return NotImplemented
        if name in ADD_IN_PLACE and not is_addend(a):
            return NotImplemented
        # A number counts once for each entry, of integers on one shard.
        parts = [_part(x, box) for x in args]
        y = func(*parts)  # In place, others may have views of it.
        return a if name in ADD_IN_PLACE else carrier.addend(y, box.rows)
    if not box.dtype.is_floating_point:
        return NotImplemented
    if name in SCALE and not both or name in DIVIDE and is_addend(a):
        if both:
            return NotImplemented
        parts = [x.local if is_addend(x) else _leaf(x, box.rows) for x in args]
        return carrier.addend(func(*parts), box.rows)
    return NotImplemented


def _leaf(x, rows):
    return leaf_of_all(x, rows) if isinstance(x, torch.Tensor) else x


def _part(x, box):
    if is_addend(x):
        return x.local
    if isinstance(x, float) and not box.dtype.is_floating_point:
        x = torch.tensor(x, device=box.device)
    if isinstance(x, int) and box.dtype.is_floating_point:
        x = float(x)
    return carrier.part_of(_leaf(x, box.rows), box.rows)


@rule(
    """
    bfloat16 bool byte char clone contiguous cpu cuda detach double float
    empty_like full_like half int long ones_like short to type type_as
    zeros_like
    """
)
def like(func, args, kwargs):
    """Functions of one tensor; of another one they take the kind."""
    x, *rest = args
    if not is_rows(x) and not is_addend(x):
        return NotImplemented
    rest = map_tensors(local_of, rest)
    kwargs = map_tensors(local_of, kwargs)
    y = func(x.local, *rest, **kwargs)
    if not isinstance(y, torch.Tensor):
        return y  # `type()` tells a name.
    name = func.__name__
    if x.at is None:
        if name.endswith("_like") or not (
            x.dtype.is_floating_point and y.dtype.is_floating_point
        ):
            return NotImplemented
        if y.dtype.itemsize < x.dtype.itemsize:
            return NotImplemented  # To round the sum, not each addend.
    if y is x.local:
        return x
    return GlobalTensor(y, x.at, x.rows)
