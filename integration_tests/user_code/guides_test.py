"""Programs in the manner of guides give one device's numbers, distributed.

`GUIDES_ALL=1` runs all of them under each distribution, not some.
"""

import functools
import os
import re

import numpy as np
import pytest

import keras
from integration_tests.guides import PROGRAMS
from integration_tests.harness import parity

NAMES = list(PROGRAMS)
ALL = "GUIDES_ALL" in os.environ


def some(first):
    """Every third program, from this one on, or all."""
    names = NAMES if ALL else NAMES[first::3]
    return pytest.mark.parametrize("name", names)


def run_here(name, distribution=None):
    """What a program returns, computed on this process.

    Collective under a distribution: every process calls it.
    """
    with parity.fresh(distribution, 11):
        return PROGRAMS[name].run()


@functools.cache
def expected(name):
    """What one device gives.

    Collective the first time: every process calls it.
    """
    return parity.on_one_device(functools.partial(run_here, name))


def layouts(name, model_axis=None, data_axis=None):
    """A key for each variable that has something to cut.

    Args:
        model_axis: cuts the last dim of kernels, tables and the like, or what
            the program says.
        data_axis: cuts the first dim that is not cut, of all variables.
    """
    result = {}
    for path, value in expected(name)["weights"].items():
        # The states of random seeds are integers.
        if not np.issubdtype(value.dtype, np.floating):
            continue
        axes = [None] * value.ndim
        if model_axis is not None and value.ndim > 1 and value.shape[-1] > 1:
            axes[-1] = model_axis
        for key, given in PROGRAMS[name].layouts.items():
            if model_axis is not None and re.fullmatch(key, path):
                axes = list(given)
        if data_axis is not None and value.ndim and value.shape[0] > 1:
            if axes[0] is None:
                axes[0] = data_axis
        if any(axes):
            result[re.escape(path)] = tuple(axes)
    return result


def assert_as_alone(name, distribution):
    """Asserts that a program gives one device's numbers on all processes."""
    actual = run_here(name, distribution)
    parity.assert_equal_on_all(
        name, actual, expected(name), PROGRAMS[name].tolerance
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.world(2)
def test_data_parallel(name):
    expected(name)
    assert_as_alone(name, keras.distribution.DataParallel())


@some(0)
@pytest.mark.world(2)
def test_tensor_parallel(name):
    cuts = layouts(name, model_axis="model")
    assert_as_alone(name, parity.model_parallel((1, 2), cuts))


@some(1)
@pytest.mark.world(2)
def test_fully_sharded(name):
    cuts = layouts(name, data_axis="batch")
    assert_as_alone(name, parity.model_parallel((2,), cuts, ("batch",)))


@some(2)
@pytest.mark.world(4)
def test_two_axes(name):
    cuts = layouts(name, model_axis="model", data_axis="batch")
    assert_as_alone(name, parity.model_parallel((2, 2), cuts))
