"""Every layer of Keras, under every kind of layout, as on one device.

Outputs, the gradient of the input, the gradient of each weight, and the
weights and outputs after an SGD step.
"""

import contextlib
import functools
import re

import numpy as np
import pytest
import torch

import keras
from integration_tests import catalogue
from integration_tests import parity
from keras.src import tree

AXES = ("batch", "model", "extra")


def last(shape):
    return (None,) * (len(shape) - 1) + ("model",)


def first(shape):
    return ("model",) + (None,) * (len(shape) - 1)


def largest(*names):
    """The largest dim over the first axis, the next over the second."""

    def rule(shape):
        order = sorted(range(len(shape)), key=lambda i: -shape[i])
        axes = [None] * len(shape)
        for dim, name in zip(order, names):
            axes[dim] = name
        return tuple(axes)

    return rule


def one_dim(*names):
    """The first dim over two axes."""
    return lambda shape: (names,) + (None,) * (len(shape) - 1)


# By the number of processes: the mesh, and the layouts of the variables.
LAYOUTS = {
    2: {
        "last": ((1, 2), last),
        "first": ((1, 2), first),
        "data": ((2, 1), largest("batch")),
        "one dim": ((2, 1), one_dim("model", "batch")),
    },
    4: {
        "last": ((1, 4), last),
        "both": ((2, 2), largest("model", "batch")),
        "one dim": ((2, 2), one_dim("model", "batch")),
        "one dim, data first": ((2, 2), one_dim("batch", "model")),
        "three": ((1, 2, 2), largest("model", "extra")),
        "one dim of three": ((1, 2, 2), one_dim("extra", "model")),
    },
}
# Where no variable is the layer's own, its input alone matters.
OF_INPUT = {2: ("last",), 4: ("last",)}

CASES = catalogue.cases()


def run(case, distribution=None):
    """Outputs, gradients and a step of a case, whole, on every process.

    Collective under a distribution: every process calls it.
    """
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    shards, index = 1, 0
    scope = contextlib.nullcontext()
    if distribution is not None:
        scope = distribution.scope()
        index = distribution.data_shard_id
        names = list(distribution.device_mesh.axis_names)
        shards = distribution.device_mesh.shape[names.index("batch")]
    rows = catalogue.ROWS // shards
    ours = slice(index * rows, (index + 1) * rows)
    with scope:
        program = Program(case, ours)
        inputs = [torch.from_numpy(x[ours]) for x in case.inputs()]
        for x in inputs:
            x.requires_grad_(x.is_floating_point())
        y = program(inputs)
        loss = sum(program.losses)
        for i, each in enumerate(y):
            if each.is_floating_point():
                weights = np.random.default_rng(i).standard_normal(
                    (catalogue.ROWS, *each.shape[1:])
                )
                weights = torch.from_numpy(weights[ours].astype("float32"))
                loss = loss + (each * weights).sum() / rows
        if not isinstance(loss, int) and loss.requires_grad:
            loss.backward()
        variables = program.trainable_variables
        gradients = {
            v.path: keras.ops.convert_to_numpy(v.value.grad)
            for v in variables
            if v.value.grad is not None
        }
        pairs = [(v.value.grad, v) for v in variables if v.path in gradients]
        if pairs:
            optimizer = keras.optimizers.SGD(0.1)
            optimizer.apply(*map(list, zip(*pairs)))
        with torch.no_grad():
            after = program(inputs)
        local = {
            "outputs": [x.detach().numpy() for x in y],
            "outputs after": [x.numpy() for x in after],
            "inputs": [
                x.grad.numpy() / shards
                for x in inputs
                if getattr(x, "grad", None) is not None
            ],
        }
        whole = {
            "gradients": gradients,
            "weights": {v.path: np.asarray(v) for v in program.variables},
        }
    return local, whole, ours


class Program(keras.layers.Layer):
    """The layers of a case as one, so that they hand each other shards."""

    def __init__(self, case, rows):
        super().__init__(name="program")
        self.case, self.rows = case, rows
        self.fronts = [case.make_front(x) for x in case.inputs()]
        self.layer = case.make()
        self.built = True

    def call(self, inputs):
        handed = [
            front(x) if front else x for front, x in zip(self.fronts, inputs)
        ]
        return tree.flatten(self.case.call(self.layer, self.rows, *handed))


@functools.cache
def reference(name):
    return run(CASES[name])


def check(name, shape, rule):
    local, whole, _ = reference(name)
    layouts = {
        re.escape(path): rule(value.shape)
        for path, value in whole["weights"].items()
        if value.dtype.kind == "f" and value.ndim
    }
    axes = AXES[: len(shape)]
    distribution = parity.model_parallel(shape, layouts, axes)
    actual_local, actual, ours = run(CASES[name], distribution)
    expected = tree.map_structure(lambda x: x[ours], local)
    tolerance = CASES[name].tolerance
    parity.assert_same(actual_local, expected, tolerance)
    parity.assert_same(actual, whole, tolerance)


def layouts_of(name, world_size):
    """The layouts that a case is tried under."""
    layouts = LAYOUTS[world_size]
    _, whole, _ = reference(name)
    if CASES[name].random:
        layouts = {n: v for n, v in layouts.items() if v[0][0] == 1}
    if not any(not is_of_front(path) for path in whole["weights"]):
        layouts = {n: layouts[n] for n in OF_INPUT[world_size]}
    return layouts


def is_of_front(path):
    return re.match(r"program/(dense|einsum_dense)(_\d+)?/", path) is not None


def check_all(name, world_size):
    for label, (shape, rule) in layouts_of(name, world_size).items():
        try:
            check(name, shape, rule)
        except Exception as error:
            error.add_note(f"Under the layout '{label}' of the mesh {shape}.")
            raise


@pytest.mark.world(2)
@pytest.mark.parametrize("name", CASES)
def test_layer(name):
    check_all(name, 2)


@pytest.mark.world(4)
@pytest.mark.parametrize(
    "name", [name for name in CASES if not CASES[name].is_image]
)
def test_layer_on_two_axes(name):
    check_all(name, 4)


def test_no_layer_is_forgotten():
    named = {*catalogue.CASES, *catalogue.ELSEWHERE}
    assert named == set(catalogue.classes())
