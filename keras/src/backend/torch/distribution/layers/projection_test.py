import threading
import types
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src import layers
from keras.src.backend.torch.distribution.layers import projection
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.ops import contraction
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.distribution.distribution_lib import DeviceMesh
from keras.src.distribution.distribution_lib import LayoutMap
from keras.src.distribution.distribution_lib import ModelParallel

WORLD = 2


@pytest.mark.parametrize(
    "shape, letters, output_shape",
    [
        ((3, 4), ("ax", "xy", "ay"), (3, 5)),
        ((2, 3, 4), ("abx", "xy", "aby"), (2, 3, 5)),
        ((6, 2, 3, 4), ("abcx", "xy", "abcy"), (6, 2, 3, 5)),
    ],
)
def test_contraction_of_dense(shape, letters, output_shape):
    layer = layers.Dense(5)
    layer.build(shape)
    contraction = projection.letters_of(layer, len(shape))
    assert (
        contraction.inputs,
        contraction.kernel,
        contraction.output,
    ) == letters
    assert (
        contraction.output_shape(shape, layer.kernel.shape, (0,) * len(shape))
        == output_shape
    )


@pytest.mark.parametrize(
    "equation, output_shape, input_shape",
    [
        ("ab,bc->ac", 5, (3, 4)),
        ("abc,cd->abd", (None, 5), (2, 3, 4)),
        ("abc , cde -> abde", (None, 5, 6), (2, 3, 4)),
        ("abde,dec->abc", (None, 5), (2, 3, 4, 6)),
        ("abc,bd->adc", (5, 4), (2, 3, 4)),
        ("...x,xy->...y", 5, (2, 3, 4)),
        ("...x,xy->...y", 5, (3, 4)),
        ("...dh,dhk->...k", 5, (2, 3, 4, 6)),
        # Letters of the user's that a batch dim could have been called.
        ("...AB,BC->...AC", (None, 5), (2, 3, 4)),
        ("...ab,bA->...aA", (None, 5), (7, 2, 3, 4)),
    ],
)
def test_contraction_of_einsum_dense(equation, output_shape, input_shape):
    layer = layers.EinsumDense(equation.replace(" ", ""), output_shape)
    layer.build(input_shape)
    layer.equation = equation
    contraction = projection.letters_of(layer, len(input_shape))
    assert len(set(contraction.inputs)) == len(input_shape)
    x, kernel = torch.randn(input_shape), torch.randn(*layer.kernel.shape)
    expected = torch.einsum(equation, x, kernel)
    actual = torch.einsum(
        f"{contraction.inputs},{contraction.kernel}->{contraction.output}",
        x,
        kernel,
    )
    torch.testing.assert_close(actual, expected)
    assert (
        contraction.output_shape(
            input_shape, layer.kernel.shape, (0,) * len(contraction.output)
        )
        == expected.shape
    )


def test_contraction_is_kept_for_each_rank():
    layer = layers.Dense(5)
    layer.build((3, 4))
    first = projection.letters_of(layer, 2)
    assert projection.letters_of(layer, 3).inputs != first.inputs
    assert projection.letters_of(layer, 2) is first


def rng():
    return np.random.default_rng(0)


def build(make_layer, input_shape, layouts):
    """A layer with sharded weights, and its context; values of `rng`."""
    mesh = DeviceMesh(
        (1, WORLD), ["batch", "model"], [f"cpu:{i}" for i in range(WORLD)]
    )
    layout_map = LayoutMap(mesh)
    for name, axes in layouts.items():
        layout_map[f".*{name}"] = axes
    distribution = ModelParallel(layout_map=layout_map)
    with distribution.scope():
        layer = make_layer()
        layer.build(input_shape)
        context = context_lib.current()
    generator = rng()
    for v in layer.weights:
        v.assign(generator.normal(size=v.shape).astype("float32"))
    return layer, context


def weights_of_one_device(make_layer, input_shape):
    layer = make_layer()
    layer.build(input_shape)
    generator = rng()
    for v in layer.weights:
        v.assign(generator.normal(size=v.shape).astype("float32"))
    return layer


def play_processes(fake_world, make_layer, x, layouts, cut=None):
    """What each process computes, and the gradients of its input.

    Sums over processes do nothing, so each result is one addend.
    """
    outputs, grads = [], []
    for rank in range(WORLD):
        fake_world(WORLD, rank)
        layer, context = build(make_layer, x.shape, layouts)
        leaf = x.clone().requires_grad_()
        inputs = leaf
        if cut is not None:
            group = context.model_mesh.get_group(0)
            inputs = sharded.Enter.apply(
                collectives.Slice.apply(leaf, cut, group),
                context.model_mesh,
                (Shard(cut),),
                tuple(x.shape),
            )
        y = projection.project(layer, inputs, context)
        outputs.append(y)
        local = y if not isinstance(y, DTensor) else sharded.Leave.apply(y)
        if cut is None:
            local.sum().backward()
            grads.append(leaf.grad)
    return outputs, grads


def dense(**kwargs):
    return lambda: layers.Dense(4, name="layer", **kwargs)


def einsum(equation, output_shape, **kwargs):
    return lambda: layers.EinsumDense(
        equation, output_shape, name="layer", **kwargs
    )


COLUMN = [
    (dense(activation="gelu"), (3, 6), (None, "model"), 1),
    (dense(use_bias=False), (2, 3, 6), (None, "model"), 2),
    (
        einsum("abc,cde->abde", (None, 4, 5), bias_axes="de"),
        (2, 3, 6),
        (None, "model", None),
        2,
    ),
    (
        einsum("...c,cd->...d", 4, bias_axes="d"),
        (2, 3, 6),
        (None, "model"),
        2,
    ),
]


@pytest.mark.parametrize("make_layer, shape, axes, dim", COLUMN)
@pytest.mark.parametrize("is_bias_sharded", [True, False])
def test_column(fake_world, make_layer, shape, axes, dim, is_bias_sharded):
    x = torch.tensor(rng().normal(size=shape).astype("float32"))
    layouts = {"kernel": axes}
    if is_bias_sharded:
        layouts["bias"] = axes[1:]
    outputs, grads = play_processes(fake_world, make_layer, x, layouts)
    layer = weights_of_one_device(make_layer, shape)
    leaf = x.clone().requires_grad_()
    expected = layer(leaf)
    expected.sum().backward()
    for y in outputs:
        assert y.placements == (Shard(dim),)
        assert y.shape == expected.shape
    locals_ = [sharded.local_of(y) for y in outputs]
    torch.testing.assert_close(torch.cat(locals_, dim), expected)
    torch.testing.assert_close(sum(grads), leaf.grad)


ROW = [
    (dense(use_bias=False), (3, 6), ("model", None), 1),
    (dense(use_bias=False), (2, 3, 5), ("model", None), 2),
    (
        einsum("abde,dec->abc", (None, 4)),
        (2, 3, 4, 6),
        ("model", None, None),
        2,
    ),
]


@pytest.mark.parametrize("make_layer, shape, axes, dim", ROW)
@pytest.mark.parametrize("is_input_sharded", [True, False])
def test_row(fake_world, make_layer, shape, axes, dim, is_input_sharded):
    x = torch.tensor(rng().normal(size=shape).astype("float32"))
    outputs, _ = play_processes(
        fake_world,
        make_layer,
        x,
        {"kernel": axes},
        cut=dim if is_input_sharded else None,
    )
    for y in outputs:
        assert not isinstance(y, DTensor)
    expected = weights_of_one_device(make_layer, shape)(x)
    torch.testing.assert_close(sum(outputs), expected)


def test_row_adds_the_bias_after_the_sum(fake_world):
    x = torch.tensor(rng().normal(size=(3, 6)).astype("float32"))
    outputs, _ = play_processes(
        fake_world, dense(), x, {"kernel": ("model", None)}
    )
    layer = weights_of_one_device(dense(), (3, 6))
    # Each process adds it to what would be the sum.
    expected = layer(x) + (WORLD - 1) * layer.bias.value
    torch.testing.assert_close(sum(outputs), expected)


def test_kernel_dim_of_both_input_and_output(fake_world):
    # A batched projection: nothing is summed, nothing is gathered.
    make_layer = einsum("abc,bcd->abd", (4, 5))
    x = torch.tensor(rng().normal(size=(2, 4, 3)).astype("float32"))
    outputs, _ = play_processes(
        fake_world, make_layer, x, {"kernel": ("model", None, None)}, cut=1
    )
    expected = weights_of_one_device(make_layer, x.shape)(x)
    assert all(y.placements == (Shard(1),) for y in outputs)
    locals_ = [sharded.local_of(y) for y in outputs]
    torch.testing.assert_close(torch.cat(locals_, 1), expected)


def test_rows_that_are_sharded_stay_where_they_are(fake_world):
    # A whole kernel, on an activation cut along its sequence.
    make_layer = dense(activation="relu")
    x = torch.tensor(rng().normal(size=(2, 4, 3)).astype("float32"))
    outputs, _ = play_processes(
        fake_world, make_layer, x, {"bias": ("model",)}, cut=1
    )
    assert all(y.placements == (Shard(1),) for y in outputs)


def test_consumers_of_one_input_share_its_gradient(fake_world, monkeypatch):
    fake_world(WORLD)
    layer, context = build(dense(), (3, 6), {"kernel": (None, "model")})
    summed = []
    monkeypatch.setattr(
        collectives.dist, "all_reduce", lambda x, group: summed.append(x)
    )
    x = torch.ones(3, 6, requires_grad=True)
    outputs = [projection.project(layer, x, context) for _ in range(3)]
    sum(sharded.Leave.apply(y).sum() for y in outputs).backward()
    assert [tuple(g.shape) for g in summed] == [(3, 6)]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.enable_lora(2),
        lambda layer: setattr(layer, "_remat_mode", "full"),
    ],
)
def test_layers_that_read_their_kernel_otherwise(fake_world, change):
    fake_world(WORLD)
    layer, _ = build(dense(), (3, 6), {"kernel": (None, "model")})
    style = projection.ProjectionStyle()
    assert style.applies(layer, [torch.ones(3, 6)])
    assert not style.applies(layer, [torch.ones(3, 6, dtype=torch.int32)])
    assert not style.applies(layer, [torch.ones(3, 6), None])
    change(layer)
    assert not style.applies(layer, [torch.ones(3, 6)])


class Memory:
    pass


@pytest.mark.parametrize("rows", [6, 7])
@pytest.mark.parametrize("double", [False, True])
def test_gathered_input_is_not_kept_for_backward(
    on_threads, monkeypatch, rows, double
):
    """Of a sequence that is cut, layers see all, and autograd saves a part."""
    torch.manual_seed(0)
    x, kernels = torch.randn(3, rows, 4), torch.randn(2, 4, 5)
    layer = types.SimpleNamespace(equation="abc,cd->abd")
    gathers = []
    gather_each = collectives.gather_each

    def count(x, group):
        gathers.append(threading.get_ident())
        return gather_each(x, group)

    monkeypatch.setattr(collectives, "gather_each", count)

    def run(is_gathered):
        group = dist.group.WORLD
        ours = collectives.shard_of(x, 1, group).clone().requires_grad_()
        mine = kernels.clone().requires_grad_()
        inputs = torch.empty(x.shape)
        column, _ = contraction._column_input(
            ours, 1, inputs, (("column", 0),), group
        )
        # What lives as long as the memory of what was gathered.
        memory = column.untyped_storage().memory = Memory()
        is_alive = weakref.ref(memory)
        cuts = [
            contraction.Operands(
                column, kernel, [Replicate()], [], None, is_gathered
            )
            for kernel in mine
        ]
        results = [projection._contract(layer, cut, None) for cut in cuts]
        del column, cuts, memory
        assert (is_alive() is None) == is_gathered
        loss = (results[0] * results[1].tanh()).square().sum()
        before = gathers.count(threading.get_ident())
        grads = torch.autograd.grad(loss, (ours, mine), create_graph=double)
        counted = gathers.count(threading.get_ident()) - before
        if double:
            penalty = sum(grad.square().sum() for grad in grads)
            grads = torch.autograd.grad(penalty, (ours, mine))
        return grads, counted

    for kept in on_threads(WORLD, lambda rank: (run(False), run(True))):
        (expected, kept_gathers), (grads, gathers_again) = kept
        torch.testing.assert_close(grads, expected)
        # Once for both.
        assert kept_gathers == 0 and gathers_again == 1
