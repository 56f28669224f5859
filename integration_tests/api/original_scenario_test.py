"""The scenario that this patch was asked for, as one job of two processes."""

import logging

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers

pytestmark = pytest.mark.world(2)

# What the processes ended with before there was this patch.
OLD_ERRORS = (
    "Only Tensors of floating point and complex dtype can require gradients",
    "got mixed torch.Tensor and DTensor",
)
LAYOUTS = {".*kernel": (None, "model"), ".*bias": ("model",)}
LOCAL_SHAPES = {
    "up/kernel": (128, 256),
    "up/bias": (256,),
    "middle/kernel": (512, 128),
    "middle/bias": (128,),
    "down/kernel": (256, 64),
    "down/bias": (64,),
    "out/kernel": (128, 5),
    "out/bias": (5,),
}


@pytest.fixture(autouse=True)
def no_old_error(capfd):
    yield
    written = "".join(capfd.readouterr())
    for message in OLD_ERRORS:
        assert message not in written


def small_model():
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def large_model():
    return keras.Sequential(
        [
            keras.Input((128,)),
            layers.Dense(512, activation="relu", name="up"),
            layers.Dense(256, activation="relu", name="middle"),
            layers.Dense(128, activation="relu", name="down"),
            layers.Dense(10, name="out"),
        ]
    )


def data(features):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, features)).astype("float32")
    y = rng.standard_normal((32, 10)).astype("float32")
    return x, y


def fit(make_model, distribution=None):
    """A model, and the losses of three epochs of one batch."""
    with parity.fresh(distribution, 3):
        model = make_model()
        model.compile(keras.optimizers.Adam(), loss="mse")
        x, y = data(model.input_shape[-1])
        history = model.fit(x, y, batch_size=32, epochs=3, verbose=0)
    return model, history.history["loss"]


def assert_trains_alike(losses, expected):
    assert len(losses) == 3
    assert losses[2] < losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert everyone.gather(losses) == [losses] * 2


def test_device_detection(rank):
    devices = keras.distribution.list_devices("cpu")
    assert devices == ["cpu:0", "cpu:1"]
    assert keras.distribution.get_device_count("cpu") == 2
    data_parallel = keras.distribution.DataParallel()
    assert data_parallel.num_processes == 2
    assert data_parallel.num_model_replicas == 2
    assert everyone.gather(data_parallel.data_shard_id) == [0, 1]


def test_data_parallel():
    _, expected = fit(small_model)
    distribution = keras.distribution.DataParallel()
    model, losses = fit(small_model, distribution)
    assert_trains_alike(losses, expected)
    assert distribution.device_mesh.backend_mesh.ndim == 1
    for variable in model.trainable_variables:
        assert not isinstance(variable.value, DTensor)
    weights = model.get_weights()
    for other in everyone.gather(weights):
        for mine, theirs in zip(weights, other):
            np.testing.assert_array_equal(mine, theirs)


def test_model_parallel():
    _, expected = fit(large_model)
    distribution = parity.model_parallel((1, 2), LAYOUTS)
    model, losses = fit(large_model, distribution)
    assert_trains_alike(losses, expected)

    mesh = distribution.device_mesh.backend_mesh
    assert mesh.ndim == 2
    assert tuple(mesh.shape) == (1, 2)
    assert tuple(mesh.mesh_dim_names) == ("batch", "model")
    for variable in model.trainable_variables:
        assert isinstance(variable.value, torch.nn.Parameter)
        assert variable.value.device_mesh is mesh
        dim = variable.ndim - 1
        assert variable.value.placements == (Replicate(), Shard(dim))
    stored = {
        variable.path.partition("/")[2]: local_shape(variable)
        for variable in model.trainable_variables
    }
    # On every process, and no more memory than that behind it.
    assert everyone.gather(stored) == [LOCAL_SHAPES] * 2
    for variable in model.trainable_variables:
        local = variable.value.to_local()
        storage = local.untyped_storage().nbytes()
        assert storage == local.numel() * local.element_size()


def local_shape(variable):
    return tuple(variable.value.to_local().shape)


def test_gradient_flow():
    model, _ = fit(large_model)
    whole = {
        variable.name + str(i): variable.value.grad
        for i, variable in enumerate(model.trainable_variables)
    }
    model, _ = fit(large_model, parity.model_parallel((1, 2), LAYOUTS))
    reached = {}
    for i, variable in enumerate(model.trainable_variables):
        value, grad = variable.value, variable.value.grad
        assert grad.placements == value.placements
        assert grad.to_local().shape == value.to_local().shape
        reached[variable.path.partition("/")[2]] = bool(
            grad.to_local().abs().max() > 0
        )
        # The first gradient that Adam has not touched would be exact; these
        # come after two of its steps.
        expected = whole[variable.name + str(i)]
        torch.testing.assert_close(
            grad.full_tensor(), expected, rtol=1e-3, atol=1e-5
        )
    all_reached = dict.fromkeys(LOCAL_SHAPES, True)
    assert everyone.gather(reached) == [all_reached] * 2


def test_debug_log(caplog):
    with caplog.at_level(logging.DEBUG, logger="keras.distribution"):
        model, _ = fit(large_model, parity.model_parallel((1, 2), LAYOUTS))
    messages = [
        record.getMessage()
        for record in caplog.records
        if record.name == "keras.distribution"
    ]
    for variable in model.trainable_variables:
        message = next(
            m for m in messages if m.startswith(f"variable {variable.path}:")
        )
        assert f"global shape {tuple(variable.shape)}" in message
        assert f"placements {variable.value.placements}" in message
        assert f"local shape {local_shape(variable)}" in message
    # Inputs and outputs of each layer: rows, then features.
    shapes = {
        "up": ("(32, 128)", "(32, 512)"),
        "middle": ("(32, 512)", "(32, 256)"),
        "down": ("(32, 256)", "(32, 128)"),
        "out": ("(32, 128)", "(32, 10)"),
    }
    for layer in model.layers:
        message = next(
            m for m in messages if m.startswith(f"layer {layer.path} ")
        )
        inputs, outputs = message.split(" -> ")
        assert shapes[layer.name][0] in inputs
        assert shapes[layer.name][1] in outputs


def test_no_log_at_the_default_level(caplog):
    fit(large_model, parity.model_parallel((1, 2), LAYOUTS))
    assert not [r for r in caplog.records if r.name == "keras.distribution"]
