"""The command that runs a program on one process and on several."""

import argparse
import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from integration_tests.harness.process_set import ROOT
from keras_torch_distribution import __main__ as command
from keras_torch_distribution import compare

PROGRAM = """
import os
import sys

import keras
import numpy as np

keras.distribution.initialize()
devices = keras.distribution.list_devices()
mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), devices)
layout_map = keras.distribution.LayoutMap(mesh)
layout_map[".*up/kernel"] = (None, "model")
layout_map[".*down/kernel"] = ("model", None)
distribution = keras.distribution.ModelParallel(
    layout_map=layout_map, batch_dim_name="batch"
)


class Wrong(keras.layers.Layer):
    def call(self, x):
        return x * int(os.environ.get("WORLD_SIZE", 1))


def train():
    model = keras.Sequential([keras.layers.Dense(6, "relu", name="up")])
    model.add(keras.layers.Dropout(0.3))
    if "wrong" in sys.argv:
        model.add(Wrong())
    model.add(keras.layers.Dense(3, name="down"))
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(9, n)).astype("float32") for n in (5, 3))
    model.fit(x, y, batch_size=4, epochs=3)


if "wrong" in sys.argv:
    keras.distribution.set_distribution(distribution)
    train()
else:
    with distribution.scope():
        train()
raise AssertionError("two steps were asked for")
"""


def options(script, *arguments, **others):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    parsed = parser.parse_args([str(script), "--", *arguments])
    return types.SimpleNamespace(**{**vars(parsed), "steps": 2, **others})


@pytest.mark.parametrize("arguments", [(), ("wrong",)], ids=["same", "wrong"])
def test_a_program(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    status = compare.main(options(script, *arguments))
    said = capsys.readouterr().out
    assert status == len(arguments), said
    if arguments:
        assert "NOT the same numbers" in said
        assert "gradients of sequential/up/kernel" in said
    else:
        assert "The same numbers, to 0.0001, in 2 steps." in said


def test_a_program_that_fails(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text("raise ValueError('no data')")
    with pytest.raises(SystemExit) as ended:
        command.main(["compare", str(script)])
    assert ended.value.code == 2
    assert "ValueError: no data" in capsys.readouterr().out
    script.write_text("print('trains nothing')")
    assert compare.main(options(script, processes=1)) == 2
    assert "2 or more" in capsys.readouterr().out
    assert compare.main(options(script)) == 2
    assert "it made no update" in capsys.readouterr().out


def test_nothing_is_left_of_what_is_ended(tmp_path):
    """Workers of the launcher neither."""
    script = tmp_path / "sleeps.py"
    script.write_text(
        "import os, sys, time\n"
        "open(os.path.join(sys.path[0], f'{os.getpid()}.pid'), 'w').close()\n"
        "time.sleep(600)\n"
    )
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    process = subprocess.Popen([sys.executable, *launcher.split(), script])
    try:
        while len(pids := list(tmp_path.glob("*.pid"))) < 2:
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        compare.end_process(process)
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.stem), 0)


def a_run(loss=1.0, **arrays):
    named = {f"weights|1|{name}": np.array(x) for name, x in arrays.items()}
    return {
        "steps": 1,
        "losses": {"loss": [loss]},
        "memory": 2**20,
        "seconds": 0.1,
        "distribution": True,
        "arrays": named,
    }


@pytest.mark.parametrize(
    "other, words",
    [
        ({"kernel": [1.0, 2.0]}, "The same"),
        ({"kernel": [1.0, 2.1]}, "4.8e-02  weights of kernel"),
        ({"kernel": [1.0, np.nan]}, "inf  weights of kernel"),
        ({"kernel": [1.0]}, "shapes [(2,), (1,)]"),
        ({"bias": [1.0, 2.0]}, "weights of bias: shapes [None, (2,)]"),
        ({"kernel": [1.0, 2.0], "loss": np.nan}, "loss"),
    ],
)
def test_what_differs(other, words):
    text, same = compare.report(
        a_run(kernel=[1.0, 2.0]),
        a_run(**other),
        types.SimpleNamespace(processes=4, tolerance=1e-4),
    )
    assert words in text and same == (words == "The same")


def test_processes_that_train_alone():
    alone = {**a_run(), "distribution": False}
    text, same = compare.report(
        a_run(), alone, types.SimpleNamespace(processes=4, tolerance=1e-4)
    )
    assert not same and "trained alone" in text
