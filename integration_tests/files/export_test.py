"""What `model.export` writes is one device's model, written once."""

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import keras
from integration_tests import simulated_gpu
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers

pytestmark = [pytest.mark.world(2), pytest.mark.limit(90)]

LAYOUTS = {
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*down/kernel": ("model", None),
    ".*words/embeddings": ("model", None),
    ".*head/kernel": ("batch", None),
}


def make_model():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 6, name="words")(inputs)
    x = layers.Dense(8, "gelu", name="up")(x)
    x = layers.BatchNormalization()(layers.Dense(6, name="down")(x))
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling1D()(x))
    model = keras.Model(inputs, layers.Dense(4, name="head")(x))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def data():
    rng = np.random.default_rng(2)
    x = rng.integers(0, 9, (7, 5)).astype("int32")
    return x, rng.standard_normal((7, 4)).astype("float32")


@simulated_gpu.needs_storages
@pytest.mark.parametrize("shape", [None, (1, 2), (2, 1)])
def test_export(shape, tmp_path, rank, capfd):
    x, y = data()
    path = tmp_path / "model.pt2"
    distribution = keras.distribution.DataParallel()
    if shape is not None:
        distribution = parity.model_parallel(shape, LAYOUTS)
    with distribution.scope():
        model = make_model()
        model.fit(x, y, batch_size=4, verbose=0)
        stored = [v._value for v in model.variables]
        before = dict(model.named_parameters())
        model.export(path, format="torch", verbose=True)
        # The model is as it was, and goes on.
        assert keras.distribution.distribution() is distribution
        assert all(v._value is s for v, s in zip(model.variables, stored))
        after = dict(model.named_parameters())
        assert before.keys() == after.keys()
        assert all(before[name] is after[name] for name in before)
        expected = model.predict(x[:1], verbose=0)
        weights = {
            v.path: keras.ops.convert_to_numpy(v) for v in model.variables
        }
        model.train_on_batch(x, y)
    said = everyone.gather(capfd.readouterr().out.count("Saved PyTorch"))
    assert said == [1, 0]
    exported = torch.export.load(path)
    x = keras.ops.convert_to_tensor(x[:1])
    parity.assert_same(exported.module()(x).detach().numpy(), expected)
    # What torch finds while it traces is whole and plain.
    found = {
        name.rpartition("_torch_params.")[2]: value
        for name, value in exported.state_dict.items()
    }
    assert found.keys() == weights.keys()
    for name, value in found.items():
        assert not isinstance(value, DTensor)
        parity.assert_same(value.detach().numpy(), weights[name])


@simulated_gpu.needs_storages
def test_export_of_a_sequential(tmp_path, rank):
    """Torch finds its weights in the functional model that it makes, too."""
    x = np.ones((1, 5), "float32")
    with parity.model_parallel((1, 2), LAYOUTS).scope():
        model = keras.Sequential([layers.Dense(8, name="up"), layers.Dense(3)])
        expected = model.predict(x, verbose=0)
        names = [name for name, _ in model.named_parameters()]
        assert any(name.startswith("_functional.") for name in names)
        model.export(tmp_path / "model.pt2", format="torch")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    x = keras.ops.convert_to_tensor(x)
    parity.assert_same(exported(x).detach().numpy(), expected)


def test_errors(tmp_path):
    """Of a model that cannot be traced, all processes hear."""

    class Untraceable(layers.Layer):
        def call(self, x):
            return x * float(x.sum())

    with parity.model_parallel((1, 2), LAYOUTS).scope():
        inputs = keras.Input((4,))
        outputs = Untraceable()(layers.Dense(4, name="up")(inputs))
        model = keras.Model(inputs, outputs)
        outcomes = everyone.outcomes(
            lambda: model.export(tmp_path / "model.pt2", format="torch")
        )
    assert all("Failed to export" in outcome for outcome in outcomes)
