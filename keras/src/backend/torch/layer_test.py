import torch

from keras.src import layers
from keras.src import models
from keras.src.backend.torch.distribution.layers import execution
from keras.src.distribution.distribution_lib import DataParallel
from keras.src.distribution.distribution_lib import DeviceMesh
from keras_torch_distribution.src.backend.torch import layer as overlay


def test_overlay_is_in_place():
    assert issubclass(layers.Layer, overlay.TorchLayer)


def test_forward_hooks_without_a_distribution(no_world):
    layer = layers.Dense(2, kernel_initializer="ones")
    seen = []
    layer.register_forward_pre_hook(lambda *args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, y: y + 1)
    y = layer(torch.ones(1, 3))
    assert seen == ["pre"]
    assert y.tolist() == [[4.0, 4.0]]
    assert layer.forward(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]


def test_no_layer_is_touched_without_a_distribution(no_world, monkeypatch):
    monkeypatch.setattr(
        execution, "call", lambda *args: (_ for _ in ()).throw(AssertionError)
    )
    model = models.Sequential([layers.Input((3,)), layers.Dense(2)])
    assert model(torch.ones(1, 3)).shape == (1, 2)


def test_each_layer_runs_under_a_distribution(fake_world, monkeypatch):
    fake_world(2)
    called = []
    call = execution.call

    def logged(layer, *args):
        called.append(layer.name)
        return call(layer, *args)

    monkeypatch.setattr(execution, "call", logged)
    mesh = DeviceMesh((2,), ["batch"], ["cpu:0", "cpu:1"])
    with DataParallel(device_mesh=mesh).scope():
        model = models.Sequential(
            [layers.Input((3,)), layers.Dense(2, name="dense")], name="model"
        )
        called.clear()
        hooked = []
        model.layers[0].register_forward_hook(lambda *args: hooked.append(True))
        y = model(torch.ones(1, 3))
    assert called[0] == "model"
    assert called.count("dense") == 1
    assert hooked == [True]
    assert type(y) is torch.Tensor
