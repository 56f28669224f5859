"""Keras's operations on shards give what they give on whole values.

Forward and backward, for every function of `keras.ops` that takes a tensor and
for those that want more arguments, with each dim of the input sharded.
"""

import functools

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard

import keras
from integration_tests.harness import parity
from keras import ops
from keras.src import tree
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded

SHAPE = (4, 6, 8)


def uniform(seed):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(0.1, 0.9, SHAPE).astype("float32"))


OTHER = uniform(1)
INDICES = torch.from_numpy(np.arange(4 * 6 * 8).reshape(SHAPE) * 7 % 4)
CLASSES = INDICES[:, :, 0]


def write(x):
    y = x * 1
    y[:, 1, 2] = 0.0
    return y


def write_shards(x):
    y = torch.zeros(SHAPE)
    y[:, 1:3] = x[:, 2:4]
    return y


def symmetric(x):
    return ops.matmul(x, ops.transpose(x, (0, 2, 1))) + ops.eye(6)


# Those that one tensor, or two, do not say enough to.
WITH_ARGUMENTS = {
    "argmax": lambda x: ops.argmax(x, -1),
    "argsort": lambda x: ops.argsort(x, 1),
    "binary_crossentropy": lambda x: ops.binary_crossentropy(OTHER, x),
    "boolean mask": lambda x: x[x[:, 0, 0] > 0.0],
    "broadcast_to": lambda x: ops.broadcast_to(x, (2, *SHAPE)),
    "categorical_crossentropy": lambda x: ops.categorical_crossentropy(
        OTHER, x
    ),
    "clip": lambda x: ops.clip(x, 0.3, 0.6),
    "concatenate": lambda x: ops.concatenate([x, OTHER], -1),
    "concatenate itself": lambda x: ops.concatenate([x, x], 1),
    "cross": lambda x: ops.cross(x[..., :3], OTHER[..., :3]),
    "cumprod": lambda x: ops.cumprod(x, 1),
    "cumsum": lambda x: ops.cumsum(x, -1),
    "diff": lambda x: ops.diff(x, axis=-1),
    "digitize": lambda x: ops.digitize(x, np.array([0.2, 0.5], "float32")),
    "dot": lambda x: ops.dot(x, OTHER[0].T),
    "einsum": lambda x: ops.einsum("abc,adc->abd", x, OTHER),
    "flip": lambda x: ops.flip(x, -1),
    "fori_loop": lambda x: ops.fori_loop(0, 3, lambda i, v: v * x, x),
    "gather": lambda x: torch.gather(x, -1, INDICES),
    "in place": lambda x: (x * 1).add_(1).mul_(2),
    "in place of plain": lambda x: (x - OTHER).mul_(OTHER).add_(1),
    "index": lambda x: x[:, torch.tensor([1, 0]), :],
    "index_select": lambda x: torch.index_select(x, -1, torch.tensor([1, 0])),
    "interpolate": lambda x: torch.nn.functional.interpolate(x, scale_factor=2),
    "inverse": lambda x: ops.inv(symmetric(x)),
    "last": lambda x: x[..., -1],
    "layer_norm": lambda x: torch.nn.functional.layer_norm(
        x, (8,), OTHER[0, 0], OTHER[0, 1]
    ),
    "layer_norm of two dims": lambda x: torch.nn.functional.layer_norm(
        x, (6, 8), OTHER[0], OTHER[1]
    ),
    "log_softmax": lambda x: ops.log_softmax(x, 1),
    "logsumexp": lambda x: ops.logsumexp(x, -1),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.0),
    "matmul": symmetric,
    "max": lambda x: ops.max(x, -1),
    "mean": lambda x: ops.mean(x, (0, 2)),
    "median": lambda x: ops.median(x, -1),
    "moveaxis": lambda x: ops.moveaxis(x, -1, 0),
    "norm": lambda x: ops.norm(x, axis=-1),
    "one_hot": lambda x: ops.one_hot(ops.cast(x * 4, "int32"), 5),
    "outer": lambda x: ops.outer(x[0, 0], x[1, 1]),
    "pad": lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 3))),
    "pad by reflection": lambda x: ops.pad(
        x, ((0, 0), (1, 2), (1, 3)), mode="reflect"
    ),
    "quantile": lambda x: ops.quantile(x, 0.3, -1),
    "repeat": lambda x: ops.repeat(x, 2, -1),
    "reshape (4, -1)": lambda x: ops.reshape(x, (4, -1)),
    "reshape (24, 8)": lambda x: ops.reshape(x, (24, 8)),
    "reshape (4, 3, 2, 8)": lambda x: ops.reshape(x, (4, 3, 2, 8)),
    "reshape (4, 6, 2, 4)": lambda x: ops.reshape(x, (4, 6, 2, 4)),
    "reshape (-1,)": lambda x: ops.reshape(x, (-1,)),
    "resize": lambda x: ops.image.resize(
        x[None], (3, 5), data_format="channels_last"
    ),
    "rms_normalization": lambda x: ops.rms_normalization(x),
    "roll": lambda x: ops.roll(x, 2, -1),
    "scan": lambda x: ops.scan(lambda c, v: (c + v, c * v), x[0], x),
    "scatter_update": lambda x: ops.scatter_update(
        x, torch.tensor([[0, 1, 2], [1, 1, 1]]), torch.tensor([1.0, 2.0])
    ),
    "searchsorted": lambda x: ops.searchsorted(
        torch.linspace(0, 1, 5), ops.reshape(x, (-1,))
    ),
    "segment_sum": lambda x: ops.segment_sum(x, torch.tensor([0, 0, 1, 2]), 4),
    "slice": lambda x: ops.slice(x, (0, 1, 2), (2, 3, 4)),
    "slice_update": lambda x: ops.slice_update(
        x, (0, 1, 2), torch.ones(2, 3, 4)
    ),
    "slice_update by shards": lambda x: ops.slice_update(
        OTHER, (0, 0, 1), x[:, :, :3] * 2
    ),
    "softmax": lambda x: ops.softmax(x, -1),
    "sort": lambda x: ops.sort(x, -1),
    "sparse_categorical_crossentropy": lambda x: (
        ops.sparse_categorical_crossentropy(CLASSES, x)
    ),
    "split": lambda x: ops.split(x, 2, -1),
    "split at": lambda x: ops.split(x, [2, 5], -1),
    "stack": lambda x: ops.stack([x, OTHER]),
    "std": lambda x: ops.std(x, (1,)),
    "strided": lambda x: x[:, 1:3, ::2],
    "svd": lambda x: ops.svd(x, compute_uv=False),
    "take": lambda x: ops.take(x, torch.tensor([2, 0, 3]), axis=-1),
    "take_along_axis": lambda x: ops.take_along_axis(x, INDICES, axis=-1),
    "tensordot": lambda x: ops.tensordot(x, OTHER, axes=[[2], [2]]),
    "tile": lambda x: ops.tile(x, (1, 2, 2)),
    "top_k": lambda x: ops.top_k(x, 3),
    "transpose": lambda x: ops.transpose(x, (2, 0, 1)),
    "unfold": lambda x: x.unfold(-1, 2, 2),
    "var": lambda x: ops.var(x, -1),
    "where": lambda x: ops.where(x > 0.5, x, OTHER),
    "where zero": lambda x: ops.where(x > 0.5, x, 0.0),
    "write": write,
    "write shards": write_shards,
}
# What they give is not of the numbers that they are handed.
NO_RESULT = {"empty", "empty_like", "is_tensor", "shape", "ctc_decode"}


@functools.cache
def functions():
    """`{name: function of one tensor}`, for all that a tensor is enough."""
    result = dict(WITH_ARGUMENTS)
    for name in dir(ops):
        function = getattr(ops, name)
        if name.startswith("_") or isinstance(function, type):
            continue
        if not callable(function) or name in NO_RESULT:
            continue
        for others in ((), (OTHER,)):
            of_one = functools.partial(call, function, others)
            try:
                if results(of_one, uniform(0)):
                    result.setdefault(name, of_one)
                    break
            except Exception:
                # It wants other arguments: `WITH_ARGUMENTS` has some of them.
                continue
    return result


def call(function, others, x):
    return function(x, *(other.clone() for other in others))


def results(function, x):
    return [y for y in tree.flatten(function(x)) if torch.is_tensor(y)]


class Called(keras.layers.Layer):
    """A function as a layer, whose input is cut along a dim."""

    def __init__(self, function, dim=None):
        super().__init__()
        self.function, self.dim = function, dim
        self.built = True

    def call(self, x):
        if self.dim is not None:
            mesh = current().model_mesh
            local = collectives.Slice.apply(x, self.dim, mesh.get_group(0))
            x = sharded.Enter.apply(local, mesh, (Shard(self.dim),), SHAPE)
            assert isinstance(x, DTensor)
        return [activations.whole(y) for y in results(self.function, x)]


def number(y):
    """Numbers that can be subtracted, of booleans and infinities too."""
    return np.nan_to_num(y.detach().numpy().astype("complex128"))


def run(function, dim=None):
    x = uniform(0).requires_grad_()
    outputs = Called(function, dim)(x)
    loss = 0
    for i, y in enumerate(outputs):
        if y.is_floating_point() and y.requires_grad:
            rng = np.random.default_rng(i)
            weights = rng.uniform(size=tuple(y.shape)).astype("float32")
            loss = loss + (y * torch.from_numpy(weights)).sum()
    if torch.is_tensor(loss):
        loss.backward()
    return [number(y) for y in outputs], x.grad


@functools.cache
def reference(name):
    """What a function gives on one device; None if torch has no gradient."""
    try:
        return run(functions()[name])
    except RuntimeError as error:
        assert "not implemented" in str(error), (name, error)
        return None


def test_functions_are_many():
    assert len(functions()) > 250


@pytest.mark.world(2)
@pytest.mark.parametrize("dim", range(3))
def test_functions_of_shards(dim):
    distribution = parity.model_parallel((1, 2), {})
    wrong = []
    for name, function in functions().items():
        if reference(name) is None:
            continue
        expected, expected_gradient = reference(name)
        with distribution.scope():
            actual, gradient = run(function, dim)
        try:
            parity.assert_same(actual, expected)
            assert (gradient is None) == (expected_gradient is None)
            if gradient is not None:
                parity.assert_same(
                    number(gradient), number(expected_gradient), 1e-4
                )
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong


@pytest.mark.world(4)
@pytest.mark.parametrize("axes", [("model", "extra"), ("extra", "model")])
def test_views_and_pools_of_a_dim_that_two_axes_cut(axes):
    """Found by the catalogue: torch 2.13 cannot undo views in backward."""

    def make_model():
        return keras.Sequential(
            [
                keras.Input((3, 5)),
                keras.layers.Dense(4, name="cut"),
                keras.layers.MaxPooling1D(2, 1, padding="same"),
                keras.layers.Dense(4, name="cut_again"),
                keras.layers.Reshape((2, 6)),
                keras.layers.Dense(4, name="cut_too"),
                keras.layers.Flatten(),
                keras.layers.Dense(2),
            ]
        )

    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 5)).astype("float32")
    y = rng.standard_normal((5, 2)).astype("float32")
    layouts = {".*cut.*/kernel": (None, axes), ".*cut.*/bias": (axes,)}
    names = ("batch", "model", "extra")
    distribution = parity.model_parallel((1, 2, 2), layouts, names)
    parity.assert_parity(make_model, x, y, distribution)


class OfVariables(keras.layers.Layer):
    """torch's functions, handed variables themselves."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 6), name="kernel")
        self.gain = self.add_weight(shape=(6,), name="gain")

    def call(self, x):
        y = torch.nn.functional.silu(torch.matmul(x, self.kernel))
        steps = torch.cumsum(self.gain, -1) + torch.amax(self.kernel, 0)
        return y * self.gain + steps


@pytest.mark.world(2)
@pytest.mark.parametrize("axes", [("model", None), (None, "model")])
def test_variables_that_are_arguments(axes):
    def make_model():
        stack = [keras.layers.Dense(4, name="dense"), OfVariables()]
        return keras.Sequential([keras.Input((5,)), *stack])

    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 5)).astype("float32")
    y = rng.standard_normal((5, 6)).astype("float32")
    layouts = {
        ".*of_variables.*/kernel": axes,
        ".*/gain": ("model",),
        ".*dense/bias": ("model",),
    }
    distribution = parity.model_parallel((1, 2), layouts)
    parity.assert_parity(make_model, x, y, distribution)


# A mean of a cut dim and a sum of it are addends of unlike kinds to torch.
MIXED = {
    "from a mean": lambda x: x - ops.mean(x, -1, keepdims=True),
    "from a mean of all": lambda x: x * ops.mean(x) - ops.mean(x, 0),
    "sum and mean": lambda x: (
        ops.sum(x, -1, keepdims=True) * x - ops.mean(x, -1, keepdims=True)
    ),
    "max and mean": lambda x: (
        ops.max(x, -1, keepdims=True) * ops.mean(x, -1, keepdims=True) - x
    ),
    "joined": lambda x: ops.stack(
        [ops.sum(x, -1), ops.mean(x, -1), ops.prod(x, -1)], -1
    ),
    "in place": lambda x: (
        torch.sum(x, -1, keepdim=True).add_(torch.mean(x, -1, keepdim=True)) * x
    ),
    "where": lambda x: ops.where(
        ops.sum(x, -1, keepdims=True) > ops.mean(x, -1, keepdims=True),
        x,
        ops.mean(x, -1, keepdims=True),
    ),
    "deviation": lambda x: (
        (x - ops.mean(x, -1, keepdims=True))
        / ops.sqrt(ops.var(x, -1, keepdims=True) + 0.1)
    ),
}


@pytest.mark.world(2)
@pytest.mark.parametrize("axes", [("model", None), (None, "model")])
def test_sums_and_means_of_shards_mix(axes):
    def make_model(function):
        inputs = keras.Input((5,))
        x = keras.layers.Dense(4, name="cut")(inputs)
        x = Called(function)(x)[0]
        return keras.Model(inputs, keras.layers.Flatten()(x))

    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5)).astype("float32")
    distribution = parity.model_parallel((1, 2), {".*cut/kernel": axes})
    for function in MIXED.values():
        make = functools.partial(make_model, function)
        y = np.ones(keras.ops.shape(make()(x)), "float32")
        parity.assert_parity(make, x, y, distribution)
