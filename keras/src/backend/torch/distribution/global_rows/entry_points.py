"""Ways into torch that ask no tensor's `__torch_function__`.

Custom gradients, and transforms of functions, would compute on the box that a
`GlobalTensor` is, and lose the gradient. While a step runs in which code sees
the global batch they are handed gathered tensors.
"""

import contextlib
import functools
import weakref

import torch

from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import Sum
from keras.src.backend.torch.distribution.global_rows.carrier import map_tensors
from keras.src.backend.torch.distribution.global_rows.carrier import of_loss
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.modes import modes

# They make a function of a function.
TRANSFORMS = ("vmap", "grad", "grad_and_value", "jacrev", "jacfwd", "hessian")
# They call a function.
CALLS = ("vjp", "jvp", "linearize")


@contextlib.contextmanager
def on_whole_tensors():
    """Within it, these ways take gathered tensors. What was there is put back.

    Collective along the data axis, where they are handed others.
    """
    put_back = _replace()
    try:
        yield
    finally:
        put_back()


class Kept:
    """They take gathered tensors as long as this object is kept: a program
    outside of steps has a global batch."""

    def __init__(self):
        weakref.finalize(self, _replace())


def _replace():
    """Replaces them, and returns the function that puts back what was there."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in PLACES]

    def put_back():
        for owner, name, value in before:
            setattr(owner, name, value)

    for (owner, name, make), (*_, released) in zip(PLACES, before):
        setattr(owner, name, _made(make, released))
    return put_back


@functools.lru_cache(maxsize=64)
def _made(make, released):
    return make(released)


def _whole(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        args, kwargs = map_tensors(whole, (args, kwargs))
        return function(*args, **kwargs)

    return call


def _transform(transform):
    @functools.wraps(transform)
    def transformed(*args, **kwargs):
        return _whole(transform(*args, **kwargs))

    return transformed


# Modules whose custom gradients are linear in what arrives, or know about data
# shards.
OURS = ("keras.src.backend.torch.distribution.", "torch.")


def _apply(released):
    # A class method of Python's in torch 2.13, of C's since 2.14.
    def apply(cls, *args, **kwargs):
        rows = None if modes.step is None else modes.step.shards
        for x in args:
            if type(x) is GlobalTensor:
                rows, args = x.rows or rows, map_tensors(whole, args)
                break
        y = released.__get__(None, cls)(*args, **kwargs)
        if rows is None or modes.known or cls.__module__.startswith(OURS):
            return y
        return map_tensors(lambda y: _with_gradient_of_all(y, rows), y)

    return classmethod(apply)


def _with_gradient_of_all(x, rows):
    """What a custom gradient gave: its backward sees what one device's does."""
    if not x.requires_grad or type(x) is GlobalTensor:
        return x
    return GradientOfAll.apply(x, rows)


class GradientOfAll(torch.autograd.Function):
    """The identity; backward: the mean of the data shards' gradients, which is
    that of their mean loss.

    Collective along the data axis in backward.
    """

    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = Sum.apply(grad, ctx.rows.group)
        return grad / len(ctx.rows.counts), None


def _backward(released):
    @functools.wraps(released)
    def backward(tensors, grad_tensors=None, *args, **kwargs):
        if isinstance(tensors, torch.Tensor):
            tensors = [tensors]
        if not any(type(x) is GlobalTensor for x in tensors):
            return released(tensors, grad_tensors, *args, **kwargs)
        if grad_tensors is None:
            losses = [of_loss(x) for x in tensors]
            return released(losses, None, *args, **kwargs)
        if isinstance(grad_tensors, torch.Tensor):
            grad_tensors = [grad_tensors]
        losses = [
            of_loss(x if g is None else (x * g).sum())
            for x, g in zip(tensors, grad_tensors)
        ]
        return released(losses, None, *args, **kwargs)

    return backward


PLACES = [
    (torch.autograd.Function, "apply", _apply),
    (torch.autograd, "backward", _backward),
    (torch, "vmap", _transform),
    *((torch.func, name, _transform) for name in TRANSFORMS),
    *((torch.func, name, _whole) for name in CALLS),
]
