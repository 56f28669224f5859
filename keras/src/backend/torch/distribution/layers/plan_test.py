import types

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel

from keras.src import layers
from keras.src import models
from keras.src.backend.torch.distribution.layers import plan
from keras.src.backend.torch.distribution.layers import styles
from keras.src.backend.torch.distribution.layers.lookup import LookupStyle
from keras.src.backend.torch.distribution.layers.projection import (
    ProjectionStyle,
)
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.distribution.distribution_lib import DeviceMesh
from keras.src.distribution.distribution_lib import LayoutMap
from keras.src.distribution.distribution_lib import ModelParallel
from keras.src.distribution.distribution_lib import TensorLayout

WORLD = 2


class OwnCall(layers.Dense):
    def call(self, inputs):
        return super().call(inputs) + 1


class OwnBuild(layers.Dense):
    def build(self, input_shape):
        super().build(input_shape)


@pytest.fixture
def mesh(fake_world):
    fake_world(WORLD)
    return DeviceMesh((1, WORLD), ["batch", "model"], ["cpu:0", "cpu:1"])


def layout_map(mesh, layouts):
    result = LayoutMap(mesh)
    for key, axes in layouts.items():
        result[key] = axes
    return result


def test_plan_of_a_keras_model(mesh):
    model = models.Sequential(
        [
            layers.Input((3,), dtype="int32"),
            layers.Embedding(8, 4, name="embed"),
            layers.EinsumDense("abc,cd->abd", (None, 6), name="einsum"),
            layers.Dense(4, name="dense"),
            OwnCall(4, name="own_call"),
            OwnBuild(4, name="own_build"),
            layers.LayerNormalization(name="norm"),
            layers.Dense(4, name="whole"),
        ],
        name="model",
    )
    result = plan.create(
        model,
        layout_map(
            mesh,
            {
                ".*embed/embeddings": ("model", None),
                ".*(einsum|dense|own_call|own_build)/kernel": (None, "model"),
                ".*dense/bias": ("model",),
                ".*norm/gamma": ("model",),
                ".*whole/.*": (None,),
            },
        ),
    )
    assert {name: type(style) for name, style in result.items()} == {
        "embed": LookupStyle,
        "einsum": ProjectionStyle,
        "dense": ProjectionStyle,
        "own_call": styles.ShardedStyle,
        "own_build": ProjectionStyle,
        "norm": styles.ShardedStyle,
    }
    assert {
        name: layout.axes for name, layout in result["dense"].layouts.items()
    } == {"kernel": (None, "model"), "bias": ("model",)}
    assert repr(result["norm"]) == "ShardedStyle({'gamma': ('model',)})"


def test_plan_names_nested_layers_by_their_parents(mesh):
    inner = models.Sequential(
        [layers.Input((4,)), layers.Dense(4, name="dense")], name="inner"
    )
    model = models.Sequential([layers.Input((4,)), inner], name="outer")
    result = plan.create(
        model, layout_map(mesh, {".*dense/kernel": (None, "model")})
    )
    assert list(result) == ["inner.dense"]
    names = dict(plan.named_keras_layers(model))
    assert names[""] is model
    assert names["inner.dense"] is inner.layers[0]


def test_plan_of_a_torch_module(mesh):
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)
    )
    layouts = {"0/weight": ("model", None), "0/bias": ("model",)}
    for map_ in (
        layout_map(mesh, layouts),
        {key: TensorLayout(axes, mesh) for key, axes in layouts.items()},
    ):
        result = plan.create(module, map_)
        assert list(result) == ["0"]
        assert type(result["0"]) is plan.TorchModuleStyle
        assert set(result["0"].layouts) == {"weight", "bias"}
    # A module of one parameter, whose own name is empty.
    result = plan.create(
        module[2], layout_map(mesh, {"weight": (None, "model")})
    )
    assert list(result) == [""]


def test_plan_of_nothing(mesh):
    assert plan.create(torch.nn.Linear(2, 2), layout_map(mesh, {})) == {}
    dense = layers.Dense(2)
    dense.build((2, 2))
    assert plan.create(dense, layout_map(mesh, {})) == {}


def test_parallelize_a_torch_module(mesh):
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    weight = module[0].weight.detach().clone()
    module[0].bias.requires_grad_(False)
    styles_ = plan.create(
        module, layout_map(mesh, {"0/weight": ("model", None)})
    )
    assert plan.parallelize(module, mesh.backend_mesh, styles_) is module
    stored = module[0].weight
    assert isinstance(stored, DTensor)
    assert stored.placements == (Replicate(), Shard(0))
    assert torch.equal(sharded.local_of(stored), weight[:3])
    assert stored.requires_grad
    # Beside a sharded one, the others are DTensors too.
    assert module[0].bias.placements == (Replicate(), Replicate())
    assert not module[0].bias.requires_grad
    assert not isinstance(module[1].weight, DTensor)
    # What leaves is plain, and whole.
    y = module[0](torch.ones(3, 4))
    assert type(y) is torch.Tensor
    assert y.shape == (3, 6)


def test_parallelize_with_torchs_own_style(mesh):
    module = torch.nn.Sequential(torch.nn.Linear(4, 6))
    model_mesh = mesh.backend_mesh["model"]
    plan.parallelize(module, model_mesh, {"0": ColwiseParallel()})
    assert module[0].weight.placements == (Shard(0),)
    single = torch.nn.Linear(4, 6)
    plan.parallelize(single, model_mesh, ColwiseParallel())
    assert single.weight.placements == (Shard(0),)


def test_parallelize_a_module_that_there_is_not(mesh):
    module = torch.nn.Sequential(torch.nn.Linear(4, 6))
    with pytest.raises(ValueError, match=r"not: 'head'.*\['', '0'\]"):
        plan.parallelize(
            module, mesh.backend_mesh, {"head": styles.ShardedStyle()}
        )


def built(mesh, layouts, layer):
    distribution = ModelParallel(layout_map=layout_map(mesh, layouts))
    with distribution.scope():
        layer.build((2, 4))
        return layer, context_lib.current()


def test_style_of(mesh):
    layer, context = built(
        mesh, {"dense/kernel": (None, "model")}, layers.Dense(4, name="dense")
    )
    style = plan.style_of(layer, context)
    assert type(style) is ProjectionStyle
    assert plan.style_of(layer, context) is style


def test_style_of_layers_without_sharded_variables(mesh):
    layer, context = built(
        mesh, {"x/kernel": (None, "model")}, layers.Dense(4, name="dense")
    )
    assert plan.style_of(layer, context) is None
    assert plan.style_of(layers.Activation("relu"), context) is None


def test_style_of_is_found_anew_when_a_variable_comes(mesh):
    layer, context = built(
        mesh, {"dense/late": (None, "model")}, layers.Dense(4, name="dense")
    )
    assert plan.style_of(layer, context) is None
    with context.distribution.scope():
        layer._tracker.unlock()
        layer.late = layer.add_weight(shape=(2, 4), name="late")
    assert plan.style_of(layer, context) is not None


def test_style_of_is_kept_for_one_context(mesh):
    layer, context = built(
        mesh, {"dense/kernel": (None, "model")}, layers.Dense(4, name="dense")
    )
    assert plan.style_of(layer, context) is not None
    other = types.SimpleNamespace(mesh=None)
    assert plan.style_of(layer, other) is None
