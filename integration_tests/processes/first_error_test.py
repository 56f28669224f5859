"""One process fails, leaves, is killed or stands still: the others name it and
what it failed with, within seconds, and none is left behind."""

import re

import pytest

from integration_tests.processes import forks

PROGRAM = """
import os
import signal
import sys
import threading
import time

import keras
import numpy as np
import torch
import torch.distributed as dist

WHAT, LAYOUT, CULPRIT = {what!r}, {layout!r}, {culprit}
keras.distribution.initialize()
rank, world = dist.get_rank(), dist.get_world_size()
is_it = rank == CULPRIT % world
mesh = keras.distribution.DeviceMesh(
    (world // 2, 2) if LAYOUT == "model" else (world, 1), ("batch", "model")
)
layout_map = keras.distribution.LayoutMap(mesh)
if LAYOUT == "model":
    layout_map[".*up/kernel"] = (None, "model")
    layout_map[".*down/kernel"] = ("model", None)
if LAYOUT == "fsdp":
    layout_map[".*kernel"] = ("batch", None)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layout_map)
)
keras.utils.set_random_seed(1)


class Mine(keras.layers.Layer):
    calls = 0

    def call(self, x):
        if type(x) is not keras.KerasTensor:
            Mine.calls += x.device.type == "cpu"
        if is_it and Mine.calls == 4:
            Mine.calls += 1
            do(x)
            if WHAT == "another shape":
                return keras.ops.concatenate([x, x])[: len(x)]
        return x


def do(x):
    if WHAT == "layer":
        raise ValueError("of a layer")  # here
    if WHAT == "caught":
        raise ValueError("of a kind")  # here
    if WHAT == "a thread":
        threading.Thread(target=time.sleep, args=(12,)).start()
        raise ValueError("of a thread")  # here
    if WHAT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if WHAT == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if WHAT == "exit":
        sys.exit(3)  # here
    if WHAT == "interrupt":
        raise KeyboardInterrupt  # here


class Callback(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if WHAT == "callback" and is_it and batch == 3:
            raise OSError("of a callback")  # here


def generator():
    for i in range(8):
        if WHAT in ("generator", "late") and is_it and i == 3:
            raise KeyError("of a generator")  # here
        yield x[:4], x[:4]


class Data(keras.utils.PyDataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        if is_it and i:
            raise KeyError("of a worker")  # here
        return x[:4], x[:4]


def loss(y, y_pred):
    if WHAT == "loss" and is_it and Mine.calls == 5:
        raise ValueError("of a loss")  # here
    return ((y - y_pred) ** 2).mean()


inputs = keras.Input((8,))
y = keras.layers.Dense(16, "relu", name="up")(inputs)
y = y if WHAT == "late" else Mine(name="mine")(y)
model = keras.Model(inputs, keras.layers.Dense(8, name="down")(y))
model.compile(keras.optimizers.SGD(0.1), "mse" if WHAT == "late" else loss)
x = np.ones((32, 8), "f")
Mine.calls = 0
if WHAT == "all":
    raise ValueError("of all")  # here
if WHAT == "loop":
    for step in range(8):
        if is_it and step == 3:
            raise ValueError("of a loop")  # here
        loss(torch.ones(2, 8), model(torch.ones(2, 8))).backward()  # waits
if WHAT == "before" and is_it:
    raise ValueError("of the program")  # here
if WHAT in ("generator", "late"):
    model.fit(generator(), steps_per_epoch=8, verbose=0)  # waits
elif WHAT == "worker":
    model.fit(Data(workers=2), verbose=0)  # waits
elif WHAT.startswith("no "):
    model.fit(x, x, verbose=0)
    call = {{
        "evaluate": lambda: model.evaluate(x, x, verbose=0),  # waits
        "predict": lambda: model.predict(x, verbose=0),  # waits
        "get_weights": lambda: model.get_weights(),  # waits
        "save": lambda: model.save("m.keras"),  # waits
    }}[WHAT[3:]]
    if not is_it:
        call()
else:
    try:
        how = {{"batch_size": 4, "callbacks": [Callback()], "verbose": 0}}
        model.fit(x, x, **how)  # waits
    except ValueError:
        if WHAT == "caught":
            time.sleep(9)  # sleeps
        raise
"""

LAYER = "layer mine, "
# What -> processes, layout, culprit, and what the others say of it.
RAISES = {
    "layer": (4, "whole", -1, f"ValueError: of a layer ({LAYER}@)"),
    "loss": (4, "model", 1, "ValueError: of a loss (@)"),
    "callback": (2, "whole", -1, "OSError: of a callback (@)"),
    "generator": (2, "whole", -1, "KeyError: 'of a generator' (@)"),
    # A step of Keras's own, whose logs are still being reduced.
    "late": (2, "whole", -1, "KeyError: 'of a generator' (@)"),
    "worker": (4, "fsdp", -1, "KeyError: 'of a worker'"),
    "loop": (2, "whole", 0, "ValueError: of a loop (@)"),
    "before": (4, "fsdp", 0, "ValueError: of the program (@)"),
    "exit": (2, "fsdp", -1, f"SystemExit: 3 ({LAYER}@)"),
    "interrupt": (2, "whole", -1, f"KeyboardInterrupt ({LAYER}@)"),
    # It does not go, as a thread of its own keeps it.
    "a thread": (2, "fsdp", -1, f"ValueError: of a thread ({LAYER}@)"),
}
# What torch writes from C++.
LOGGED = re.compile(r"\[rank\d+\]:\[[IWE]\d{4} ")
# What is in the line that fails, where it is not that.
MARKS = {
    "before": "of the program",
    "late": "of a generator",
    "exit": "sys.exit(3)",
    "interrupt": "KeyboardInterrupt",
    "a thread": "of a thread",
}


@pytest.fixture(scope="module")
def programs():
    running = forks.Forks()
    yield running
    running.close()


def run(programs, folder, what, processes, layout, culprit, **variables):
    """What the culprit has said, what the others have, the culprit's exit
    code, and the line that is marked."""
    program = PROGRAM.format(what=what, layout=layout, culprit=culprit)
    variables = {"KERAS_DISTRIBUTION_STALL_SECONDS": "2", **variables}
    errors, codes = programs.run(folder, program, processes, **variables)
    print("\n".join(errors))
    lines = enumerate(program.splitlines(), 1)
    marked = [
        (i, line) for i, line in lines if line.endswith(("# here", "# waits"))
    ]
    culprit %= processes
    own, code = errors.pop(culprit), codes.pop(culprit)
    # Each ended by itself, and with an error.
    assert set(codes) <= {1}, codes
    return own, errors, code, marked


def line_of(marked, text):
    return next(f"program.py:{i}" for i, line in marked if text in line)


@pytest.mark.parametrize("what", RAISES)
def test_the_first_error_is_what_all_say(what, programs, tmp_path):
    processes, layout, culprit, said = RAISES[what]
    own, others, code, marked = run(
        programs, tmp_path, what, processes, layout, culprit
    )
    mark = MARKS.get(what, f"of a {what}")
    where = line_of(marked, mark)
    said = said.replace("@", where)
    for other in others:
        assert said in other, other
        assert f"rocess {culprit % processes} " in other
        # One line, and torch's own words are not in it. (What its C++ logs
        # comes before, if it has noticed that another has gone.)
        lines = [x for x in other.splitlines() if not LOGGED.match(x)]
        assert "This process " in lines[-1], other
        assert "Traceback" not in other and "gloo" not in "".join(lines)
        assert "RuntimeError: " not in lines[-1], other
    if what == "exit":
        assert code == 3 and "Traceback" not in own
    else:
        assert code == 1 and own.count("Traceback") >= 1
        assert "failed first" not in own


def test_an_error_of_all_is_shown_by_one(programs, tmp_path):
    own, others, code, marked = run(programs, tmp_path, "all", 4, "whole", 0)
    whole = [each for each in (own, *others) if "Traceback" in each]
    assert code == 1 and len(whole) == 1
    for each in {own, *others} - set(whole):
        # Who has not begun yet when the first has failed hears of that one.
        assert re.search("ValueError: of all (\\(process |\\(program)", each)


@pytest.mark.parametrize("culprit", [0, -1])
def test_one_is_killed(culprit, programs, tmp_path):
    processes = 2 if culprit == 0 else 4
    _, others, code, _ = run(
        programs, tmp_path, "kill", processes, "whole", culprit
    )
    assert code == -9
    for other in others:
        if culprit == 0:
            # The store of the job has gone with it.
            assert "Process 0, which keeps the store" in other
        else:
            assert "Process 3 ended first, without an error of" in other
        assert other.count("Traceback") == 0


def test_one_stands_still_for_too_long(programs, tmp_path):
    _, others, code, marked = run(
        programs,
        tmp_path,
        "stop",
        4,
        "model",
        -1,
        KERAS_DISTRIBUTION_TIMEOUT="4",
    )
    assert code == forks.LEFT
    waits = line_of(marked, "**how)")
    for other in others:
        assert "waited for others for 4 s" in other
        assert "process 3: not answering" in other
        assert f"waiting, {waits}, in `fit, epoch 1, step" in other
        assert "gloo" not in other


def test_one_goes_on_after_its_error(programs, tmp_path):
    own, (other,), code, _ = run(programs, tmp_path, "caught", 2, "whole", -1)
    said = "after ValueError: of a kind (layer mine, program.py:"
    # It is told before that process ends, and when it has.
    assert "process 1: busy, program.py:" in other and said in other
    assert "Process 1 failed first: ValueError: of a kind" in other


@pytest.mark.parametrize("call", ["evaluate", "predict", "get_weights", "save"])
def test_one_leaves_out_a_call(call, programs, tmp_path):
    own, (other,), code, marked = run(
        programs, tmp_path, f"no {call}", 2, "fsdp", -1
    )
    assert code == 0 and not own
    assert "process 1 has ended, and others waited for it" in other
    assert f"stopped at {line_of(marked, f'model.{call}(')}" in other


def test_one_goes_another_way(programs, tmp_path):
    own, others, code, marked = run(
        programs,
        tmp_path,
        "another shape",
        2,
        "whole",
        -1,
        KERAS_DISTRIBUTION_TIMEOUT="5",
    )
    text = own + "".join(others)
    assert code == 1
    assert "process 0: waiting" in text and "backward, gradients of" in text
    assert "process 1: waiting" in text and "layer 'mine'" in text
    assert "all_reduce of (" in text and "all_gather of (" in text
    assert "code in it goes another way on some of them" in text
