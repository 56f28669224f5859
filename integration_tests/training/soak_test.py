"""Training keeps nothing of its steps: resident memory stays where it is."""

import ctypes
import gc
import os
import pathlib
import sys

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops

# More: `SOAK_STEPS=20000 pytest integration_tests/training/soak_test.py`.
STEPS = int(os.environ.get("SOAK_STEPS", 1000))
WARM_UP = 100
ROWS, WIDTH = 32, 48

TENSOR_PARALLEL = {
    ".*up.*kernel": (None, "model"),
    ".*up.*bias": ("model",),
    ".*down.*kernel": ("model", None),
    ".*(query|key|value)/kernel": (None, "model", None),
    ".*attention_output/kernel": ("model", None, None),
}
SEQUENCE_PARALLEL = {
    **TENSOR_PARALLEL,
    ".*down.*/output": ("batch", "model", None),
    ".*norm.*/output": ("batch", "model", None),
}
FSDP = {
    ".*(up|down)/kernel": ("batch", None),
    ".*(query|key|value|attention_output)/kernel": ("batch", None, None),
    ".*gamma": ("batch",),
}


class Cosine(keras.losses.Loss):
    """A user's loss: in its step, code sees the global batch."""

    def call(self, y_true, y_pred):
        y_pred = y_pred / ops.sqrt(ops.mean(y_pred**2) + 1e-3)
        return ops.mean((y_true - y_pred) ** 2)


def make_model(loss):
    inputs = x = keras.Input((4, WIDTH))
    attention = layers.MultiHeadAttention(2, 8, name="attention")
    x = layers.LayerNormalization(name="norm")(x)
    x = x + layers.Dropout(0.1)(attention(x, x))
    y = layers.Dense(2 * WIDTH, "gelu", name="up")(x)
    x = x + layers.Dense(WIDTH, name="down")(y)
    model = keras.Model(inputs, x)
    model.compile("adam", loss, metrics=["mae"])
    return model


class Memory(keras.callbacks.Callback):
    """MiB resident in this process, after some of the batches."""

    def __init__(self, after):
        super().__init__()
        self.after, self.seen = after, []

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 in self.after:
            self.seen.append(resident())


def resident():
    gc.collect()
    # What is free but not given back is no leak.
    ctypes.CDLL(None).malloc_trim(0)
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(
    sys.platform != "linux", reason="resident memory is read from /proc"
)
@pytest.mark.world(2)
@pytest.mark.limit(120 + STEPS // 5)
@pytest.mark.parametrize(
    "shape, layouts, loss",
    [
        pytest.param((2, 1), {}, "mse", id="data_parallel"),
        pytest.param((1, 2), TENSOR_PARALLEL, "mse", id="tensor_parallel"),
        pytest.param((1, 2), SEQUENCE_PARALLEL, "mse", id="sequence_parallel"),
        pytest.param((2, 1), FSDP, "mse", id="fsdp"),
        pytest.param((2, 1), {}, Cosine(), id="user_code"),
    ],
)
def test_memory_after_many_steps(shape, layouts, loss):
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    distribution = parity.model_parallel(shape, layouts)
    x = np.random.default_rng(0).standard_normal((ROWS, 4, WIDTH))
    memory = Memory({WARM_UP, STEPS})

    def batches():
        while True:
            yield x, x

    with distribution.scope():
        model = make_model(loss)
        model.fit(
            batches(), steps_per_epoch=STEPS, verbose=0, callbacks=[memory]
        )
    for early, late in everyone.gather(memory.seen):
        assert late <= 1.02 * early, f"{early:.0f} MiB, then {late:.0f}"
