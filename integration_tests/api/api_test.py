"""The functions of `keras.distribution` on several processes."""

import numpy as np
import pytest
import torch
from torch.distributed.distributed_c10d import _world
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.distributed.tensor.parallel import RowwiseParallel

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras.src.backend.torch import distribution_lib as backend_lib

pytestmark = [pytest.mark.world(2, 4), pytest.mark.limit(60)]

LAYOUTS = {
    "model/up/kernel": (None, "model"),
    "model/up/bias": ("model",),
    "model/down/kernel": ("model", "batch"),
    "model/down/bias": ("batch",),
}


def device_mesh(shape, names=("batch", "model"), devices=None):
    return keras.distribution.DeviceMesh(shape, names, devices)


def mesh_shape(world_size):
    """Both axes are cut where there are processes enough."""
    return (2, 2) if world_size == 4 else (1, 2)


def make_model():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(12, activation="relu", name="up"),
            layers.Dense(4, name="down"),
        ],
        name="model",
    )
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    return model


def data(rows=7):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((rows, 6)).astype("float32")
    y = rng.standard_normal((rows, 4)).astype("float32")
    return x, y


@pytest.mark.parametrize("axes", [("model", None), (None, "model"), None])
def test_distribute_tensor(axes, world_size):
    value = torch.arange(5.0 * 8).reshape(5, 8)
    mesh = device_mesh((1, world_size))
    layout = keras.distribution.TensorLayout(axes or (None, None), mesh)
    result = keras.distribution.distribute_tensor(value, layout)
    assert isinstance(result, DTensor)
    assert result.shape == (5, 8)
    expected = Replicate() if axes is None else Shard(axes.index("model"))
    assert result.placements == (Replicate(), expected)
    torch.testing.assert_close(result.full_tensor().cpu(), value)
    if axes is not None:
        dim = axes.index("model")
        local = result.to_local()
        sizes = everyone.gather(local.shape[dim])
        assert sum(sizes) == value.shape[dim]
        assert max(sizes) == -(-value.shape[dim] // world_size)
        start = sum(sizes[: torch.distributed.get_rank()])
        part = value.narrow(dim, start, local.shape[dim])
        torch.testing.assert_close(local.cpu(), part)


def test_distribute_tensor_again(world_size):
    value = torch.arange(32.0).reshape(4, 8)
    mesh = device_mesh((1, world_size))
    first, second = (
        keras.distribution.TensorLayout(axes, mesh)
        for axes in (("model", None), (None, "model"))
    )
    rows = keras.distribution.distribute_tensor(value, first)
    columns = keras.distribution.distribute_tensor(rows, second)
    assert columns.placements == (Replicate(), Shard(1))
    assert columns.to_local().shape == (4, 8 // world_size)
    torch.testing.assert_close(columns.full_tensor().cpu(), value)


def test_distribute_tensor_gives_gradients(world_size):
    value = torch.arange(32.0).reshape(4, 8).requires_grad_()
    mesh = device_mesh((1, world_size))
    layout = keras.distribution.TensorLayout(("model", None), mesh)
    result = keras.distribution.distribute_tensor(value, layout)
    weights = torch.linspace(-1, 1, 32).reshape(4, 8)
    (result.full_tensor() * weights).sum().backward()
    torch.testing.assert_close(value.grad, weights)


@pytest.mark.parametrize(
    "dtype, asks",
    [
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.complex64, True),
        (torch.int32, False),
        (torch.int64, False),
        (torch.uint8, False),
        (torch.bool, False),
    ],
)
def test_distribute_variable(dtype, asks, world_size):
    value = torch.arange(24).reshape(8, 3).to(dtype)
    mesh = device_mesh((1, world_size))
    layout = keras.distribution.TensorLayout(("model", None), mesh)
    for trainable in (None, True, False):
        result = backend_lib.distribute_variable(value, layout, trainable)
        assert isinstance(result, torch.nn.Parameter)
        assert result.dtype == dtype
        assert result.shape == (8, 3)
        assert result.to_local().shape == (8 // world_size, 3)
        assert result.requires_grad == (asks and trainable is not False)
        assert torch.equal(result.detach().full_tensor(), value)


def test_distribute_variable_of_a_keras_variable(world_size):
    layout = keras.distribution.TensorLayout(
        ("model",), device_mesh((1, world_size))
    )
    for trainable in (True, False):
        variable = keras.Variable(np.arange(8.0), trainable=trainable)
        result = backend_lib.distribute_variable(variable, layout)
        assert result.requires_grad == trainable
        np.testing.assert_array_equal(result.detach().full_tensor(), variable)


@pytest.mark.parametrize("rows", ["even", "uneven", "none"])
@pytest.mark.parametrize("axes", [("batch", "model"), ("batch", None)])
def test_distribute_data_input(rows, axes, world_size):
    mesh = device_mesh(mesh_shape(world_size)[::-1])
    shards = mesh.shape[0]
    counts = {
        "even": [3] * shards,
        "uneven": [5, 2],
        "none": [0] * (shards - 1) + [4],
    }[rows]
    whole = np.arange(sum(counts) * 6, dtype="float32").reshape(-1, 6)
    # Each process has the rows of its data shard.
    shard = mesh.backend_mesh.get_local_rank(0)
    start = sum(counts[:shard])
    ours = whole[start : start + counts[shard]]
    layout = keras.distribution.TensorLayout(axes, mesh)
    result = backend_lib.distribute_data_input(ours, layout, "batch")
    assert isinstance(result, DTensor)
    assert result.shape == whole.shape
    expected = Shard(1) if axes[1] else Replicate()
    assert result.placements == (Shard(0), expected)
    np.testing.assert_array_equal(result.full_tensor(), whole)
    assert backend_lib.distribute_data_input(result, layout, "batch") is result
    layout = keras.distribution.TensorLayout((None, "model"), mesh)
    again = backend_lib.distribute_data_input(result, layout)
    assert again.placements == (Replicate(), Shard(1))
    np.testing.assert_array_equal(again.full_tensor(), whole)


def test_distribute_data_input_that_no_axis_splits(world_size):
    layout = keras.distribution.TensorLayout(
        (None, "model"), device_mesh((1, world_size))
    )
    batch = np.arange(24.0).reshape(3, 8)
    result = backend_lib.distribute_data_input(batch, layout)
    assert result.to_local().shape == (3, 8 // world_size)
    np.testing.assert_array_equal(result.full_tensor(), batch)


def test_equal_meshes_share_process_groups(world_size):
    shape = mesh_shape(world_size)
    first = device_mesh(shape)
    torch_mesh = first.backend_mesh
    groups = len(_world.pg_map)
    for _ in range(5):
        mesh = device_mesh(shape)
        assert mesh.backend_mesh is torch_mesh
        layout_map = parity.layout_map(mesh, LAYOUTS)
        distribution = keras.distribution.ModelParallel(layout_map=layout_map)
        with distribution.scope():
            make_model().train_on_batch(*data())
    assert len(_world.pg_map) == groups
    other = device_mesh(shape, ("rows", "columns"))
    assert other.backend_mesh is not torch_mesh


def make_normalized_model():
    """A model with a layer whose own code runs on shards."""
    inputs = keras.Input((6,))
    x = layers.Dense(12, name="up")(inputs)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.PReLU(name="prelu")(x)
    outputs = layers.Dense(4, name="down")(x)
    return keras.Model(inputs, outputs, name="model")


@pytest.mark.parametrize("order", ["reversed", "crossed"])
def test_order_of_devices(order, world_size):
    shape = mesh_shape(world_size)
    devices = keras.distribution.list_devices()
    if order == "reversed":
        other = devices[::-1]
    else:
        # On 4 processes (0, 2) and (1, 3), not (0, 1) and (2, 3).
        other = [*devices[::2], *devices[1::2]]
    meshes = [device_mesh(shape, devices=d) for d in (devices, other)]
    # Turned around it has the same groups, crossed it has others.
    assert (meshes[0].backend_mesh is meshes[1].backend_mesh) == (
        order == "reversed" or devices == other
    )
    layouts = LAYOUTS | {
        "norm/(gamma|beta)": ("model",),
        ".*prelu/alpha": ("model",),
        "(up|down)/kernel": (None, "model"),
        ".*up/bias": ("model",),
    }
    x, y = data()
    expected = parity.train(make_normalized_model, x, y)
    for mesh in meshes:
        distribution = keras.distribution.ModelParallel(
            layout_map=parity.layout_map(mesh, layouts)
        )
        actual = parity.train(make_normalized_model, x, y, distribution)
        parity.assert_same(actual, expected)


@pytest.mark.parametrize("axes", [("model", "batch"), ("batch", None)])
def test_order_of_devices_in_redistribution(axes, world_size):
    devices = keras.distribution.list_devices()[::-1]
    mesh = device_mesh(mesh_shape(world_size), devices=devices)
    layout, whole = (
        keras.distribution.TensorLayout(axes, mesh)
        for axes in (axes, (None, None))
    )
    value = torch.arange(32.0).reshape(8, 4)
    result = keras.distribution.distribute_tensor(value, whole)
    result = keras.distribution.distribute_tensor(result, layout)
    torch.testing.assert_close(result.full_tensor().cpu(), value)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 12)
        self.down = torch.nn.Linear(12, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def run_torch(module, x):
    """Outputs and whole gradients of a torch module."""
    outputs = module(x)
    outputs.square().sum().backward()
    gradients = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        gradients[name] = grad.numpy()
    return outputs.detach().numpy(), gradients


def test_plan_from_a_layout_map(world_size):
    mesh = device_mesh(mesh_shape(world_size))
    columns = mesh.shape[1]
    layout_map = parity.layout_map(
        mesh,
        {
            "up/weight": ("model", None),
            ".*up/bias": ("model",),
            "down/weight": (None, "model"),
        },
    )
    block = Block()
    x = torch.from_numpy(data()[0])
    expected = run_torch(block, x)
    block.zero_grad()

    plan = backend_lib.create_tp_plan_from_layout_map(block, layout_map)
    assert sorted(plan) == ["down", "up"]
    assert backend_lib.parallelize_torch_module(block, mesh, plan) is block
    locals_ = {
        name: tuple(parameter.to_local().shape)
        for name, parameter in block.named_parameters()
    }
    assert locals_ == {
        "up.weight": (12 // columns, 6),
        "up.bias": (12 // columns,),
        "down.weight": (4, 12 // columns),
        "down.bias": (4,),
    }
    parity.assert_same(run_torch(block, x), expected)


def test_plan_written_by_hand(world_size):
    mesh = device_mesh((world_size,), ("model",))
    block = Block()
    x = torch.from_numpy(data()[0])
    expected = run_torch(block, x)
    block.zero_grad()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    backend_lib.parallelize_torch_module(block, mesh, plan)
    assert block.up.weight.to_local().shape == (12 // world_size, 6)
    assert block.down.weight.to_local().shape == (4, 12 // world_size)
    parity.assert_same(run_torch(block, x), expected)


def test_plan_of_a_keras_model(world_size):
    mesh = device_mesh(mesh_shape(world_size))
    layout_map = parity.layout_map(mesh, LAYOUTS)
    plan = backend_lib.create_tp_plan_from_layout_map(make_model(), layout_map)
    assert sorted(plan) == ["down", "up"]


def test_plan_that_names_no_module(world_size):
    mesh = device_mesh((world_size,), ("model",))
    with pytest.raises(ValueError, match="'middle'.*'down', 'up'"):
        backend_lib.parallelize_torch_module(
            Block(), mesh, {"middle": ColwiseParallel()}
        )


def trained():
    keras.utils.set_random_seed(4)
    model = make_model()
    model.train_on_batch(*data())
    return model


def new_model():
    keras.utils.set_random_seed(99)
    return make_model()


def distributions(world_size):
    yield keras.distribution.DataParallel()
    yield parity.model_parallel(mesh_shape(world_size), LAYOUTS)


def test_get_and_set_weights(world_size):
    x, _ = data()
    model = trained()
    expected = model.get_weights()
    outputs = model.predict(x, verbose=0)
    for distribution in distributions(world_size):
        with distribution.scope():
            weights = trained().get_weights()
            parity.assert_same(weights, expected)
            model = new_model()
            model.set_weights(expected)
            for new, old in zip(model.get_weights(), expected):
                np.testing.assert_array_equal(new, old)
            parity.assert_same(model.predict(x, verbose=0), outputs)


def test_save_and_load(world_size, tmp_path):
    x, y = data()
    alone = trained()
    expected = alone.get_weights()
    after = [alone.train_on_batch(x, y), alone.predict(x, verbose=0)]
    for i, distribution in enumerate(distributions(world_size)):
        model_path = tmp_path / f"{i}.keras"
        weights_path = tmp_path / f"{i}.weights.h5"
        with distribution.scope():
            model = trained()
            model.save(model_path)
            model.save_weights(weights_path)
            model = new_model()
            model.load_weights(weights_path)
            parity.assert_same(model.get_weights(), expected)
            model = keras.saving.load_model(model_path)
            parity.assert_same(model.get_weights(), expected)
            # The optimizer's state is there as well.
            assert int(model.optimizer.iterations.value) == 1
            trains = [model.train_on_batch(x, y), model.predict(x, verbose=0)]
            parity.assert_same(trains, after)
        # What was saved knows nothing of the distribution.
        model = keras.saving.load_model(model_path)
        parity.assert_same(model.get_weights(), expected)
        trains = [model.train_on_batch(x, y), model.predict(x, verbose=0)]
        parity.assert_same(trains, after)


def test_file_of_one_device_is_loaded(world_size, rank, tmp_path):
    path = tmp_path / f"{rank}.weights.h5"
    model = trained()
    model.save_weights(path)
    expected = model.get_weights()
    for distribution in distributions(world_size):
        with distribution.scope():
            model = new_model()
            model.load_weights(path)
            parity.assert_same(model.get_weights(), expected)


def test_one_process_prints(rank, world_size):
    distribution = parity.model_parallel(mesh_shape(world_size), LAYOUTS)
    with distribution.scope():
        model = make_model()
        # What communicates on one process only leaves the others behind: the
        # launcher's barrier after the case would not be met.
        if rank == 0:
            for variable in model.variables:
                text = f"{variable} {variable!r} {[variable]}"
                assert variable.path in text
                assert str(tuple(variable.shape)) in text
            assert "Shard" in repr(model.layers[0].kernel)
            print(model.variables, model.layers, distribution)
    everyone.gather(rank)


def test_initialize_twice(rank, world_size):
    group = torch.distributed.group.WORLD
    keras.distribution.initialize()
    keras.distribution.initialize(num_processes=world_size, process_id=rank)
    assert torch.distributed.group.WORLD is group
    assert backend_lib.num_processes() == world_size
    assert backend_lib.process_id() == rank
    with pytest.raises(ValueError, match=f"num_processes={world_size}"):
        keras.distribution.initialize(num_processes=world_size + 1)
