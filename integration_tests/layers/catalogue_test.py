"""Every layer of Keras, under every kind of layout, as on one device.

Outputs, the gradient of the input, the gradient of each weight, and the
weights and outputs after an SGD step.
"""

import contextlib
import functools
import re
import sys

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import keras
from integration_tests.harness import parity
from integration_tests.layers import catalogue
from keras.src import tree
from keras.src.backend.torch.distribution.variables import storage

# By the number of processes: the sizes of the axes of each mesh, and the two
# of them that cut. Batches are split over `batch`.
MESHES = {
    2: [
        ({"batch": 1, "model": 2}, ("batch", "model")),
        ({"batch": 2, "model": 1}, ("model", "batch")),
    ],
    4: [
        ({"batch": 2, "model": 2}, ("batch", "model")),
        ({"batch": 1, "model": 4}, ("batch", "model")),
        ({"batch": 1, "model": 2, "extra": 2}, ("extra", "model")),
    ],
}


def last(shape, axis):
    return (None,) * (len(shape) - 1) + (axis,)


def first(shape, axis):
    return (axis,) + (None,) * (len(shape) - 1)


def largest(shape, *pair):
    """The largest dim over the first axis, the next over the second."""
    order = sorted(range(len(shape)), key=lambda i: -shape[i])
    axes = [None] * len(shape)
    for dim, axis in zip(order, pair):
        axes[dim] = axis
    return tuple(axes)


def one_dim(shape, *pair):
    """The first dim over two axes."""
    return (pair,) + (None,) * (len(shape) - 1)


def rules(one, two):
    """`{name: function of a shape}`: all ways that two axes are used.

    Both orders where one of them is the data axis, which is gathered for use;
    else one of each.
    """
    pairs = [(one, two), (two, one)]
    has_data = "batch" in (one, two)
    return {
        f"{rule.__name__} over {' and '.join(axes)}": functools.partial(
            call_rule, rule, axes
        )
        for rule, choices in {
            last: [(two,)],
            first: [(two,)],
            largest: pairs if has_data else pairs[:1],
            one_dim: pairs if has_data else pairs[1:],
        }.items()
        for axes in choices
    }


def call_rule(rule, axes, shape):
    return rule(shape, *axes)


CASES = catalogue.cases()


def run(case, distribution=None, again=True):
    """Outputs, gradients and a step of a case.

    Collective under a distribution: every process calls it.

    Args:
        again: whether the layer is called once more after the step, with
            what the step has changed.

    Returns:
        Arrays of this process's rows, what it stores of gradients and weights
        after the step, and which rows it has.
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
        inputs = [keras.ops.convert_to_tensor(x[ours]) for x in case.inputs()]
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
            v.path: Stored(v.value.grad)
            for v in variables
            if v.value.grad is not None
        }
        pairs = [(v.value.grad, v) for v in variables if v.path in gradients]
        if pairs:
            optimizer = keras.optimizers.SGD(0.1)
            optimizer.apply(*map(list, zip(*pairs)))
        local = {
            "outputs": [x.detach().numpy() for x in y],
            "inputs": [
                x.grad.numpy() / shards
                for x in inputs
                if getattr(x, "grad", None) is not None
            ],
        }
        kept = {
            "gradients": gradients,
            "weights": {v.path: Stored(v.value) for v in program.variables},
        }
        if again:
            with torch.no_grad():
                after = program(inputs)
            local["outputs after"] = [x.numpy() for x in after]
    return local, kept, ours


class Program(keras.layers.Layer):
    """The layers of a case as one, so that they hand each other shards."""

    def __init__(self, case, rows):
        super().__init__(name="program")
        self.case, self.rows = case, rows
        self.fronts = [
            case.make_front(x, f"front_{i}")
            for i, x in enumerate(case.inputs())
        ]
        self.layer = case.make()
        self.built = True

    def call(self, inputs):
        handed = [
            front(x) if front else x for front, x in zip(self.fronts, inputs)
        ]
        return tree.flatten(self.case.call(self.layer, self.rows, *handed))


@functools.cache
def reference(name):
    def alone():
        local, kept, ours = run(CASES[name])
        return local, tree.map_structure(lambda x: x.local, kept), ours

    return parity.on_one_device(alone)


class Stored:
    """A copy of what this process stores of a value, and how that was cut."""

    def __init__(self, value):
        self.value = value
        with torch.no_grad():
            local = value.to_local() if isinstance(value, DTensor) else value
            self.local = local.clone().numpy()

    def part_of(self, whole):
        """The part of a whole array that this process has to store."""
        value = self.value
        assert tuple(value.shape) == whole.shape
        if not isinstance(value, DTensor):
            return whole
        whole = torch.from_numpy(np.ascontiguousarray(whole))
        return (
            storage.shard(whole, value.device_mesh, value.placements)
            .to_local()
            .numpy()
        )


def assert_stored(actual, expected, tolerance):
    """Compares what this process stores with its parts of whole arrays."""
    parity.assert_same(
        tree.map_structure(lambda x: x.local, actual),
        tree.map_structure(Stored.part_of, actual, expected),
        tolerance,
        whole=expected,
    )


def variables_of(name):
    """`{path: shape}` of what layouts can shard."""
    _, whole, _ = reference(name)
    return {
        path: value.shape
        for path, value in whole["weights"].items()
        if value.dtype.kind == "f" and value.ndim
    }


def layouts_of(name, world_size):
    """The layouts that a case is tried under, with their names.

    All those that differ, of all meshes. Of a class's second case and of those
    that follow it every third one on four processes: that costs minutes.

    Yields:
        Tuples of a name, the sizes of the mesh axes,
        `{path: axes of the dims}`, and whether the layer is called again
        after a step: where it has changed, under one layout of each mesh.
    """
    variables = variables_of(name)
    has_own = not all(map(is_of_front, variables))
    number = int(name.partition("-")[2] or 1)
    every = 3 if world_size == 4 and number > 1 else 1
    for sizes, pair in MESHES[world_size]:
        if sizes["batch"] > 1 and not CASES[name].has_data_shards:
            continue
        found = {}
        for label, rule in rules(*pair).items():
            layouts = {
                path: without_ones(rule(shape), sizes)
                for path, shape in variables.items()
            }
            what_differs = frozenset(layouts.items())
            if not has_own:
                what_differs = frozenset(map(handed_on, layouts.values()))
            found.setdefault(what_differs, (f"{label} of {sizes}", layouts))
        # One at least: a mesh may have fewer than are passed over.
        start = number % min(every, len(found))
        chosen = [*found.values()][start::every]
        for i, (label, layouts) in enumerate(chosen):
            yield label, sizes, layouts, has_own and i == 0


def without_ones(axes, sizes):
    """A layout without axes of size 1, which cut nothing.

    What is equal without them is tried once. So on (1, 2), (2, 1) and (1, 4)
    one dim over two axes is that dim over one, and the largest two dims are
    one of them: of a kernel with two dims, the first or the last.
    """
    result = []
    for names in axes:
        names = (names,) if isinstance(names, str) else names or ()
        names = tuple(name for name in names if sizes[name] > 1)
        result.append(names[0] if len(names) == 1 else names or None)
    return tuple(result)


def handed_on(axes):
    """The axes that cut a front's result, by the layout of its kernel.

    All that a layer without variables sees: kernels that differ in how they
    are cut along other dims, or over the data axis, hand it the same.
    """
    names = (axes[-1],) if isinstance(axes[-1], str) else axes[-1] or ()
    return tuple(name for name in names if name != "batch")


def is_of_front(path):
    return path.startswith("program/front_")


def check(name, sizes, layouts, again):
    local, whole, _ = reference(name)
    layouts = {re.escape(path): axes for path, axes in layouts.items()}
    distribution = parity.model_parallel(
        tuple(sizes.values()), layouts, tuple(sizes)
    )
    actual_local, actual, ours = run(CASES[name], distribution, again)
    expected = {key: local[key] for key in actual_local}
    expected = tree.map_structure(lambda x: x[ours], expected)
    tolerance = CASES[name].tolerance
    parity.assert_same(actual_local, expected, tolerance)
    assert_stored(actual, whole, tolerance)


@pytest.mark.world(2, 4)
@pytest.mark.parametrize("name", CASES)
def test_layer(name, world_size):
    for label, *case in layouts_of(name, world_size):
        try:
            check(name, *case)
        except Exception as error:
            error.add_note(f"Under the layout '{label}'.")
            raise


def test_layouts_are_complete(monkeypatch):
    """What the rules of this file come to, counted by hand."""
    kernels = {"program/front_0/kernel": (4, 6), "program/own/kernel": (6, 8)}
    monkeypatch.setattr(
        sys.modules[__name__], "variables_of", lambda _: kernels
    )
    count = lambda size: [
        sum(each is sizes for _, each, *_ in layouts_of("Dense-1", size))
        for sizes, _ in MESHES[size]
    ]
    # First and last.
    assert count(2) == [2, 2]
    # And the largest two, and one dim: in both orders, of them the data axis.
    assert count(4) == [6, 2, 4]
    # The second largest dim of three is neither the first nor the last.
    kernels["program/own/kernel"] = (6, 8, 7)
    assert count(2) == [4, 4]
    assert count(4) == [6, 4, 4]
    assert [*layouts_of("Dense-2", 2)] == [*layouts_of("Dense-1", 2)]
    all_labels = [label for label, *_ in layouts_of("Dense-1", 4)]
    labels = [label for label, *_ in layouts_of("Dense-2", 4)]
    assert len(labels) == 4 and set(labels) < set(all_labels)
    kernels["program/own/kernel"] = (6, 8)
    meshes = [sizes for _, sizes, *_ in layouts_of("Dense-2", 4)]
    assert all(sizes in meshes for sizes, _ in MESHES[4])
    # Of a front the input is whole, or cut over an axis.
    del kernels["program/own/kernel"]
    assert count(2) == [2, 1]
    assert count(4) == [2, 2, 3]


def test_no_layer_is_forgotten():
    named = {*catalogue.CASES, *catalogue.ELSEWHERE}
    assert named == set(catalogue.classes())
