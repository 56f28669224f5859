"""What the programs of this folder share.

Each is a small training program in the manner of a guide: a function without
arguments that makes its data, builds a model, trains it for a few steps and
returns nested numbers. It knows nothing of distributions.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

import keras

# Attention, cut by heads.
HEADS = {
    ".*(query|key|value)/kernel": (None, "model", None),
    ".*(query|key|value)/bias": ("model", None),
    ".*attention_output/kernel": ("model", None, None),
}
PROGRAMS = {}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a guide.

    Attributes:
        run: function without arguments, whose result is nested numbers, with
            `"weights"`, a dict from paths of variables to their values.
        layouts: dict from regular expressions of paths to tuples of axis
            names, for tensor parallelism, before the general rule.
        tolerance: largest relative difference from one device.
    """

    run: Callable
    layouts: dict
    tolerance: float


def program(function=None, *, layouts=None, tolerance=1e-5):
    """Marks a function as a program, under its own name."""

    def mark(function):
        name = function.__name__
        if name in PROGRAMS:
            raise ValueError(f"Two programs have one name. Received: {name}")
        PROGRAMS[name] = Program(function, layouts or {}, tolerance)
        return function

    return mark if function is None else mark(function)


def normal(*shape, seed=0):
    """Normally distributed numbers, float32."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal(shape).astype("float32")


def uniform(*shape, seed=0, low=0.0, high=1.0):
    """Evenly distributed numbers, float32."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype("f4")


def integers(high, *shape, seed=0, low=0):
    """Integers from `low` up to and without `high`, int32."""
    return np.random.default_rng(seed).integers(low, high, shape).astype("i4")


def images(rows, side=8, channels=1, seed=0):
    """Smooth images between 0 and 1: a blob each, somewhere."""
    places = uniform(rows, 2, channels, seed=seed, low=1.0, high=side - 2.0)
    grid = np.arange(side, dtype="float32")
    down = grid[None, :, None, None] - places[:, None, None, 0]
    right = grid[None, None, :, None] - places[:, None, None, 1]
    return np.exp(-(down**2 + right**2) / 4.0).astype("float32")


def sgd(rate=0.05, **kwargs):
    return keras.optimizers.SGD(rate, **kwargs)


def descend(loss, weights, optimizer):
    """One step of an optimizer down a loss."""
    for weight in weights:
        weight.value.grad = None
    loss.backward()
    gradients = [weight.value.grad for weight in weights]
    with torch.no_grad():
        optimizer.apply(gradients, weights)


def weights(*models):
    """The values of all variables, by path."""
    values = {}
    for model in models:
        for variable in model.variables:
            if variable.path in values:
                raise ValueError(
                    "Two variables have one path, so that a layout map "
                    f"cannot tell them apart. Received: {variable.path}"
                )
            values[variable.path] = keras.ops.convert_to_numpy(variable)
    return values


def report(history, *models, **said):
    """What a program returns.

    Args:
        history: what `fit` returned.
        *models: whose weights are compared.
        **said: other nested numbers.
    """
    return {"history": history.history, "weights": weights(*models), **said}
