"""Tests of variables that no mesh axis shards.

Of those that one does: `distribution/variables/storage_test.py`.
"""

import gc
import weakref

import numpy as np
import pytest
import torch

from keras.src import backend
from keras.src import initializers
from keras.src import layers
from keras.src.backend import common
from keras.src.backend.torch import core
from keras.src.distribution.distribution_lib import DataParallel
from keras.src.distribution.distribution_lib import DeviceMesh
from keras_torch_distribution.src.backend.torch import core as overlay


def test_overlay_is_in_place():
    assert core.Variable is overlay.Variable
    assert issubclass(backend.Variable, overlay.Variable)
    assert backend.convert_to_numpy is overlay.convert_to_numpy


def test_variable_without_a_distribution(no_world):
    v = backend.Variable(np.ones((2, 3)), dtype="float32", name="v")
    assert type(v._value) is torch.nn.Parameter
    assert v.value is v._value
    assert v._value.requires_grad
    assert not v._value._backward_hooks
    assert tuple(v.shape) == (2, 3)
    assert "placements" not in repr(v)
    v.assign(np.full((2, 3), 2.0))
    v.assign_add(np.ones((2, 3)))
    np.testing.assert_array_equal(v.numpy(), np.full((2, 3), 3.0))
    with pytest.raises(ValueError, match="shape"):
        v.assign(np.ones((3, 2)))
    (v * 2).sum().backward()
    assert v.value.grad.tolist() == [[2.0] * 3] * 2


def test_initializer_without_a_distribution(no_world):
    make = lambda: initializers.RandomNormal(seed=1)
    v = backend.Variable(make(), shape=(2, 3))
    np.testing.assert_array_equal(
        v.numpy(), backend.convert_to_numpy(make()((2, 3)))
    )


def test_trainable(no_world):
    v = backend.Variable(np.ones(2), dtype="float32")
    v.trainable = False
    assert not v.trainable
    assert not v._value.requires_grad
    v.trainable = True
    assert v.trainable
    assert v._value.requires_grad
    dense = layers.Dense(2)
    dense.build((2, 2))
    dense.trainable = False
    assert not dense.trainable_variables
    assert not dense.kernel.value.requires_grad


def test_autocast_without_a_distribution(no_world):
    v = backend.Variable(np.ones(2), dtype="float32")
    with backend.AutocastScope("bfloat16"):
        assert v.value.dtype == torch.bfloat16
    assert v.value.dtype == torch.float32


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, requires_grad=True),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([1, 1]),
        [torch.tensor(1.0), torch.tensor(1.0)],
        [1.0, 1.0],
        np.ones(2),
    ],
)
def test_convert_to_numpy(value):
    result = core.convert_to_numpy(value)
    assert isinstance(result, np.ndarray)
    np.testing.assert_array_equal(result.astype("float32"), [1.0, 1.0])


def data_parallel():
    mesh = DeviceMesh((2,), ["batch"], ["cpu:0", "cpu:1"])
    return DataParallel(device_mesh=mesh)


def test_gradients_of_two_processes_are_reduced(fake_world):
    fake_world(2)
    with data_parallel().scope():
        v = backend.Variable(np.ones(2), dtype="float32")
    # The mean over two data shards, of which the fake one gave nothing.
    v.value.sum().backward()
    assert v.value.grad.tolist() == [0.5, 0.5]


def test_a_variable_that_is_trainable_later_is_hooked_once(fake_world):
    fake_world(2)
    with data_parallel().scope():
        v = backend.Variable(np.ones(2), dtype="float32", trainable=False)
        for trainable in (True, False, True):
            v.trainable = trainable
    v.value.sum().backward()
    assert v.value.grad.tolist() == [0.5, 0.5]


def test_variables_are_freed(fake_world):
    fake_world(2)
    distribution = data_parallel()
    with distribution.scope():
        v = backend.Variable(np.ones(2), dtype="float32")
        v.value.sum().backward()
    references = [weakref.ref(v), weakref.ref(v._value)]
    del v
    gc.collect()
    assert [reference() for reference in references] == [None, None]


DTYPES = ("float32", "float16", "float64", "int32", "int64", "bool", "uint8")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "value",
    [
        *(1, 2.5, True, np.float32(1.5), np.ones((3,), "int32")),
        *(torch.tensor(2.0), torch.tensor([1, 0, 2]), torch.ones(3, 3)),
    ],
    ids=str,
)
def test_adding_to_a_variable_is_as_keras_does_it(dtype, value):
    """Also what it refuses."""

    def outcome(add):
        variable = core.Variable(
            np.array([0, 1, 1]), dtype=dtype, trainable=False
        )
        try:
            result = add(variable, value)
        except Exception as error:
            return type(error), variable.numpy().tolist()
        return result.dtype, result.tolist(), variable.numpy().tolist()

    expected = outcome(common.KerasVariable.assign_add)
    assert outcome(core.Variable.assign_add) == expected


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, np.dtype("int8")])
def test_dtypes_and_casts_are_those_of_keras(dtype):
    expected = overlay.released_to_torch_dtype(dtype)
    assert core.to_torch_dtype(dtype) is expected
    for x in (torch.ones(2), [1, 2], 3.0, core.Variable([1.0])):
        assert core.cast(x, dtype).dtype is expected
    with pytest.raises(ValueError, match="complex42"):
        core.to_torch_dtype("complex42")
