"""Layouts of outputs: sequence parallelism by a layout map alone.

Between the tensor-parallel layers of a block, norms, dropout and additions
run on shards of the sequence (Korthikanti et al., 2022).
"""

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import keras
from integration_tests.harness import parity
from keras import layers

ROWS, LENGTH, WIDTH = 4, 8, 8
KERNELS = {
    ".*column_./kernel": (None, "model"),
    ".*column_./bias": ("model",),
    ".*row_./kernel": ("model", None),
}
SEQUENCE = ("batch", "model", None)
OUTPUTS = {".*(tokens|norm_.|row_.|drop_.|add_.)/output": SEQUENCE}
TOKENS = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) * 5 % 9
TARGETS = np.random.default_rng(0).normal(size=(ROWS, LENGTH, 3)).astype("f")


def make_model():
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(9, WIDTH, name="tokens")(inputs)
    for i in range(2):
        y = layers.LayerNormalization(name=f"norm_{i}")(x)
        y = layers.Dense(12, "gelu", name=f"column_{i}")(y)
        y = layers.Dense(WIDTH, name=f"row_{i}")(y)
        y = layers.Dropout(0.0, name=f"drop_{i}")(y)
        x = layers.Add(name=f"add_{i}")([x, y])
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


class ByHand(keras.Model):
    """The same by `distribute_tensor`, where there is a distribution."""

    def __init__(self):
        super().__init__()
        self.tokens = layers.Embedding(9, WIDTH)
        self.norm = layers.LayerNormalization(name="norm_0")
        self.column = layers.Dense(12, "gelu", name="column_0")
        self.row = layers.Dense(WIDTH, name="row_0")
        self.head = layers.Dense(3, name="head")

    def call(self, x):
        x = on_sequence(self.tokens(x))
        y = on_sequence(self.row(self.column(self.norm(x))))
        return self.head(x + y)


def on_sequence(x):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return x
    return keras.distribution.distribute_tensor(
        x,
        keras.distribution.TensorLayout(SEQUENCE, distribution.device_mesh),
    )


@pytest.mark.world(2, 4)
@pytest.mark.parametrize("make", [make_model, ByHand])
def test_sequence_parallelism_gives_the_same_numbers(make, world_size):
    outputs = OUTPUTS if make is make_model else {}
    distribution = parity.model_parallel(
        (world_size // 2, 2), KERNELS | outputs
    )
    parity.assert_parity(make, TOKENS, TARGETS, distribution)


def kept_for_backward(layouts):
    """Bytes of activations that a forward pass keeps on this process."""
    kept = {}

    def keep(x):
        local = x.to_local() if isinstance(x, DTensor) else x
        storage = local.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with parity.model_parallel((1, 2), layouts).scope():
        model = make_model()
        model(TOKENS)
        weights = set()
        for v in model.variables:
            local = v._value
            local = local.to_local() if isinstance(local, DTensor) else local
            weights.add(local.untyped_storage().data_ptr())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outputs = model(TOKENS)
        assert outputs.shape == (ROWS, LENGTH, 3)
    return sum(size for at, size in kept.items() if at not in weights)


@pytest.mark.world(2, 4)
@pytest.mark.parametrize(
    "layout", [(None, "model"), ("batch", "model"), ("model", None)], ids=str
)
def test_predictions_are_whole(layout, world_size):
    """What becomes arrays: of all rows, and of all of each."""

    def make():
        model = keras.Sequential([keras.Input((5,))])
        model.add(layers.Dense(4, name="head"))
        model.compile("sgd", "mse")
        return model

    def program(model):
        x = np.arange(35, dtype="float32").reshape(7, 5)
        model.fit(x, x[:, :4], batch_size=4, verbose=0)
        said = model.predict(x, batch_size=4, verbose=0)
        return said, model.predict_on_batch(x[:6])

    expected = parity.run(program, make)
    distribution = parity.model_parallel(
        (world_size // 2, 2), {".*head/output": layout}
    )
    actual = parity.run(program, make, distribution)
    parity.assert_equal_on_all("predictions", actual, expected)


@pytest.mark.world(2)
def test_sequence_parallelism_keeps_less():
    whole, shards = (
        kept_for_backward(KERNELS),
        kept_for_backward(KERNELS | OUTPUTS),
    )
    assert shards < 0.9 * whole, (shards, whole)
