"""Compiled steps give one device's numbers; graphs break where Keras breaks
them."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters  # Public ways to count there are none.

import keras
from integration_tests.harness import parity
from keras import layers
from keras.src.backend.torch.distribution import modes

# What torch's compiler leaves in a process stays among these.
pytestmark = [
    pytest.mark.apart,
    pytest.mark.world(2),
    pytest.mark.limit(300),
]

# The data shards have 3 and 2 rows of each batch. The first batch of a kind
# runs as written, to find out what compiled code cannot.
ROWS, BATCH = 15, 5
LAYOUTS = {
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*down/kernel": ("model", None),
}
FULLY_SHARDED = {".*kernel": ("batch", None)}
# Graphs break where Keras calls `backward`, and where its SGD reads the
# learning rate.
BACKWARD = "Unsupported Tensor.backward() call"
OPTIMIZERS = {
    "sgd": (keras.optimizers.SGD, {BACKWARD, "Data dependent operator"}),
    "adam": (keras.optimizers.Adam, {BACKWARD}),
}
# What is traced is the same for each compiler, and tracing is most of the time:
# torch's default one, of C++, has one turn, without the headers of vector
# instructions.
AOT = {"backend": "aot_eager"}
INDUCTOR = {"options": {"cpp.simdlen": 1}}
DISTRIBUTIONS = {
    "data": ("sgd", AOT, lambda: keras.distribution.DataParallel()),
    "model": ("adam", INDUCTOR, lambda: parity.model_parallel((1, 2), {})),
}
CUT = {
    "model": lambda: parity.model_parallel((1, 2), LAYOUTS),
    "data": lambda: parity.model_parallel((2, 1), FULLY_SHARDED),
}


def make_model(optimizer="sgd", jit_compile=True):
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, "tanh", name="up"),
            layers.Dense(3, name="down"),
        ]
    )
    optimizer = OPTIMIZERS[optimizer][0](0.1)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    return model


@contextlib.contextmanager
def compiler(settings):
    """Within it, Keras's `jit_compile=True` means this compiler."""
    released = torch.compile
    torch.compile = functools.partial(released, **settings)
    try:
        yield
    finally:
        torch.compile = released


def program(model):
    torch.compiler.reset()
    counters.clear()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 5)).astype("float32")
    y = rng.standard_normal((ROWS, 3)).astype("float32")
    history = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    pieces = {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": {
            reason.partition("\n")[0] for reason in counters["graph_break"]
        },
    }
    return history.history, pieces


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_training(name):
    optimizer, settings, distribution = DISTRIBUTIONS[name]
    make = functools.partial(make_model, optimizer)
    expected = parity.run(program, lambda: make(jit_compile=False))
    with compiler(settings):
        actual = parity.run(program, make, distribution())
    actual["said"], pieces = actual["said"]
    expected["said"], _ = expected["said"]
    assert pieces["graphs"]
    assert pieces["breaks"] == OPTIMIZERS[optimizer][1]
    parity.assert_equal_on_all(name, actual, expected)


@pytest.mark.parametrize("name", CUT)
def test_weights_that_are_cut(name, caplog):
    """The compiler does not trace them: the step runs as written, and says
    so."""
    expected = parity.run(program, lambda: make_model(jit_compile=False))
    with caplog.at_level("WARNING", "keras.distribution"):
        actual = parity.run(program, make_model, CUT[name]())
    actual["said"], pieces = actual["said"]
    expected["said"], _ = expected["said"]
    parity.assert_equal_on_all(name, actual, expected)
    assert not pieces["graphs"]
    is_first = torch.distributed.get_rank() == 0
    assert caplog.text.count("`jit_compile=True` has no effect") == is_first


def test_cut_weights_cost_nothing_where_compilation_is_asked_for(monkeypatch):
    """Cross-entropy writes over its one tensor, as without `jit_compile`."""
    entered = []
    released = modes.running_backward_once

    def running_backward_once():
        entered.append(True)
        return released()

    monkeypatch.setattr(modes, "running_backward_once", running_backward_once)
    with CUT["model"]().scope():
        model = make_model()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, jit_compile=True)
        x, y = np.ones((ROWS, 5)), np.arange(ROWS) % 3
        model.fit(x, y, batch_size=BATCH, verbose=0)
    assert len(entered) == ROWS // BATCH
