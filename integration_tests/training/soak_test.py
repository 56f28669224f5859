"""Training keeps nothing: no memory of its steps, and of its models no open
files, threads or process groups."""

import ctypes
import gc
import os
import pathlib
import sys

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops

# In full, as CONTRIBUTING says: SOAK_STEPS=2000 SOAK_TIMES=50.
STEPS = int(os.environ.get("SOAK_STEPS", 120))
TIMES = int(os.environ.get("SOAK_TIMES", 8))
WARM_UP = STEPS // 10
# The fewer the steps, the larger what each of them would leave behind.
ROWS, WIDTH = max(32, 32 * 1000 // STEPS), 48

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
    """MiB resident in this process, and its objects, after some batches."""

    def __init__(self, after):
        super().__init__()
        self.after, self.seen = after, []

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 in self.after:
            self.seen.append((resident(), len(gc.get_objects())))


def resident():
    gc.collect()
    # What is free but not given back is no leak.
    ctypes.CDLL(None).malloc_trim(0)
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Held:
    """What this process has open.

    Collective: every process makes one.
    """

    def __init__(self):
        gc.collect()
        # All take part in what is under way, and it has ended.
        dist.barrier()
        me = pathlib.Path("/proc/self")
        self.files = sorted(map(_target, (me / "fd").iterdir()))
        self.threads = len(list((me / "task").iterdir()))
        self.groups = len(distributed_c10d._world.pg_map)

    def __eq__(self, other):
        return vars(self) == vars(other)

    def __repr__(self):
        return str(vars(self))


def _target(link):
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return "the folder that was listed"


def batches():
    x = np.random.default_rng(0).standard_normal((ROWS, 4, WIDTH))
    while True:
        yield x, x


WAYS = {
    "data_parallel": ((2, 1), {}, "mse"),
    "tensor_parallel": ((1, 2), TENSOR_PARALLEL, "mse"),
    "sequence_parallel": ((1, 2), SEQUENCE_PARALLEL, "mse"),
    "fsdp": ((2, 1), FSDP, "mse"),
    "user_code": ((2, 1), {}, Cosine()),
}

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux", reason="what is held is read from /proc"
    ),
    pytest.mark.world(2),
    pytest.mark.limit(120 + STEPS // 2 + 20 * TIMES),
    # pytest keeps each of them.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("way", WAYS)
def test_memory_after_many_steps(way):
    shape, layouts, loss = WAYS[way]
    memory = Memory({WARM_UP, STEPS})
    with parity.fresh(parity.model_parallel(shape, layouts), 3):
        model = make_model(loss)
        model.fit(
            batches(), steps_per_epoch=STEPS, verbose=0, callbacks=[memory]
        )
    for (early, before), (late, after) in everyone.gather(memory.seen):
        assert late <= 1.02 * early, f"{early:.0f} MiB, then {late:.0f}"
        # Not one in four steps.
        assert after - before <= (STEPS - WARM_UP) // 4, (before, after)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_held_after_many_fits_and_models(way):
    shape, layouts, loss = WAYS[way]
    held = []
    with parity.fresh(parity.model_parallel(shape, layouts), 3):
        model = make_model(loss)
        for i in range(1 + TIMES):
            model.fit(batches(), steps_per_epoch=2, verbose=0)
            if i in (0, TIMES):
                held.append(Held())
    # Each under a distribution of its own.
    for i in range(TIMES):
        with parity.fresh(parity.model_parallel(shape, layouts), 3):
            model = make_model(loss)
            model.fit(batches(), steps_per_epoch=2, verbose=0)
            model.predict(next(batches())[0], verbose=0)
            if i in (0, TIMES - 1):
                held.append(Held())
    first, *others = held
    for other in others:
        assert other == first
