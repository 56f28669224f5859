"""Tests of the backend API, in one process.

Of several processes, this one plays one in torch's fake process group.
"""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

import keras
from keras.src import backend
from keras.src import layers
from keras.src.backend.torch import distribution_lib as backend_dlib
from keras.src.backend.torch.distribution import modes as modes_lib
from keras.src.backend.torch.distribution.layers.projection import (
    ProjectionStyle,
)
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.distribution import distribution_lib
from keras.src.distribution.distribution_lib import DeviceMesh
from keras.src.distribution.distribution_lib import LayoutMap
from keras.src.distribution.distribution_lib import ModelParallel
from keras.src.distribution.distribution_lib import TensorLayout

DEVICES = [f"cpu:{i}" for i in range(4)]


def mesh_2d(shape=(2, 2), names=("batch", "model"), devices=DEVICES):
    return DeviceMesh(shape, list(names), devices)


def run_alone(code):
    """What a process prints that no launcher has started."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**env, "KERAS_BACKEND": "torch", "KERAS_TORCH_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not process.returncode, process.stderr
    return process.stdout.splitlines()


def test_initialize_without_a_launcher_makes_a_world_of_one():
    printed = run_alone(
        """
        import keras
        import torch.distributed as dist
        from keras.src.backend.torch import distribution_lib
        from keras.src.utils import rng_utils

        print(keras.distribution.list_devices("cpu"), dist.is_initialized())
        keras.distribution.initialize()
        print(dist.get_world_size(), dist.get_rank(), dist.get_backend())
        print(distribution_lib.num_processes(), distribution_lib.process_id())
        keras.distribution.initialize(num_processes=1, process_id=0)
        try:
            keras.distribution.initialize(num_processes=2, process_id=0)
        except ValueError as error:
            print("already running" in str(error))
        print(rng_utils.get_random_seed() is not None)
        """
    )
    assert printed == ["['cpu:0'] False", "1 0 gloo", "1 0", "True", "True"]


def test_initialize_reads_kerass_variables(no_world, monkeypatch):
    joined = []
    monkeypatch.setattr(
        process_group,
        "_join",
        lambda *args, **kwargs: joined.append((*args, kwargs)),
    )
    monkeypatch.setattr(process_group, "agree_on_seed", lambda: None)
    prefix = "KERAS_DISTRIBUTION_"
    monkeypatch.setenv(f"{prefix}JOB_ADDRESSES", "[::1]:80,[::2]:80")
    monkeypatch.setenv(f"{prefix}PROCESS_ID", "1")
    distribution_lib.initialize()
    assert joined == [(2, 1, {"init_method": "tcp://[::1]:80"})]


def test_devices_are_one_for_each_process(fake_world):
    assert backend_dlib.list_devices("cpu") == ["cpu:0"]
    fake_world(4, rank=2)
    assert backend_dlib.list_devices("cpu") == DEVICES
    assert backend_dlib.list_devices("CPU") == DEVICES
    assert backend_dlib.get_device_count("cpu") == 4
    assert backend_dlib.get_device_count() == 4
    assert backend_dlib.num_processes() == 4
    assert backend_dlib.process_id() == 2
    # Keras's own functions lead here.
    assert distribution_lib.list_devices("cpu") == DEVICES
    assert distribution_lib.get_device_count("cpu") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="for CPUs alone")
def test_devices_of_a_cpu_job(fake_world):
    fake_world(2)
    assert backend_dlib.list_devices() == ["cpu:0", "cpu:1"]
    for device_type in ("gpu", "cuda"):
        with pytest.raises(ValueError, match="no device of type 'gpu'"):
            backend_dlib.list_devices(device_type)


def test_devices_of_an_unknown_type(no_world):
    with pytest.raises(ValueError, match="'tpu'.*Available.*device_type=tpu"):
        backend_dlib.list_devices("tpu")
    with pytest.raises(ValueError, match="no device of type 'abc'"):
        backend_dlib.get_device_count("abc")


def test_to_backend_device(fake_world):
    fake_world(4)
    cpu = torch.device("cpu")
    assert backend_dlib._to_backend_device(cpu) is cpu
    for name in ("cpu", "cpu:0", "CPU:3"):
        assert backend_dlib._to_backend_device(name) == cpu


@pytest.mark.parametrize("name", ["tpu:0", "cpu:x", "", "cpu:-1"])
def test_to_backend_device_of_an_unknown_device(fake_world, name):
    fake_world(4)
    with pytest.raises(ValueError, match=f"Device not found: {name}"):
        backend_dlib._to_backend_device(name)


def test_to_backend_device_of_a_process_that_there_is_not(fake_world):
    fake_world(4)
    with pytest.raises(
        ValueError, match="Device not found: cpu:4.*is 4.*last one is 'cpu:3'"
    ):
        backend_dlib._to_backend_device("cpu:4")


def test_to_backend_mesh(fake_world):
    fake_world(4)
    mesh = backend_dlib._to_backend_mesh(
        mesh_2d(devices=["cpu:0", "cpu:2", "cpu:1", "cpu:3"])
    )
    assert isinstance(mesh, dist.DeviceMesh)
    assert mesh.mesh.tolist() == [[0, 2], [1, 3]]
    assert mesh.mesh_dim_names == ("batch", "model")
    assert mesh.device_type == "cpu"


def test_equal_meshes_are_one_torch_mesh(fake_world):
    fake_world(4)
    first = mesh_2d().backend_mesh
    groups = dist.distributed_c10d._world.group_count
    assert mesh_2d().backend_mesh is first
    assert mesh_2d(shape=[2, 2]).backend_mesh is first
    assert mesh_2d(shape=tuple(np.array([2, 2]))).backend_mesh is first
    # The same processes share an axis.
    assert mesh_2d(devices=DEVICES[::-1]).backend_mesh is first
    # Nor is anything made that would be thrown away.
    assert dist.distributed_c10d._world.group_count == groups


def test_processes_are_ascending_along_each_axis(fake_world):
    fake_world(4)
    # torch's groups are, so that another order would permute shards.
    mesh = mesh_2d(devices=DEVICES[::-1]).backend_mesh
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
    assert mesh_2d().backend_mesh is mesh
    crossed = [DEVICES[i] for i in (3, 1, 2, 0)]
    assert mesh_2d(devices=crossed).backend_mesh.mesh.tolist() == [
        [0, 2],
        [1, 3],
    ]
    with pytest.raises(ValueError, match="one order"):
        mesh_2d(devices=[DEVICES[i] for i in (0, 3, 1, 2)]).backend_mesh


@pytest.mark.parametrize(
    "other",
    [
        {"shape": (4, 1)},
        {"shape": (4,), "names": ("batch",)},
        {"names": ("model", "batch")},
        {"devices": ["cpu:0", "cpu:2", "cpu:1", "cpu:3"]},
    ],
)
def test_other_meshes_are_other_torch_meshes(fake_world, other):
    fake_world(4)
    first = mesh_2d().backend_mesh
    second = mesh_2d(**other).backend_mesh
    assert second is not first
    assert mesh_2d(**other).backend_mesh is second
    assert mesh_2d().backend_mesh is first


@pytest.mark.parametrize(
    "shape, order, expected",
    [
        ((4,), (2, 0, 3, 1), [0, 1, 2, 3]),
        ((2, 2), (3, 2, 1, 0), [[0, 1], [2, 3]]),
        ((2, 2), (0, 2, 1, 3), [[0, 2], [1, 3]]),
        ((2, 2), (3, 1, 2, 0), [[0, 2], [1, 3]]),
    ],
)
def test_ranks_ascend_within_their_groups(fake_world, shape, order, expected):
    fake_world(4)
    names = ["a", "b"][: len(shape)]
    mesh = DeviceMesh(shape, names, [f"cpu:{i}" for i in order])
    assert mesh.backend_mesh.mesh.tolist() == expected


def test_ranks_that_can_not_ascend(fake_world):
    fake_world(4)
    mesh = mesh_2d(devices=["cpu:0", "cpu:3", "cpu:2", "cpu:1"])
    with pytest.raises(ValueError, match=r"Received.*\[\[0, 3\], \[2, 1\]\]"):
        mesh.backend_mesh


def test_a_new_process_group_has_new_meshes(fake_world):
    fake_world(4, rank=0)
    first = mesh_2d().backend_mesh
    fake_world(4, rank=3)
    second = mesh_2d().backend_mesh
    assert second is not first
    assert tuple(second.get_coordinate()) == (1, 1)
    # What is put on it is on it, though it equals the old one.
    x = sharded.wrap(torch.ones(2), second, (Replicate(),) * 2, (2,))
    assert x.device_mesh is second


def test_mesh_of_another_size_than_the_job(fake_world):
    fake_world(4)
    mesh = DeviceMesh((1, 2), ["batch", "model"], DEVICES[:2])
    with pytest.raises(
        ValueError,
        match="batch 1 x model 2 = 2, while the number of processes is 4.*"
        "--nproc-per-node 2",
    ):
        mesh.backend_mesh
    mesh = DeviceMesh((2, 2), ["a", "b"], ["cpu:0"] * 4)
    with pytest.raises(ValueError, match="one device for each process"):
        mesh.backend_mesh
    mesh = DeviceMesh((8,), ["batch"], [f"cpu:{i}" for i in range(8)])
    with pytest.raises(ValueError, match="batch 8 = 8,.*processes is 4"):
        mesh.backend_mesh


def test_to_backend_layout(fake_world):
    fake_world(4)
    mesh = mesh_2d()
    layout = TensorLayout(("model", None, "batch"), mesh)
    result = backend_dlib._to_backend_layout(layout)
    assert result.tensor_layout is layout
    assert result.device_mesh is mesh.backend_mesh
    assert result.placements == (Shard(2), Shard(0))
    assert layout.backend_layout.placements == result.placements
    # What is a backend layout, or says that there is none, stays.
    assert backend_dlib._to_backend_layout(result) is result
    assert backend_dlib._to_backend_layout(None) is None


def test_layout_without_a_mesh(fake_world):
    with pytest.raises(ValueError, match="device mesh is not set"):
        backend_dlib._to_backend_layout(TensorLayout(("model",)))
    fake_world(4)
    for function in (
        backend_dlib.distribute_tensor,
        backend_dlib.distribute_variable,
        backend_dlib.distribute_data_input,
    ):
        with pytest.raises(ValueError, match="mesh of the layout is not set"):
            function(torch.ones(2), TensorLayout((None,)))


@pytest.mark.parametrize("kind", ["tensor", "numpy", "list", "variable"])
def test_no_layout(fake_world, kind):
    # `get_tensor_layout` gives None where no key matches.
    fake_world(4)
    value = {
        "tensor": torch.ones(2, 2),
        "numpy": np.ones((2, 2), "float32"),
        "list": [[1.0, 1.0], [1.0, 1.0]],
        "variable": backend.Variable(np.ones((2, 2), "float32")),
    }[kind]
    for function in (
        distribution_lib.distribute_tensor,
        backend_dlib.distribute_data_input,
        backend_dlib.distribute_variable,
    ):
        result = function(value, None)
        assert isinstance(result, torch.Tensor)
        assert not isinstance(result, DTensor)
        assert result.tolist() == [[1, 1], [1, 1]]
    assert isinstance(result, torch.nn.Parameter) and result.requires_grad
    if kind == "tensor":
        assert backend_dlib.distribute_tensor(value, None) is value
        assert backend_dlib.distribute_data_input(value, None) is value
        # A variable is nobody else's memory.
        assert result.data_ptr() != value.data_ptr()


def as_layout(layout, kind):
    return layout.backend_layout if kind == "backend" else layout


@pytest.mark.parametrize("kind", ["keras", "backend"])
@pytest.mark.parametrize(
    "dtype, asks",
    [
        ("float32", True),
        ("bfloat16", True),
        ("complex64", True),
        ("int32", False),
        ("bool", False),
    ],
)
@pytest.mark.parametrize("trainable", [None, True, False])
def test_distribute_variable(fake_world, dtype, asks, trainable, kind):
    fake_world(4, rank=3)
    value = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    layout = as_layout(TensorLayout(("batch", "model"), mesh_2d()), kind)
    result = backend_dlib.distribute_variable(value, layout, trainable)
    assert isinstance(result, torch.nn.Parameter)
    assert isinstance(result, DTensor)
    assert result.shape == (3, 4)
    assert result.dtype == value.dtype
    assert result.placements == (Shard(0), Shard(1))
    assert torch.equal(sharded.local_of(result), value[2:, 2:])
    assert result.requires_grad == (asks and trainable is not False)


def test_distribute_variable_copies(fake_world):
    fake_world(4)
    value = torch.zeros(4, 4)
    mesh = mesh_2d(shape=(1, 4))
    for axes in ((None, None), ("batch", None), ("model", None)):
        result = backend_dlib.distribute_variable(
            value, TensorLayout(axes, mesh), trainable=False
        )
        sharded.local_of(result).fill_(1.0)
    assert not value.any()


def test_distribute_variable_of_numpy(fake_world):
    fake_world(4, rank=1)
    layout = TensorLayout((None, "model"), mesh_2d())
    result = backend_dlib.distribute_variable(np.eye(2, dtype="int64"), layout)
    assert not result.requires_grad
    assert sharded.local_of(result).tolist() == [[0], [1]]


@pytest.mark.parametrize(
    "dtype, trainable",
    [("float32", True), ("float32", False), ("int32", False)],
)
def test_distribute_variable_of_a_variable(fake_world, dtype, trainable):
    fake_world(4)
    variable = backend.Variable(
        np.ones((2, 2)), dtype=dtype, trainable=trainable
    )
    layout = TensorLayout((None, "model"), mesh_2d())
    result = backend_dlib.distribute_variable(variable, layout)
    assert result.requires_grad == (trainable and dtype == "float32")
    # What was asked for wins.
    result = backend_dlib.distribute_variable(variable, layout, not trainable)
    assert result.requires_grad == (not trainable and dtype == "float32")
    assert variable._value.requires_grad == (trainable and dtype == "float32")


def test_distribute_variable_of_a_parameter(fake_world):
    fake_world(4)
    layout = TensorLayout((None,), mesh_2d())
    for requires_grad in (True, False):
        value = torch.nn.Parameter(torch.ones(2), requires_grad)
        result = backend_dlib.distribute_variable(value, layout)
        assert result.requires_grad == requires_grad


def test_distribute_tensor(fake_world):
    fake_world(4, rank=1)
    value = torch.arange(8.0).reshape(2, 4).requires_grad_()
    layout = TensorLayout((None, "model"), mesh_2d())
    for kind in ("keras", "backend"):
        result = backend_dlib.distribute_tensor(value, as_layout(layout, kind))
        assert result.device_mesh is layout.device_mesh.backend_mesh
        assert result.placements == (Replicate(), Shard(1))
        assert result.shape == (2, 4)
        assert sharded.local_of(result).tolist() == [[2, 3], [6, 7]]
        assert result.requires_grad
    array = distribution_lib.distribute_tensor(value.tolist(), layout)
    assert torch.equal(sharded.local_of(array), sharded.local_of(result))


def test_distribute_tensor_again(fake_world):
    fake_world(4, rank=1)
    mesh = mesh_2d()
    value = torch.arange(8.0).reshape(2, 4)
    whole = backend_dlib.distribute_tensor(value, TensorLayout((), mesh))
    assert whole.placements == (Replicate(), Replicate())
    result = backend_dlib.distribute_tensor(
        whole, TensorLayout((None, "model"), mesh)
    )
    assert result.placements == (Replicate(), Shard(1))
    assert sharded.local_of(result).tolist() == [[2, 3], [6, 7]]


def test_distribute_tensor_of_a_layer(fake_world):
    fake_world(4, rank=1)
    mesh = mesh_2d()
    rows_of_ours = torch.arange(8.0).reshape(2, 4)
    with ModelParallel(layout_map=LayoutMap(mesh)).scope():
        modes.calls += 1
        try:
            # Rows are ours already: only the model axis cuts.
            result = backend_dlib.distribute_tensor(
                rows_of_ours, TensorLayout(("batch", "model"), mesh)
            )
        finally:
            modes.calls -= 1
    assert result.device_mesh.mesh_dim_names == ("model",)
    assert result.placements == (Shard(1),)
    assert sharded.local_of(result).tolist() == [[2, 3], [6, 7]]


def test_distribute_tensor_with_one_process(fake_world):
    fake_world(1)
    mesh = mesh_2d((1, 1), devices=["cpu:0"])
    value = torch.ones(2, 2)
    layout = TensorLayout(("batch", "model"), mesh)
    assert backend_dlib.distribute_tensor(value, layout) is value
    layout_map = LayoutMap(mesh)
    layout_map[".*output"] = ("batch", "model")
    with ModelParallel(layout_map=layout_map).scope():
        assert type(layers.Dense(2)(value)) is torch.Tensor


@pytest.mark.parametrize(
    "axes, name, placements, shape, first",
    [
        (("batch", None), "batch", (Shard(0), Replicate()), (6, 4), 0.0),
        (("batch", None), None, (Shard(0), Replicate()), (6, 4), 0.0),
        (("batch", "model"), None, (Shard(0), Shard(1)), (6, 4), 2.0),
        ((None, "model"), None, (Replicate(), Shard(1)), (3, 4), 2.0),
        ((None, None), None, (Replicate(), Replicate()), (3, 4), 0.0),
    ],
)
def test_distribute_data_input(
    fake_world, monkeypatch, axes, name, placements, shape, first
):
    fake_world(4, rank=1)
    monkeypatch.setattr(
        backend_dlib.rows, "counts", lambda local, group: [local, 3]
    )
    batch = np.arange(12.0).reshape(3, 4)
    arguments = [batch, TensorLayout(axes, mesh_2d())]
    result = backend_dlib.distribute_data_input(
        *arguments, *([] if name is None else [name])
    )
    assert isinstance(result, DTensor)
    assert result.shape == shape
    assert result.placements == placements
    assert float(sharded.local_of(result)[0, 0]) == first


@pytest.mark.parametrize("kind", ["keras", "backend"])
def test_distribute_data_input_again(fake_world, monkeypatch, kind):
    fake_world(4, rank=1)
    monkeypatch.setattr(
        backend_dlib.rows, "counts", lambda local, group: [local, 3]
    )
    mesh = mesh_2d()
    layout = as_layout(TensorLayout(("batch", None), mesh), kind)
    batch = backend_dlib.distribute_data_input(np.ones((3, 4)), layout)
    assert backend_dlib.distribute_data_input(batch, layout) is batch
    # Nothing that is global is taken for rows of one process.
    other = as_layout(TensorLayout((None, "model"), mesh), kind)
    whole = distribution_lib.distribute_tensor(
        np.arange(12.0).reshape(3, 4), TensorLayout((), mesh)
    )
    result = backend_dlib.distribute_data_input(whole, other)
    assert result.shape == (3, 4)
    assert result.placements == (Replicate(), Shard(1))
    assert sharded.local_of(result).tolist() == [[2, 3], [6, 7], [10, 11]]


def test_distribute_data_input_of_uneven_rows(on_threads):
    whole = torch.arange(10.0).reshape(5, 2)
    counts = [1, 4]

    def run(rank):
        mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("batch",))
        ours = whole.split(counts)[rank]
        result = backend_dlib.gathers.assemble(ours, mesh, (0,), (Shard(0),))
        return tuple(result.shape), sharded.local_of(result)

    shapes, locals_ = zip(*on_threads(2, run))
    assert shapes == ((5, 2), (5, 2))
    # As torch's own shards are.
    assert [len(x) for x in locals_] == [3, 2]
    assert torch.equal(torch.cat(locals_), whole)


def test_plan_and_parallelize(fake_world):
    fake_world(2)
    mesh = DeviceMesh((1, 2), ["batch", "model"], DEVICES[:2])
    layout_map = LayoutMap(mesh)
    layout_map["dense/kernel"] = (None, "model")
    layer = layers.Dense(4, name="dense")
    layer.build((2, 3))
    plan = backend_dlib.create_tp_plan_from_layout_map(layer, layout_map)
    assert {name: type(style) for name, style in plan.items()} == {
        "": ProjectionStyle
    }
    for mesh_of_any_kind in (mesh, mesh.backend_mesh):
        assert (
            backend_dlib.parallelize_torch_module(layer, mesh_of_any_kind, plan)
            is layer
        )
    with pytest.raises(ValueError, match="module that there is not: 'head'"):
        backend_dlib.parallelize_torch_module(
            layer, mesh, {"head": ProjectionStyle()}
        )


def test_functions_are_those_of_jax():
    # Of its source, since JAX need not be installed.
    path = pathlib.Path(keras.__file__).parent / "src/backend/jax"
    text = (path / "distribution_lib.py").read_text()
    names = set(re.findall(r"^def (\w+)", text, re.MULTILINE))
    assert not names - set(vars(backend_dlib))
    assert {name for name in names if not name.startswith("_")} <= set(
        backend_dlib.__all__
    )


def test_modes_are_off():
    # What the tests above have entered, they have left.
    for name, usual in vars(modes_lib._Modes).items():
        if not name.startswith("_"):
            assert getattr(modes, name) == usual, name
