"""What a torch function does when it is handed weights as they are stored.

Outside of layers a sharded weight shows its whole shape, and what is computed
from it is what one device computes:

- functions of each entry by itself run on our shards, and give shards. Of a
  plain tensor that they meet, equal everywhere, each takes its part;
- sums, means and norms of all entries: one number of each process, added up;
- any other function runs on whole values, which are gathered for it.

What writes into a weight writes our part of it. Nothing is ever partial.
"""

import contextlib

import torch

from keras.src.backend.common import KerasVariable
from keras.src.backend.torch.distribution.ops import operators
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import weight_entries
from keras.src.backend.torch.distribution.variables import weight_sums

# Attributes that hold numbers.
NUMBERS = frozenset("T H mT mH real imag".split())

# They ask another tensor for its shape alone, or a weight for its dtype.
OF_A_SHAPE = frozenset("expand_as reshape_as view_as".split())
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
            return weight_entries.ask(func, args, kwargs)
    elif name == "backward":
        return func(laid_out.whole(args[0]), *args[1:], **kwargs)
    elif name in operators.QUESTIONS and not dispatched:
        return weight_entries.ask(func, args, kwargs)
    elif func is torch.autograd.grad:
        return gradients(*args, **kwargs)
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
    if name in weight_sums.OF_ONE_NUMBER:
        one = weight_sums.OF_ONE_NUMBER[name]
        return [one(x, *args[1:], **kwargs) for x in args[0]]
    if name.startswith(("_foreach_", "_fused_")):
        result = weight_entries.of_lists(func, name, args, kwargs, tracks)
    elif weight_entries.is_entrywise(name):
        result = weight_entries.entrywise(func, args, kwargs, tracks)
    elif name in weight_sums.REDUCTIONS:
        result = weight_sums.REDUCTIONS[name](args, kwargs, tracks)
    elif (name in NEW or name in OF_A_SHAPE) and not dispatched:
        result = like_a_weight(func, name, args, kwargs)
    elif dispatched and name in ("view", "new_empty_strided"):
        result = same_shape(name, *args, **kwargs)
    if result is NotImplemented:
        result = on_whole_values(func, args, kwargs, dispatched)
    return result


def like_a_weight(func, name, args, kwargs):
    """Functions that ask a weight for its shape or kind of number alone."""
    others = weight_entries.tensors_of((*args[1:], *kwargs.values()))
    if any(map(sharded.is_weight, others)) and (
        name in NEW or sharded.is_weight(args[0])
    ):
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
        weight_entries.check_no_leaf(target)
    with contextlib.nullcontext() if tracks else torch.no_grad():
        whole, named = weight_entries.map_tensors(sharded.whole, (args, kwargs))
        if writes:
            result = whole[0]
            if result.requires_grad:
                result = result.clone()
            func(result, *whole[1:], **named)
            return weight_entries.write(target, result)
        result = func(*whole, **named)
    if sharded.is_weight(target) and not dispatched:
        return target.views(result, whole[0])
    return result


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
    outputs, grad_outputs = weight_entries.map_tensors(
        sharded.whole, (outputs, grad_outputs)
    )
    grads = torch.autograd.grad(outputs, edges, grad_outputs, *args, **kwargs)
    return tuple(
        laid_out.lay_out(grad, x.sharding)
        if sharded.is_weight(x) and grad is not None
        else grad
        for x, grad in zip(inputs, grads)
    )


def _edge(weight):
    return weight_entries.ask(
        torch.autograd.graph.get_gradient_edge, (weight,), {}
    )


def plain(structure):
    """Arguments of which views of weights are plain tensors, and variables
    their values."""
    return weight_entries.map_tensors(_plain, structure)


def _plain(x):
    if isinstance(x, KerasVariable):
        return x.value
    return x.plain() if hasattr(type(x), "weight_of") else x
