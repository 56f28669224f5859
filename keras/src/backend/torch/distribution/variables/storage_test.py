import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src import backend
from keras.src import initializers
from keras.src import layers
from keras.src.backend.common import variables
from keras.src.backend.torch.distribution import modes as modes_lib
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import storage
from keras.src.backend.torch.distribution.variables import unshard
from keras.src.distribution.distribution_lib import DeviceMesh
from keras.src.distribution.distribution_lib import LayoutMap
from keras.src.distribution.distribution_lib import ModelParallel

WORLD = 4


def model_parallel(layouts, shape=(2, 2)):
    mesh = DeviceMesh(
        shape, ["batch", "model"], [f"cpu:{i}" for i in range(WORLD)]
    )
    layout_map = LayoutMap(mesh)
    for key, axes in layouts.items():
        layout_map[key] = axes
    return ModelParallel(layout_map=layout_map)


def variable(value, **kwargs):
    return backend.Variable(value, name="kernel", **kwargs)


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("rows", [4, 3, 1])
def test_shard_is_ours_by_both_axes(fake_world, rank, rows):
    fake_world(WORLD, rank)
    with model_parallel({}).scope():
        mesh = context_lib.current().mesh
        value = torch.arange(rows * 6.0).reshape(rows, 6)
        x = storage.shard(value, mesh, (Shard(0), Shard(1)))
    assert x.shape == (rows, 6)
    expected = value.chunk(2, 0)
    expected = (*expected, value[:0])[rank // 2].chunk(2, 1)[rank % 2]
    assert torch.equal(sharded.local_of(x), expected)


@pytest.mark.parametrize(
    "placements",
    [
        (Replicate(), Replicate()),
        (Replicate(), Shard(0)),
        # An axis of size 1: our shard is all there is.
        (Shard(0), Replicate()),
    ],
)
def test_shard_is_a_copy(fake_world, placements):
    fake_world(WORLD)
    with model_parallel({}, shape=(1, 4)).scope():
        mesh = context_lib.current().mesh
        value = torch.zeros(4, 4)
        local = sharded.local_of(storage.shard(value, mesh, placements))
    local.fill_(1.0)
    assert not value.any()
    # Nor does it keep the whole alive.
    assert local.untyped_storage().nbytes() == local.numel() * 4


def test_variable_that_a_layout_shards(fake_world):
    fake_world(WORLD, rank=1)
    with model_parallel({"kernel": (None, "model")}).scope():
        v = variable(np.arange(8.0).reshape(2, 4))
    assert isinstance(v._value, torch.nn.Parameter)
    assert isinstance(v._value, DTensor)
    assert tuple(v.shape) == (2, 4)
    assert v._value.placements == (Replicate(), Shard(1))
    assert v._value.requires_grad
    assert sharded.local_of(v._value).tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize(
    "layouts", [{}, {"kernel": (None, None)}, {"kernel": ("batch", None)}]
)
def test_variable_that_no_axis_shards_is_plain(fake_world, layouts):
    fake_world(WORLD)
    # The axis "batch" is of size 1.
    with model_parallel(layouts, shape=(1, 4)).scope():
        v = variable(np.ones((2, 4)))
    assert not isinstance(v._value, DTensor)
    assert v.value is v._value


@pytest.mark.parametrize("dtype", ["int32", "bool", "float32", "bfloat16"])
@pytest.mark.parametrize("trainable", [True, False])
def test_only_trainable_floats_ask_for_a_gradient(fake_world, dtype, trainable):
    fake_world(WORLD)
    with model_parallel({"kernel": (None, "model")}).scope():
        v = variable(np.ones((2, 4)), dtype=dtype, trainable=trainable)
    assert backend.standardize_dtype(v.dtype) == dtype
    assert sharded.local_of(v._value).shape == (2, 2)
    is_float = dtype in ("float32", "bfloat16")
    assert v._value.requires_grad == (trainable and is_float)


def test_initial_values_are_those_of_one_device(fake_world):
    initializer = initializers.GlorotUniform(seed=3)
    expected = initializer((2, 4)).detach()
    pieces = []
    for rank in (0, 1):
        fake_world(WORLD, rank)
        with model_parallel({"kernel": (None, "model")}).scope():
            v = backend.Variable(
                initializers.GlorotUniform(seed=3),
                shape=(2, 4),
                name="kernel",
            )
        pieces.append(sharded.local_of(v._value))
    torch.testing.assert_close(torch.cat(pieces, 1), expected)


@pytest.mark.parametrize("as_", ["array", "tensor", "list", "variable"])
def test_assign_takes_whole_values(fake_world, as_):
    fake_world(WORLD, rank=1)
    whole = np.arange(8.0).reshape(2, 4).astype("float32")
    with model_parallel({"kernel": (None, "model")}).scope():
        v = variable(np.zeros((2, 4)))
        stored = v._value
        v.assign(
            {
                "array": whole,
                "tensor": torch.tensor(whole),
                "list": whole.tolist(),
                "variable": variable(whole),
            }[as_]
        )
    assert v._value is stored
    assert sharded.local_of(v._value).tolist() == [[2, 3], [6, 7]]


def test_assign_of_another_shape(fake_world):
    fake_world(WORLD)
    with model_parallel({"kernel": (None, "model")}).scope():
        v = variable(np.zeros((2, 4)))
        with pytest.raises(ValueError, match="shape"):
            # The shape of our shard.
            v.assign(np.zeros((2, 2)))


def test_what_a_reader_sees(fake_world):
    fake_world(WORLD, rank=1)
    with model_parallel({"kernel": ("model", None)}).scope():
        v = variable(np.arange(8.0).reshape(2, 4))
        plain = backend.Variable(np.ones(3), name="bias")
        model_mesh = context_lib.current().model_mesh
        assert v.value is v._value
        with modes_lib.local_shards(), torch.no_grad():
            assert type(v.value) is not torch.nn.Parameter
            assert v.value.tolist() == [[4, 5, 6, 7]]
        modes.calls += 1
        try:
            with modes_lib.stored_values():
                assert v.value is v._value
            assert v.value.device_mesh is model_mesh
            assert v.value.placements == (Shard(0),)
            assert plain.value is plain._value
            with modes_lib.on_dtensors():
                assert plain.value.placements == (Replicate(),)
                assert plain.value.device_mesh is model_mesh
            with modes_lib.on_whole_weights():
                assert type(v.value) is torch.Tensor
                assert v.value.shape == (2, 4)
                assert plain.value is plain._value
        finally:
            modes.calls -= 1
    assert v.value is v._value


def test_gradient_has_the_variables_placements(fake_world):
    fake_world(WORLD, rank=1)
    with model_parallel({"kernel": (None, "model")}).scope():
        v = variable(np.ones((2, 4)))
        context = context_lib.current()
        local, placements = unshard.operand(v._value, context)
        (local * torch.tensor([[1.0, 2.0]])).sum().backward()
    assert placements == (Shard(1),)
    grad = v._value.grad
    assert isinstance(grad, DTensor)
    assert grad.placements == v._value.placements
    assert grad.shape == (2, 4)
    # The mean over two data shards, of which the fake one gave nothing.
    assert sharded.local_of(grad).tolist() == [[0.5, 1.0]] * 2


def test_repr_does_not_communicate(fake_world, monkeypatch):
    fake_world(WORLD)
    with model_parallel({"kernel": (None, "model")}).scope():
        v = variable(np.ones((2, 4)))
    monkeypatch.setattr(
        DTensor, "full_tensor", lambda self: pytest.fail("communicates")
    )
    text = repr(v)
    assert "path=kernel" in text
    assert "shape=(2, 4)" in text
    assert "Shard(dim=1)" in text
    assert "local shape=(2, 2)" in text


def test_layout_that_does_not_fit_names_the_variable(fake_world):
    fake_world(WORLD)
    with model_parallel({"kernel": (None, None, "model")}).scope():
        with pytest.raises(ValueError, match="path='kernel'.* 3 entries for 2"):
            variable(np.ones((2, 4)))


def test_half_precision_is_not_added_up_in_half_precision(on_threads):
    def run(rank):
        context = context_lib.Context(model_parallel({}, (4, 1)))
        stored = storage.parameter(
            torch.zeros(4, 1, dtype=torch.bfloat16),
            context,
            (Shard(0), Replicate()),
            True,
        )
        local, _ = unshard.operand(stored, context)
        # 256 + 1 is 256 in bfloat16, and so is the sum of all four.
        local.backward(torch.full_like(local, 1.0 if rank else 256.0))
        return stored.grad.to_local().tolist()

    assert on_threads(4, run) == [[[65.0]]] * 4


def test_layout_that_does_not_fit_in_a_layer_made_of_layers(fake_world):
    class Inner(layers.Layer):
        def build(self, shape):
            self.dense = layers.Dense(4, name="dense")
            self.dense.build(shape)

        def call(self, x):
            return self.dense(x)

    class Outer(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def call(self, x):
            return self.inner(x)

    fake_world(WORLD)
    with model_parallel({".*bias": (None, "model")}).scope():
        layer = Outer()
        layer(np.ones((2, 4), "float32"))  # Keras tries to build it, goes on.
        # Whoever builds something next finds variables that have no values.
        for _ in range(2):
            with pytest.raises(ValueError, match="2 entries for 1 dims"):
                variables.initialize_all_variables()
    # Those of the same process under a layout that fits.
    with model_parallel({".*bias": ("model",)}).scope():
        variables.initialize_all_variables()
    assert layer.inner.dense.bias._value.placements == (Replicate(), Shard(0))
