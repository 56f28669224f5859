"""Whether torch has a rule for a function of shards, found out without numbers.

A function is tried once for each kind of arguments, on tensors that have no
memory (torch's device `meta`) and are cut as its arguments are. That says what
global shapes, placements and dtypes say, which are equal on all processes, and
sends nothing. So no process takes its own trouble for a missing rule: memory
that runs out, a connection that breaks, a kernel that fails are errors.
"""

import numbers

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution.tensors import sharded

# What DTensor raises where a rule is missing or does not fit.
FAILURES = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)

SIZE = 4096
_found = {}


def why_not(function, func, args, kwargs, mesh):
    """Why a function cannot be computed on these shards; None if it can.

    Does not communicate.

    Args:
        function: called as `function(func, args, kwargs, mesh)`.
        func: torch function.
        args, kwargs: its arguments, shards of one size among them.
        mesh: torch mesh of the shards.
    """
    key = _key((func, args, kwargs))
    try:
        if key in _found:
            return _found[key]
    except TypeError:  # Something among the arguments cannot be looked up.
        return _try(function, func, args, kwargs, mesh)
    if len(_found) >= SIZE:
        _found.clear()
    why = _found[key] = _try(function, func, args, kwargs, mesh)
    return why


def _try(function, func, args, kwargs, mesh):
    args, kwargs = _without_memory((args, kwargs))
    try:
        # Nobody who counts what backward needs shall see this.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            function(func, args, kwargs, mesh)
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"
    return None


def _same(x):
    return x


def _key(x):
    if isinstance(x, torch.Tensor):
        asks = x.requires_grad and torch.is_grad_enabled()
        placements = getattr(x, "placements", None)
        if placements is not None:
            placements = (tuple(x.device_mesh.shape), tuple(placements))
        return (tuple(x.shape), x.stride(), x.dtype, asks, placements)
    if isinstance(x, (list, tuple)):
        return (type(x), *map(_key, x))
    if isinstance(x, dict):
        return tuple((name, _key(value)) for name, value in x.items())
    if isinstance(x, slice):
        return (slice, _key(x.start), _key(x.stop), _key(x.step))
    # 1, 1.0 and True are equal, and not the same to torch.
    return (type(x), x) if isinstance(x, numbers.Number) else x


def _without_memory(x):
    if isinstance(x, DTensor):
        local = _empty(sharded.local_of(x), x.requires_grad)
        shape = tuple(x.shape)
        if local.requires_grad:
            return sharded.Enter.apply(
                local, x.device_mesh, tuple(x.placements), shape
            )
        return sharded.wrap(local, x.device_mesh, x.placements, shape)
    if isinstance(x, torch.Tensor):
        return _empty(x, x.requires_grad)
    if isinstance(x, dict):
        return {name: _without_memory(value) for name, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(map(_without_memory, x))
    return x


def _empty(x, asks):
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    # No leaf, which nobody may write into.
    return y.requires_grad_().view_as(y) if asks else y
