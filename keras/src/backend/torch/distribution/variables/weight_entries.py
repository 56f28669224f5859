"""Functions of each entry by itself, on the shards of weights.

They give shards, and do not communicate. So do what writes into weights, and
the functions of lists that `torch.optim` calls.
"""

import functools

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.common import KerasVariable
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.ops import operators
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded

# Functions of each entry by itself. Those of one tensor, and
ENTRYWISE = operators.ELEMENTWISE | frozenset(
    """
    __abs__ __add__ __and__ __eq__ __floordiv__ __ge__ __gt__ __iadd__ __iand__
    __idiv__ __ifloordiv__ __imod__ __imul__ __invert__ __ior__ __ipow__
    __isub__ __itruediv__ __ixor__ __le__ __lt__ __mod__ __mul__ __ne__ __neg__
    __or__ __pos__ __pow__ __radd__ __rand__ __rdiv__ __rfloordiv__ __rmod__
    __rmul__ __ror__ __rpow__ __rsub__ __rtruediv__ __rxor__ __sub__
    __truediv__ __xor__
    add addcdiv addcmul arctan2 atan2 bitwise_and bitwise_or bitwise_xor copy_
    copysign cpu cuda div divide empty_like eq fill fill_ float_power
    floor_divide fmax fmin fmod ge greater greater_equal gt heaviside hypot
    isclose ldexp le lerp less less_equal logaddexp logaddexp2 logical_and
    logical_or logical_xor lt masked_fill maximum minimum mul multiply ne
    nextafter not_equal pow remainder rsub sub subtract true_divide where xlogy
    zero zero_
    _to_copy alias
    """.split()
)

# Of a sum that is not taken yet, they may be had of each addend.
OF_ADDENDS = frozenset("alias clone contiguous detach zero_".split())

# They ask another tensor for its kind of number alone.
OF_A_DTYPE = frozenset("to type_as".split())


def ask(func, args, kwargs):
    """What torch itself has for a function, and for its tensors' class."""
    with private.as_torch_has_it():
        return func(*args, **kwargs)


def is_entrywise(name):
    """Whether each entry of what a function returns depends on that entry
    alone."""
    return name in ENTRYWISE or (
        name.endswith("_")
        and not name.endswith("__")
        and name.removesuffix("_") in ENTRYWISE
    )


def entrywise(func, args, kwargs, tracks):
    """A function of each entry by itself, on our shards.

    Does not communicate.

    Returns:
        A weight, of what is laid out as the function's arguments are; its
        first argument, if the function writes into it; `NotImplemented` where
        shards are not enough.
    """
    tensors = list(tensors_of((*args, *kwargs.values())))
    weights = [x for x in tensors if sharded.is_weight(x)]
    layout = weights[0].sharding
    name = operators.name_of(func)
    if "out" in kwargs or (layout.is_partial and name not in OF_ADDENDS):
        return NotImplemented
    if name == "where" and len(args) + len(kwargs) < 3:
        return NotImplemented
    if name in OF_A_DTYPE:
        return _of_kind(func, args, kwargs, tracks)
    target = args[0] if operators.is_in_place(func) else None
    writes = target is not None
    if not all(_meets(x, layout, tracks, writes) for x in tensors):
        return NotImplemented
    if target is not None:
        if not sharded.is_weight(target):
            return NotImplemented
        if tracks and any(x.requires_grad for x in tensors):
            return _write_with_autograd(func, args, kwargs, layout)
        tracks = False
    local = functools.partial(_shard, layout=layout, tracks=tracks)
    shards, named = map_tensors(local, (args, kwargs))
    result = func(*shards, **named)
    if target is not None:
        return target
    if shards and result is shards[0]:
        return args[0]
    return _carried(result, layout, weights[0]._local_tensor)


def _carried(result, layout, local):
    if not isinstance(result, torch.Tensor):
        return result
    if result.shape != local.shape or result.device != local.device:
        return NotImplemented
    return layout.carry(result)


def _meets(x, layout, tracks, writes):
    """Whether shards may meet a tensor, each its own part of it.

    Plain tensors are equal on the processes of a data shard alone: there may
    be numbers of its own rows in them, or gradients of its own loss. What is
    written into a weight, by an optimizer above all, is equal everywhere.
    """
    if sharded.is_weight(x):
        return layout.is_laid_out(x) and tuple(x.shape) == layout.shape
    return (
        not isinstance(x, DTensor)
        and (writes or modes.updates or not layout.data_axes)
        # Its gradient would be that of all data shards' losses.
        and laid_out.fits(x, layout.shape)
        and not (tracks and x.requires_grad)
    )


def _shard(x, layout, tracks):
    if not sharded.is_weight(x):
        return laid_out.cut(x, layout)
    if tracks and x.requires_grad:
        return laid_out.Local.apply(x)
    return x._local_tensor.detach()


def _of_kind(func, args, kwargs, tracks):
    """`x.to(other)`, of which only what kind of tensor it is matters."""
    x, *rest = args
    rest, named = map_tensors(
        lambda x: (x._local_tensor if sharded.is_weight(x) else x).new_empty(
            ()
        ),
        (rest, kwargs),
    )
    if not sharded.is_weight(x):
        return func(x, *rest, **named)
    local = _shard(x, x.sharding, tracks)
    result = func(local, *rest, **named)
    if result is local:
        return x
    return _carried(result, x.sharding, x._local_tensor)


def _write_with_autograd(func, args, kwargs, layout):
    target = args[0]
    check_no_leaf(target)
    local = functools.partial(_shard, layout=layout, tracks=True)
    (first, *shards), named = map_tensors(local, (args, kwargs))
    result = layout.carry(func(first.clone(), *shards, **named))
    return ask(torch.Tensor.copy_, (target, result), {})


def check_no_leaf(target):
    """Raises as torch does where a program writes into what asks for a
    gradient."""
    if target.requires_grad and target.is_leaf:
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place "
            "operation."
        )


def of_lists(func, name, args, kwargs, tracks):
    """A function of lists of tensors, as `torch.optim` has them.

    What is laid out alike, or plain, is taken as it is stored; a weight that
    meets another layout is gathered, and written back.
    """
    is_in_place = name.endswith("_")
    lists = [x for x in (*args, *kwargs.values()) if _is_list_of_tensors(x)]
    layouts, targets = [], []
    for together in zip(*(x for x in lists if len(x) == len(lists[0]))):
        layout = next(
            (x.sharding for x in together if sharded.is_weight(x)), None
        )
        if layout is not None and not all(
            _meets(x, layout, tracks, is_in_place) for x in together
        ):
            layout = None
        if is_in_place and tracks and sharded.is_weight(together[0]):
            check_no_leaf(together[0])
        layouts.append(layout)

    def enter(xs):
        if not _is_list_of_tensors(xs):
            return laid_out.whole(xs) if sharded.is_weight(xs) else xs
        if len(xs) != len(layouts):
            return [
                laid_out.whole(x) if sharded.is_weight(x) else x for x in xs
            ]
        result = []
        for x, layout in zip(xs, layouts):
            if layout is not None:
                y = _shard(x, layout, tracks)
            elif sharded.is_weight(x):
                y = laid_out.whole(x)
                targets.append((x, y))
            else:
                y = x
            result.append(y)
        return result

    result = func(
        *[enter(x) for x in args],
        **{key: enter(x) for key, x in kwargs.items()},
    )
    if is_in_place:
        with torch.no_grad():
            for weight, value in targets:
                write(weight, value)
        return args[0] if result is not None else None
    return [
        x if layout is None else layout.carry(x)
        for x, layout in zip(result, layouts)
    ]


def _is_list_of_tensors(x):
    return (
        isinstance(x, (list, tuple))
        and bool(x)
        and all(isinstance(y, torch.Tensor) for y in x)
    )


def write(weight, value):
    """Writes a plain tensor, equal on all processes, into a weight.

    Does not communicate, but in the backward pass.
    """
    layout = weight.sharding
    if torch.is_grad_enabled() and value.requires_grad:
        result = layout.carry(laid_out.sliced(value, layout))
        return ask(torch.Tensor.copy_, (weight, result), {})
    local = weight._local_tensor.detach()
    local.copy_(laid_out.cut(value, layout))
    for axis, placement in enumerate(layout.placements):
        if placement.is_partial() and layout.mesh.get_local_rank(axis):
            local.zero_()  # It counts once.
    return weight


def tensors_of(values):
    """The tensors in nested arguments, one after the other."""
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif type(x) in (list, tuple):
            yield from tensors_of(x)
        elif isinstance(x, dict):
            yield from tensors_of(x.values())


def map_tensors(function, structure):
    """Nested arguments with `function` of each tensor and variable."""
    if isinstance(structure, (torch.Tensor, KerasVariable)):
        return function(structure)
    if type(structure) in (list, tuple):
        return type(structure)(map_tensors(function, x) for x in structure)
    if type(structure) is dict:
        return {name: map_tensors(function, x) for name, x in structure.items()}
    return structure
