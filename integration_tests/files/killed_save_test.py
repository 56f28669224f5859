"""A process that is killed while all save leaves the file that was there, or of
several files the whole set."""

import subprocess
import sys

import numpy as np
import pytest

import keras
from integration_tests.processes.programs import LIMIT
from integration_tests.processes.programs import environment
from integration_tests.processes.programs import free_port

PROGRAM = """
import os
import signal
import sys

import keras
import numpy as np

from keras.src.distribution import hdf5

path, moment = sys.argv[1:]
keras.distribution.initialize()
mesh = keras.distribution.DeviceMesh(
    (1, 2), ("batch", "model"), keras.distribution.list_devices()
)
layouts = keras.distribution.LayoutMap(mesh)
layouts[".*kernel"] = (None, "model")
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )
)
model = keras.Sequential(
    [keras.Input((100,)), *(keras.layers.Dense(100) for _ in range(3))]
)


def save(value):
    model.set_weights([np.full_like(w, value) for w in model.get_weights()])
    if path.endswith(".json"):
        model.save_weights(path, max_shard_size=5e-5)
    elif path.endswith(".keras"):
        model.save(path)
    else:
        model.save_weights(path)


def killed_at(function, count):
    calls = []

    def call(*args):
        calls.append(0)
        if len(calls) == count:
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return call


save(1.0)
if os.environ["RANK"] == "0":
    if moment == "write":
        hdf5.Holding.write = killed_at(hdf5.Holding.write, 4)
    else:
        os.replace = killed_at(os.replace, 2)
save(2.0)
"""


@pytest.mark.parametrize(
    "name, moment",
    [("m.keras", "write"), ("m.weights.json", "move")],
)
def test_killed_in_a_save(name, moment, tmp_path):
    program, path = tmp_path / "program.py", tmp_path / "files" / name
    program.write_text(PROGRAM)
    path.parent.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", "2", "--master-port", free_port()),
            *(str(program), str(path), moment),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode and "killed" in done.stdout, done.stderr
    model = keras.Sequential(
        [keras.Input((100,)), *(keras.layers.Dense(100) for _ in range(3))]
    )
    if name.endswith(".keras"):
        model = keras.models.load_model(path)
    else:
        model.load_weights(path)
    for weight in model.get_weights():
        np.testing.assert_array_equal(weight, np.ones_like(weight))
    # What was being written lies beside it.
    folders = [each for each in path.parent.iterdir() if each.is_dir()]
    assert len(folders) == 1
