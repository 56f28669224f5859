"""Ways into torch that ask no tensor's `__torch_function__`.

Custom gradients, and transforms of functions, would compute on the box that a
`GlobalTensor` is, and lose the gradient. While a step runs in which code sees
the global batch they are handed gathered tensors.
"""

import contextlib
import functools

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
    replaced = [
        (torch.autograd.Function, "apply", _apply()),
        (torch.autograd, "backward", _backward(torch.autograd.backward)),
        (torch, "vmap", _transform(torch.vmap)),
    ]
    for name in TRANSFORMS:
        replaced.append(
            (torch.func, name, _transform(getattr(torch.func, name)))
        )
    for name in CALLS:
        replaced.append((torch.func, name, _whole(getattr(torch.func, name))))
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


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


# Modules whose custom gradients know about data shards, or ask for no tensor.
OURS = ("keras.src.backend.torch.distribution.", "torch.")


def _apply():
    released = vars(torch.autograd.Function)["apply"].__func__

    def apply(cls, *args, **kwargs):
        if modes.known or cls.__module__.startswith(OURS):
            return released(cls, *args, **kwargs)
        outputs = released(cls, *map_tensors(whole, args), **kwargs)
        return map_tensors(_with_gradient_of_all, outputs)

    return classmethod(apply)


def _with_gradient_of_all(x):
    """What a custom gradient gave: its backward sees what one device's does."""
    if not x.requires_grad or type(x) is GlobalTensor or modes.step is None:
        return x
    return GradientOfAll.apply(x, modes.step.context)


class GradientOfAll(torch.autograd.Function):
    """The identity; backward: the mean of the data shards' gradients, which is
    that of their mean loss.

    Collective along the data axis in backward.
    """

    @staticmethod
    def forward(ctx, x, context):
        ctx.context = context
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = Sum.apply(grad, ctx.context.data_group)
        return grad / ctx.context.data_size, None


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
