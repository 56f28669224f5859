"""What one process does alone, behind `if process_id() == 0:`, is done where it
needs nobody, and is an error that says what to change where it does.

The others do what comes next, leave, or wait in a step for the one that is
away. Nobody waits for longer than seconds, and no number is mixed up.
"""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch.distributed as dist

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from integration_tests.processes import programs
from keras import layers
from keras.src.backend.torch.distribution.mesh import meeting

in_two = pytest.mark.world(2)

WHOLE = {}
CUT = {".*kernel": ("batch", None)}
X = np.random.default_rng(0).standard_normal((7, 4)).astype("float32")
QUIET = {"batch_size": 3, "verbose": 0}


@pytest.fixture(params=["whole", "cut"])
def model(request):
    layouts = CUT if request.param == "cut" else WHOLE
    with parity.fresh(parity.model_parallel((2, 1), layouts), 5):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
        model.compile("sgd", "mse", metrics=["mae"])
        model.fit(X, X, **QUIET)
        model.is_cut = bool(layouts)
        yield model


def fit(model, callbacks=()):
    return model.fit(X, X, callbacks=list(callbacks), **QUIET).history


def assert_in_step(model):
    """After what went wrong, all go on, with equal numbers."""
    history = fit(model)
    first = everyone.gather([history, model.get_weights()])[0]
    parity.assert_same([history, model.get_weights()], first, tolerance=0)


def alone_and_then(first, then, process=0):
    """What all say of a call that one process makes, and of the next."""
    if dist.get_rank() == process:
        try:
            first()
        except Exception as error:
            return everyone.gather(f"{type(error).__name__}: {error}")
    return everyone.outcomes(then)


def assert_all_are_told(outcomes, *words):
    assert len(set(outcomes)) == 1, outcomes
    for word in ("different places", "every process", *words):
        assert word in outcomes[0], outcomes


CALLS = {
    "evaluate": lambda model: model.evaluate(X, X, **QUIET),
    "predict": lambda model: model.predict(X, **QUIET),
    "predict_on_batch": lambda model: model.predict_on_batch(X),
    "train_on_batch": lambda model: model.train_on_batch(X, X),
    "test_on_batch": lambda model: model.test_on_batch(X, X),
}


@in_two
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("process", [0, 1])
def test_what_takes_all_is_told_at_once(name, process, model):
    start = time.monotonic()
    outcomes = alone_and_then(
        lambda: CALLS[name](model), lambda: fit(model), process
    )
    what = "a prediction" if name == "predict_on_batch" else f"`{name}`"
    assert_all_are_told(outcomes, f"process {process}: in {what}", "`fit`")
    assert time.monotonic() - start < 10
    assert_in_step(model)


READS = {
    "norm": lambda w: keras.ops.norm(w),
    "sum": lambda w: keras.ops.sum(w),
    "torch's": lambda w: w.value.mean(),
}


@in_two
@pytest.mark.parametrize("name", READS)
def test_a_number_of_a_weight(name, model):
    """What all have, one may ask for; what is cut is told at once."""
    kernel = model.trainable_variables[0]
    start = time.monotonic()
    outcomes = alone_and_then(lambda: READS[name](kernel), lambda: fit(model))
    if model.is_cut:
        assert_all_are_told(outcomes, "0: weights that are read", "`fit`")
    else:
        assert outcomes == ["done"] * 2
    assert time.monotonic() - start < 10
    assert_in_step(model)


@in_two
def test_steps_meet_once(model, monkeypatch):
    """A loop of a program's own waits for nothing."""
    met = []
    meet = meeting.meet
    monkeypatch.setattr(
        meeting, "meet", lambda *args, **k: met.append(args) or meet(*args, **k)
    )
    for _ in range(3):
        model.train_on_batch(X, X)
        model.test_on_batch(X, X)
        float(keras.ops.norm(model.trainable_variables[0]))
    assert [place for place, *_ in met] == ["in `train_on_batch`"]


@in_two
@pytest.mark.parametrize("kind", ["m.keras", "m.weights.h5", "get_weights"])
def test_a_save(kind, model, tmp_path):
    path = everyone.gather(str(tmp_path / kind))[0]
    before = model.get_weights()
    got = []

    def save():
        if kind == "get_weights":
            got.extend(model.get_weights())
        elif kind == "m.keras":
            model.save(path)
        else:
            model.save_weights(path)

    outcomes = alone_and_then(save, lambda: fit(model))
    if model.is_cut:
        # It takes what the others store.
        what = "weights that are read" if kind == "get_weights" else "saving"
        assert_all_are_told(outcomes, what, "`fit`")
        assert not (tmp_path / kind).exists()
        assert_in_step(model)
        return
    assert outcomes == ["done"] * 2
    assert_in_step(model)
    if kind != "get_weights":
        # Of before, whatever the others did since.
        model.load_weights(path)
        got = model.get_weights()
    if got:
        parity.assert_same(got, before, tolerance=0)


@in_two
def test_a_save_by_one_that_does_not_write(model, tmp_path):
    outcomes = alone_and_then(
        lambda: model.save(tmp_path / "m.keras"), lambda: fit(model), process=1
    )
    assert_all_are_told(outcomes, "saving", "`fit`")
    assert_in_step(model)


class Alone(keras.callbacks.Callback):
    """Does something at the end of each epoch, on one process."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_epoch_end(self, epoch, logs=None):
        if dist.get_rank() == 0:
            self.function(self.model)


@in_two
def test_a_save_in_a_callback(model, tmp_path):
    path = everyone.gather(str(tmp_path / "m.keras"))[0]
    expected = everyone.gather(fit(model))[0]
    callback = Alone(lambda model: model.save(path))
    found = everyone.outcomes(lambda: fit(model, [callback]))
    if model.is_cut:
        assert_all_are_told(found, "saving in `on_epoch_end`")
    else:
        assert found == ["done"] * 2 and len(expected)
        assert_in_step(model)
        # And one that one process alone has.
        callbacks = [callback] if dist.get_rank() == 0 else []
        assert everyone.outcomes(lambda: fit(model, callbacks)) == found
    assert_in_step(model)


@in_two
@pytest.mark.parametrize("name", CALLS)
def test_what_takes_all_in_a_callback(name, model):
    callback = Alone(CALLS[name])
    outcomes = everyone.outcomes(lambda: fit(model, [callback]))
    assert_all_are_told(outcomes, "`on_epoch_end`")
    assert_in_step(model)


PROGRAM = """
import os
import sys
import time

import keras
import numpy as np
import torch
import torch.distributed as dist

keras.distribution.initialize()
devices = keras.distribution.list_devices()
mesh = keras.distribution.DeviceMesh((2, 1), ("batch", "model"), devices)
layout_map = keras.distribution.LayoutMap(mesh)
if "cut" in sys.argv:
    layout_map[".*kernel"] = ("batch", None)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layout_map)
)
rank = dist.get_rank()
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
model.compile("sgd", "mse")
x, y = np.ones((8, 4), "f"), np.ones((8, 2), "f")
model.fit(x, y, verbose=0)
start = time.monotonic()
if rank == 0:
    try:
        model.save("m.keras")
    finally:
        print("saved after", time.monotonic() - start)
if "loop" in sys.argv:
    for _ in range(3):
        loss = ((model(x[rank::2]) - torch.tensor(y[rank::2])) ** 2).mean()
        loss.backward()
    model.fit(x, y, verbose=0)
    weights = [w.tolist() for w in model.get_weights()]
    # In one piece: two processes write.
    sys.stdout.write(f"weights {weights}\\n")
"""


@pytest.mark.parametrize(
    "cut, then", [("whole", "ends"), ("whole", "loop"), ("cut", "loop")]
)
def test_a_save_while_the_others_go_on(cut, then, tmp_path):
    """They leave, or wait in backward for this one."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", "2", "--master-port", programs.free_port()),
            *("program.py", cut, then),
        ],
        cwd=tmp_path,
        env=programs.environment(KERAS_DISTRIBUTION_STALL_SECONDS="6"),
        capture_output=True,
        text=True,
        timeout=programs.LIMIT,
    )
    (said,) = [x for x in done.stdout.splitlines() if "saved after" in x]
    assert float(said.split()[-1]) < 60
    is_saved = (tmp_path / "m.keras").exists()
    if cut == "whole":
        assert done.returncode == 0, done.stderr
        assert is_saved
        if then == "loop":
            assert "goes on without the others" in done.stderr
            lines = [x for x in done.stdout.splitlines() if "weights" in x]
            assert len(lines) == 2 and len(set(lines)) == 1
        return
    assert done.returncode and not is_saved
    assert "must be called by every process" in done.stderr
    assert "(saving)" in done.stderr
