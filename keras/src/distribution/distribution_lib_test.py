"""Tests of the distribution API on the torch backend, in one process.

Of several processes, this one plays one in torch's fake process group.
"""

import warnings

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

import keras
from keras.src import backend
from keras.src import layers
from keras.src import models
from keras.src.backend.torch import distribution_lib as backend_dlib
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.layers.projection import (
    ProjectionStyle,
)
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.distribution import distribution_lib
from keras.src.distribution.distribution_lib import DataParallel
from keras.src.distribution.distribution_lib import DeviceMesh
from keras.src.distribution.distribution_lib import LayoutMap
from keras.src.distribution.distribution_lib import ModelParallel
from keras.src.distribution.distribution_lib import TensorLayout
from keras_torch_distribution.src.distribution import (
    distribution_lib as overlay,
)

DEVICES = [f"cpu:{i}" for i in range(4)]


def mesh_2d(shape=(2, 2), names=("batch", "model")):
    return DeviceMesh(shape, list(names), DEVICES)


def model_parallel(layouts=(), mesh=None, **kwargs):
    layout_map = LayoutMap(mesh_2d() if mesh is None else mesh)
    for key, axes in dict(layouts).items():
        layout_map[key] = axes
    return ModelParallel(layout_map=layout_map, **kwargs)


def is_implicit_replication_allowed():
    return DTensor._op_dispatcher._allow_implicit_replication


def test_public_api_is_the_overlays():
    assert keras.distribution.DataParallel is overlay.DataParallel
    assert keras.distribution.ModelParallel is overlay.ModelParallel
    assert keras.distribution.set_distribution is overlay.set_distribution
    assert distribution_lib.distribution_lib is backend_dlib
    assert issubclass(DataParallel, distribution_lib.Distribution)


def test_device_mesh():
    mesh = DeviceMesh((2, 2), ["batch", "model"], DEVICES)
    assert mesh.shape == (2, 2)
    assert mesh.axis_names == ["batch", "model"]
    assert mesh.devices.tolist() == [DEVICES[:2], DEVICES[2:]]
    for arguments, message in (
        (((), []), "cannot be empty"),
        (((2, 2), ["batch"]), "same size"),
        (((2, 3), ["batch", "model"], DEVICES), "number of devices"),
    ):
        with pytest.raises(ValueError, match=message):
            DeviceMesh(*arguments)


def test_device_mesh_of_all_processes(fake_world):
    fake_world(4)
    mesh = DeviceMesh((4,), ["batch"])
    assert len(mesh.devices) == 4
    assert mesh.backend_mesh.mesh.tolist() == [0, 1, 2, 3]
    assert mesh.backend_mesh is mesh.backend_mesh


def test_tensor_layout():
    layout = TensorLayout([None, "model"])
    assert layout.axes == (None, "model")
    assert layout.device_mesh is None
    mesh = mesh_2d()
    layout.device_mesh = mesh
    assert layout.device_mesh is mesh
    with pytest.raises(ValueError, match="Cannot override device mesh"):
        layout.device_mesh = mesh
    with pytest.raises(ValueError, match="Invalid axis names.*other"):
        TensorLayout(("other",), mesh)


def test_layout_map():
    mesh = mesh_2d()
    layout_map = LayoutMap(mesh)
    layout_map[".*kernel"] = (None, "model")
    layout_map["dense/bias"] = TensorLayout(("model",))
    assert layout_map["a/kernel"].axes == (None, "model")
    assert layout_map["a/kernel"].device_mesh is mesh
    assert layout_map["dense/bias"].device_mesh is mesh
    # A key matches a whole path.
    assert layout_map["a/kernel/b"] is None
    assert layout_map["other/dense/bias"] is None
    assert list(layout_map) == [".*kernel", "dense/bias"]
    with pytest.raises(ValueError, match="already exist"):
        layout_map[".*kernel"] = ("model",)
    with pytest.raises(ValueError, match="should be a TensorLayout"):
        layout_map["x"] = ["model"]
    layout_map["a/.*"] = ("model",)
    with pytest.raises(ValueError, match="matches multiple"):
        layout_map["a/kernel"]
    del layout_map["a/.*"]
    assert layout_map["a/kernel"].axes == (None, "model")


def test_axis_names_of_a_mesh_differ():
    with pytest.raises(ValueError, match=r"axis_names=\['a', 'a'\]"):
        DeviceMesh((2, 2), ["a", "a"], DEVICES)


def test_keys_of_a_layout_map():
    layout_map = LayoutMap(mesh_2d())
    with pytest.raises(ValueError, match=r"key='\*kernel'.*'model'"):
        layout_map["*kernel"] = (None, "model")
    with pytest.raises(TypeError, match="key=3 of type int"):
        layout_map[3] = (None, "model")
    assert len(layout_map) == 0


def test_which_key_a_path_matches():
    layout_map = LayoutMap(mesh_2d())
    layout = TensorLayout((None, "model"))
    layout_map[".*a/kernel"] = layout
    layout_map[".*b/kernel"] = layout
    layout_map["a+"] = ("model",)
    assert layout_map.key_of("x/b/kernel") == ".*b/kernel"
    assert layout_map.key_of("c") is None
    assert layout_map.key_of("a+") == "a+"
    assert layout_map.use("c") is None
    assert layout_map.without_use(outputs=False) == [".*a/kernel"]
    # Each is told once.
    assert layout_map.without_use(outputs=False) == []
    layout_map["c"] = ("batch",)
    assert layout_map.use("c").axes == ("batch",)
    del layout_map["c"]
    assert layout_map.use("c") is None


def test_data_parallel(fake_world):
    fake_world(4, rank=2)
    mesh = DeviceMesh((4,), ["rows"], DEVICES)
    for distribution, name in (
        (DataParallel(device_mesh=mesh), "rows"),
        (DataParallel(devices=DEVICES), "batch"),
        (DataParallel(), "batch"),
    ):
        assert distribution.batch_dim_name == name
        assert distribution.device_mesh.devices.tolist() == DEVICES
        assert distribution.num_processes == 4
        assert distribution.num_model_replicas == 4
        assert distribution.data_shard_id == 2
        assert distribution.auto_shard_dataset
        layout = distribution.get_data_layout((8, 3))
        assert layout.axes == (name, None)
        variable = backend.Variable(np.ones((2, 2)))
        assert distribution.get_variable_layout(variable).axes == (None, None)
        assert distribution.get_tensor_layout("dense/output") is None
    with pytest.raises(ValueError, match="instance of `DeviceMesh`"):
        DataParallel(device_mesh=DEVICES)


def test_data_parallel_on_a_mesh_of_two_axes(fake_world, monkeypatch):
    fake_world(4, rank=3)
    # Keras 3.15.1 fails while it warns of such a mesh.
    monkeypatch.setattr(warnings, "warn", lambda *args: None)
    distribution = DataParallel(device_mesh=mesh_2d())
    # The second axis replicates.
    assert distribution.num_model_replicas == 2
    assert distribution.data_shard_id == 1


def test_model_parallel(fake_world):
    fake_world(4)
    distribution = model_parallel(
        {".*kernel": (None, "model"), "dense/output": ("batch", "model")},
        auto_shard_dataset=False,
    )
    assert distribution.batch_dim_name == "batch"
    assert distribution.num_model_replicas == 2
    assert not distribution.auto_shard_dataset
    assert distribution.get_data_layout((8, 3)).axes == ("batch", None)
    kernel = backend.Variable(np.ones((2, 2)), name="kernel")
    assert distribution.get_variable_layout(kernel).axes == (None, "model")
    bias = backend.Variable(np.ones(2), name="bias")
    assert distribution.get_variable_layout(bias).axes == (None,)
    own = backend.Variable(
        np.ones((2, 2)), name="kernel", layout=TensorLayout(("model", None))
    )
    assert distribution.get_variable_layout(own).axes == ("model", None)
    assert distribution.get_tensor_layout("dense/output").axes == (
        "batch",
        "model",
    )
    assert distribution.get_tensor_layout("other/output") is None


@pytest.mark.parametrize("world_size", [1, 4])
def test_model_parallel_with_wrong_arguments(fake_world, world_size):
    fake_world(world_size)
    with pytest.raises(ValueError, match="specify a layout_map"):
        ModelParallel()
    with pytest.raises(ValueError, match="must be a `LayoutMap`"):
        ModelParallel(layout_map={}, batch_dim_name="rows")
    with pytest.raises(
        ValueError,
        match=r"batch_dim_name='rows', mesh axes=\['batch', 'model'\]",
    ):
        model_parallel(batch_dim_name="rows")
    with pytest.raises(ValueError, match=r"another mesh.*\(4, 1\).*\(2, 2\)"):
        model_parallel(device_mesh=mesh_2d((4, 1)))
    mesh = mesh_2d()
    assert model_parallel(mesh=mesh, device_mesh=mesh).device_mesh is mesh


@pytest.mark.parametrize("rank", range(4))
def test_data_shard_of_any_axis(fake_world, rank):
    fake_world(4, rank)
    first = model_parallel(batch_dim_name="batch")
    assert first.data_shard_id == rank // 2
    last = model_parallel(batch_dim_name="model")
    assert last.data_shard_id == rank % 2


@pytest.mark.parametrize("rank", range(4))
def test_data_shard_of_several_axes(fake_world, rank):
    fake_world(4, rank)
    mesh = DeviceMesh((2, 1, 2), ["replicate", "model", "shard"], DEVICES)
    batch = ["replicate", "shard"]
    distribution = model_parallel(mesh=mesh, batch_dim_name=batch)
    assert distribution.batch_dim_name == ("replicate", "shard")
    assert distribution.num_model_replicas == 4
    assert distribution.data_shard_id == rank
    layout = distribution.get_data_layout((8, 3))
    assert layout.axes == (("replicate", "shard"), None)
    assert layout.backend_layout.placements == (Shard(0), Replicate(), Shard(0))
    one = model_parallel(mesh=mesh, batch_dim_name=("shard",))
    assert one.batch_dim_name == "shard"
    assert one.get_data_layout((8,)).axes == ("shard",)


@pytest.mark.parametrize(
    "names, match",
    [
        (("batch", "rows"), "name an axis.*'rows'.*'batch', 'model'"),
        (
            ("model", "batch"),
            "once, in the order of the mesh.*'model', 'batch'",
        ),
        (("batch", "batch"), "once, in the order of the mesh"),
    ],
)
def test_wrong_batch_axes(fake_world, names, match):
    fake_world(4)
    with pytest.raises(ValueError, match=match):
        model_parallel(batch_dim_name=names)


def test_mesh_of_another_size_than_the_job(fake_world):
    fake_world(4)
    mesh = DeviceMesh((1, 2), ["batch", "model"], DEVICES[:2])
    with pytest.raises(
        ValueError, match="batch 1 x model 2 = 2.*number of processes is 4"
    ):
        distribution_lib.set_distribution(model_parallel(mesh=mesh))
    assert distribution_lib.distribution() is None


def test_mesh_of_a_job_that_was_not_launched(no_world, monkeypatch):
    # One process, and devices of four.
    monkeypatch.setattr(process_group, "agree_on_seed", lambda: None)
    with pytest.raises(
        ValueError, match="= 4.*processes is 1.*torchrun --nproc-per-node 4"
    ):
        distribution_lib.set_distribution(model_parallel())
    assert distribution_lib.distribution() is None


def test_set_distribution(fake_world):
    fake_world(4)
    assert distribution_lib.distribution() is None
    data, model = DataParallel(), model_parallel()
    no_model_axes = model_parallel(mesh=mesh_2d((4, 1)))
    for distribution, is_allowed in (
        (model, True),
        (data, False),
        (model, True),
        (no_model_axes, False),
        (model, True),
        (None, False),
    ):
        distribution_lib.set_distribution(distribution)
        assert distribution_lib.distribution() is distribution
        assert is_implicit_replication_allowed() == is_allowed


def test_scope_puts_back_what_was_there(fake_world):
    fake_world(4)
    data, model = DataParallel(), model_parallel()
    with data.scope():
        with pytest.raises(KeyError):
            with model.scope():
                assert distribution_lib.distribution() is model
                assert is_implicit_replication_allowed()
                with data.scope():
                    assert not is_implicit_replication_allowed()
                assert distribution_lib.distribution() is model
                assert is_implicit_replication_allowed()
                raise KeyError
        assert distribution_lib.distribution() is data
        assert not is_implicit_replication_allowed()
    assert distribution_lib.distribution() is None


def test_clear_session_ends_a_distribution(fake_world):
    fake_world(4)
    distribution_lib.set_distribution(model_parallel())
    assert is_implicit_replication_allowed()
    keras.utils.clear_session()
    assert distribution_lib.distribution() is None
    assert not is_implicit_replication_allowed()
    with model_parallel().scope():
        keras.utils.clear_session()
        assert not is_implicit_replication_allowed()
        distribution_lib.set_distribution(model_parallel())
        assert is_implicit_replication_allowed()
    assert not is_implicit_replication_allowed()


def test_a_batch_stays_plain_outside_of_layers(fake_world):
    fake_world(4)
    batch = torch.ones(7, 3)
    for distribution in (DataParallel(), model_parallel()):
        layout = distribution.get_data_layout(batch.shape)
        assert isinstance(layout, TensorLayout)
        for kind in (layout, layout.backend_layout):
            result = distribution_lib.distribute_tensor(batch, kind)
            assert result is batch
        # A layout of the same axes, by the program's own hand.
        layout = TensorLayout(layout.axes, layout.device_mesh)
        result = distribution_lib.distribute_tensor(batch, layout)
        assert isinstance(result, DTensor)


def test_a_distribution_that_fails_changes_nothing(fake_world):
    fake_world(4)
    mesh = DeviceMesh((2,), ["batch"], DEVICES[:2])
    with model_parallel().scope():
        before = distribution_lib.distribution()
        with pytest.raises(ValueError, match="batch 2 = 2"):
            with DataParallel(device_mesh=mesh).scope():
                pass
        assert distribution_lib.distribution() is before
        assert is_implicit_replication_allowed()


def test_one_process_is_left_to_released_keras(fake_world):
    fake_world(1)
    mesh = DeviceMesh((1, 1), ["batch", "model"], ["cpu:0"])
    layouts = {
        ".*kernel": (None, "model"),
        ".*/output": ("batch", "model"),
    }
    with model_parallel(layouts, mesh=mesh).scope():
        assert context_lib.current() is None
        assert not is_implicit_replication_allowed()
        model = models.Sequential([layers.Input((3,)), layers.Dense(2)])
        model.compile("sgd", "mse")
        history = model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
        assert model.predict(np.ones((4, 3)), verbose=0).shape == (4, 2)
    assert np.isfinite(history.history["loss"]).all()
    assert type(model.layers[0].kernel.value) is torch.nn.Parameter


def test_parallelize_applies_the_plan(fake_world):
    fake_world(4)
    distribution = model_parallel({"dense/kernel": (None, "model")})
    with distribution.scope():
        dense = layers.Dense(4, name="dense")
        dense.build((2, 3))
        distribution.parallelize(dense)
        other = layers.Dense(4, name="other")
        other.build((2, 3))
        distribution.parallelize(other)
    assert type(dense.__dict__[marks.STYLE]) is ProjectionStyle
    assert marks.STYLE not in other.__dict__


def unmatched(layouts, paths):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model_parallel(layouts).warn_of_unmatched_keys(paths)
    return [str(w.message) for w in record]


def test_keys_that_match_nothing_are_told(no_world):
    paths = ["model/dense/kernel", "model/dense/bias"]
    layouts = {
        ".*dense/kernel": (None, "model"),
        "dense.*bias": ("model",),
        "conv/kernel": ("model",),
        "dense/output": ("batch",),
    }
    first, second = unmatched(layouts, paths)
    assert "'dense.*bias' of the layout map matches no variable" in first
    assert "must match a whole path: '.*dense.*bias.*' would" in first
    assert "'conv/kernel'" in second
    assert "whole path" not in second
    for text in (first, second):
        assert "model/dense/kernel" in text
    assert not unmatched({".*kernel": (None, "model")}, paths)


def test_datasets_stay_as_they_are(fake_world):
    # `fit` cuts the batches of any source itself.
    fake_world(4)
    dataset = object()
    assert DataParallel().distribute_dataset(dataset) is dataset
    assert model_parallel().distribute_dataset(dataset) is dataset
