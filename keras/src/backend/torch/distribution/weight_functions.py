"""What a torch function does when it is handed weights as they are stored.

Outside of layers a sharded weight shows its whole shape, and what is computed
from it is what one device computes:

- functions of each entry by itself run on our shards, and give shards. Plain
  tensors that they meet are equal on all processes: each takes its part;
- sums, means and norms of all entries: one number of each process, added up;
- any other function runs on whole values, which are gathered for it.

What writes into a weight writes our part of it. Nothing is ever partial.
"""

import contextlib
import functools
import inspect

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.common import KerasVariable
from keras.src.backend.torch.distribution import collectives
from keras.src.backend.torch.distribution import laid_out
from keras.src.backend.torch.distribution import operators
from keras.src.backend.torch.distribution import sharded

as_torch_has_it = torch._C.DisableTorchFunctionSubclass

# Attributes that hold numbers.
NUMBERS = frozenset("T H mT mH real imag".split())

QUESTIONS = operators.QUESTIONS - {"backward"} | frozenset(
    """
    data_ptr is_conj is_inference is_neg is_pinned is_set_to is_shared
    names_ refine_names sym_numel sym_size sym_stride sym_storage_offset
    untyped_storage
    """.split()
)

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

# They ask another tensor for its shape alone, or for its kind of number.
OF_A_SHAPE = frozenset("expand_as reshape_as view_as".split())
OF_A_DTYPE = frozenset("to type_as".split())
NEW = frozenset("new_empty new_full new_ones new_tensor new_zeros".split())


def run(func, args, kwargs, dispatched=False):
    """What a torch function gives for weights.

    Collective, but for functions of each entry by itself: every process of the
    weights' mesh calls it.

    Args:
        func: torch function or method, or an `aten` operator.
        args, kwargs: its arguments, weights among them.
        dispatched: whether autograd has seen it already.
    """
    name = operators.name_of(func)
    if name == "__get__":
        if getattr(func.__self__, "__name__", "") not in NUMBERS:
            return _ask(func, args, kwargs)
    elif name in QUESTIONS and not dispatched:
        return _ask(func, args, kwargs)
    elif func is torch.autograd.grad:
        return gradients(*args, **kwargs)
    elif name == "backward":
        return func(laid_out.whole(args[0]), *args[1:], **kwargs)
    elif getattr(func, "__module__", "") == "torch.nn.init":
        # They name their target, and write without autograd.
        named = {key: x for key, x in kwargs.items() if key != "tensor"}
        with torch.no_grad():
            target = args or (kwargs["tensor"],)
            return on_whole_values(func, target, named)
    elif dispatched and name == "is_same_size":
        return args[0].shape == args[1].shape
    args, kwargs = plain((args, kwargs))
    tracks = torch.is_grad_enabled() and not dispatched
    result = NotImplemented
    if name.startswith(("_foreach_", "_fused_")):
        result = of_lists(func, name, args, kwargs, tracks)
    elif is_entrywise(name):
        result = entrywise(func, args, kwargs, tracks)
    elif name in REDUCTIONS:
        result = REDUCTIONS[name](args, kwargs, tracks)
    elif (name in NEW or name in OF_A_SHAPE) and not dispatched:
        result = like_a_weight(func, name, args, kwargs)
    elif dispatched and name in ("view", "new_empty_strided"):
        result = same_shape(name, *args, **kwargs)
    if result is NotImplemented:
        result = on_whole_values(func, args, kwargs, dispatched)
    return result


def _ask(func, args, kwargs):
    with as_torch_has_it():
        return func(*args, **kwargs)


def is_entrywise(name):
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
    tensors = list(_tensors((*args, *kwargs.values())))
    weights = [x for x in tensors if sharded.is_weight(x)]
    layout = weights[0].sharding
    name = operators.name_of(func)
    if "out" in kwargs or (layout.is_partial and name not in OF_ADDENDS):
        return NotImplemented
    if name == "where" and len(args) + len(kwargs) < 3:
        return NotImplemented
    if name in OF_A_DTYPE:
        return _of_kind(func, args, kwargs, tracks)
    if not all(_meets(x, layout, tracks) for x in tensors):
        return NotImplemented
    target = args[0] if operators.is_in_place(func) else None
    if target is not None:
        if not sharded.is_weight(target):
            return NotImplemented
        if tracks and any(x.requires_grad for x in tensors):
            return _write_with_autograd(func, args, kwargs, layout)
        tracks = False
    local = functools.partial(_shard, layout=layout, tracks=tracks)
    shards, named = _map(local, (args, kwargs))
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


def _meets(x, layout, tracks):
    """Whether shards may meet a tensor, each its own part of it."""
    if sharded.is_weight(x):
        return layout.is_laid_out(x) and tuple(x.shape) == layout.shape
    # Its gradient would be that of all data shards' losses.
    return (
        not isinstance(x, DTensor)
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
    rest, named = _map(
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
    _check_no_leaf(target)
    local = functools.partial(_shard, layout=layout, tracks=True)
    (first, *shards), named = _map(local, (args, kwargs))
    result = layout.carry(func(first.clone(), *shards, **named))
    return _ask(torch.Tensor.copy_, (target, result), {})


def _check_no_leaf(target):
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
    if name in OF_ONE_NUMBER:
        one = OF_ONE_NUMBER[name]
        return [one(x, *args[1:], **kwargs) for x in args[0]]
    lists = [x for x in (*args, *kwargs.values()) if _is_list_of_tensors(x)]
    layouts, targets = [], []
    for together in zip(*(x for x in lists if len(x) == len(lists[0]))):
        layout = next(
            (x.sharding for x in together if sharded.is_weight(x)), None
        )
        if layout is not None and not all(
            _meets(x, layout, tracks) for x in together
        ):
            layout = None
        if is_in_place and tracks and sharded.is_weight(together[0]):
            _check_no_leaf(together[0])
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


def like_a_weight(func, name, args, kwargs):
    """Functions that ask a weight for its shape or kind of number alone."""
    if any(
        map(sharded.is_weight, _tensors((*args[1:], *kwargs.values())))
    ) and (name in NEW or sharded.is_weight(args[0])):
        return NotImplemented
    if name in NEW:
        local = args[0]._local_tensor if sharded.is_weight(args[0]) else args[0]
        return func(local, *args[1:], **kwargs)
    x, *others = args
    if sharded.is_weight(x) or kwargs or len(others) != 1:
        return NotImplemented
    return func(x, torch.empty(others[0].shape, device="meta"))


def same_shape(name, x, size, stride=None, **kwargs):
    """What autograd asks for, of a tensor like this one."""
    if not sharded.is_weight(x) or tuple(size) != tuple(x.shape):
        return NotImplemented
    local = x._local_tensor
    if name == "view":
        return x.sharding.wrap(local.view_as(local))
    return x.sharding.wrap(torch.empty_like(local, dtype=kwargs.get("dtype")))


def on_whole_values(func, args, kwargs, dispatched=False):
    """A function of whole values. Its result is plain.

    If it writes into a weight, our part of what it wrote is kept. What shares
    memory with a whole value is a view of the weight.

    Collective: every process of the weights' mesh calls it.
    """
    operators.log(func, "it needs all entries of a weight")
    if sharded.is_weight(kwargs.get("out")):
        kwargs = dict(kwargs)
        return kwargs.pop("out").copy_(func(*args, **kwargs))
    target = args[0] if args else None
    writes = sharded.is_weight(target) and operators.is_in_place(func)
    tracks = torch.is_grad_enabled() and not dispatched
    if writes and tracks:
        _check_no_leaf(target)
    with contextlib.nullcontext() if tracks else torch.no_grad():
        whole, named = _map(sharded.whole, (args, kwargs))
        if writes:
            result = whole[0]
            if result.requires_grad:
                result = result.clone()
            func(result, *whole[1:], **named)
            return write(target, result)
        result = func(*whole, **named)
    if sharded.is_weight(target) and not dispatched:
        return target.views(result, whole[0])
    return result


def write(weight, value):
    """Writes a plain tensor, equal on all processes, into a weight.

    Does not communicate, but in the backward pass.
    """
    layout = weight.sharding
    if torch.is_grad_enabled() and value.requires_grad:
        result = layout.carry(laid_out.sliced(value, layout))
        return _ask(torch.Tensor.copy_, (weight, result), {})
    local = weight._local_tensor.detach()
    local.copy_(laid_out.cut(value, layout))
    for axis, placement in enumerate(layout.placements):
        if placement.is_partial() and layout.mesh.get_local_rank(axis):
            local.zero_()  # It counts once.
    return weight


def laid_out_as(value, weight):
    """A tensor as a new weight, cut like another one.

    Collective if `value` is a weight with other placements.

    Args:
        value: tensor of the same shape; a plain one is equal on all processes.
    """
    layout = weight.sharding
    if type(value) is type(weight) and layout.is_laid_out(value):
        return value
    with torch.no_grad():
        (value,) = plain((sharded.whole(value),))
    if tuple(value.shape) != layout.shape:
        raise RuntimeError(
            "A weight and what is assigned to it must have one shape. "
            f"Expected: {layout.shape}. Received: {tuple(value.shape)}"
        )
    return layout.wrap(laid_out.cut(value.detach(), layout).clone())


def gradients(outputs, inputs, grad_outputs=None, *args, **kwargs):
    """`torch.autograd.grad` with respect to weights, laid out as they are.

    Collective where a gradient arrives whole.
    """
    is_one = isinstance(inputs, torch.Tensor)
    inputs = (inputs,) if is_one else tuple(inputs)
    # By their edges: a weight itself would lead here again.
    edges = [_edge(x) if sharded.is_weight(x) else x for x in inputs]
    outputs, grad_outputs = _map(sharded.whole, (outputs, grad_outputs))
    grads = torch.autograd.grad(outputs, edges, grad_outputs, *args, **kwargs)
    return tuple(
        laid_out.lay_out(grad, x.sharding)
        if sharded.is_weight(x) and grad is not None
        else grad
        for x, grad in zip(inputs, grads)
    )


def _edge(weight):
    with as_torch_has_it():
        return torch.autograd.graph.get_gradient_edge(weight)


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
        if not sharded.is_weight(x) or list(_tensors(others)):
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


def _tensors(values):
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif type(x) in (list, tuple):
            yield from _tensors(x)
        elif isinstance(x, dict):
            yield from _tensors(x.values())


def plain(structure):
    """Arguments of which views of weights are plain tensors, and variables
    their values."""
    return _map(_plain, structure)


def _plain(x):
    if isinstance(x, KerasVariable):
        return x.value
    return x.plain() if hasattr(type(x), "weight_of") else x


def _map(function, structure):
    if isinstance(structure, (torch.Tensor, KerasVariable)):
        return function(structure)
    if type(structure) in (list, tuple):
        return type(structure)(_map(function, x) for x in structure)
    if type(structure) is dict:
        return {name: _map(function, x) for name, x in structure.items()}
    return structure
