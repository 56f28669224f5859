"""Processes that end: by an error, for another attempt, beside workers."""

import os
import subprocess
import sys
import time

import pytest

from integration_tests.processes.programs import LIMIT
from integration_tests.processes.programs import environment
from integration_tests.processes.programs import free_port
from integration_tests.processes.programs import run_torchrun

FAILS = """
import sys
import time

import keras
import torch
import torch.distributed as dist

keras.distribution.initialize()
keras.distribution.set_distribution(keras.distribution.DataParallel())
dist.barrier()
if dist.get_rank() == 1:
    {failure}
dist.all_reduce(torch.ones(1))
"""

RESTARTS = """
import os

import keras
import numpy as np

keras.distribution.initialize()
keras.distribution.set_distribution(keras.distribution.DataParallel())
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    raise KeyError("first attempt")
print("trained", flush=True)
"""

WORKERS = """
import os

import keras
import torch

keras.distribution.initialize()


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        assert len(keras.distribution.list_devices()) == 2
        if index:
            keras.distribution.initialize()
        return index


loader = torch.utils.data.DataLoader(
    Data(), num_workers=1, multiprocessing_context="fork"
)
try:
    for batch in loader:
        # One write: the lines of two processes do not mix.
        os.write(1, f"read {batch.tolist()}\\n".encode())
except RuntimeError as error:
    assert "a worker that one of them has started" in str(error), error
    print("told", flush=True)
"""

# What is registered first is called last. Threads of libraries in C++ are
# known to the operating system alone.
ENDS = """
import atexit
import collections
import os


def threads():
    names = collections.Counter()
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{{task}}/comm") as file:
            names[file.read().strip()] += 1
    return {{n: c for n, c in names.items() if "gloo" in n}}


def show(when):
    os.write(1, f"{{when}} with {{threads()}}\\n".encode())


atexit.register(show, "left")

import keras
import numpy as np
from keras import ops

keras.distribution.initialize()
mesh = keras.distribution.DeviceMesh({shape}, ["batch", "model"])
layouts = keras.distribution.LayoutMap(mesh)
layouts[".*kernel"] = (None, "model")
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layouts)
)


class Centered(keras.layers.Layer):
    def call(self, x):
        return x - ops.mean(ops.sort(x, axis=0), axis=0)


inputs = keras.Input((4,))
x = keras.layers.Dense(6)(inputs)
x = keras.layers.BatchNormalization()(Centered()(x))
model = keras.Model(inputs, keras.layers.Dense(2)(x))
model.compile("sgd", "mse", metrics=["mae"])
model.fit(np.ones((5, 4)), np.ones((5, 2)), verbose=0)
kept = model.predict(np.ones((3, 4)), verbose=0), model.get_weights()
show("ends")
"""


def start_two(folder, program):
    """Two processes of a program, without a launcher that keeps their store."""
    path = folder / "program.py"
    path.write_text(program)
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(path)],
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("failure", ["raise KeyError('mine')", "sys.exit(3)"])
def test_a_process_that_leaves_ends_the_others(failure, tmp_path):
    processes = start_two(tmp_path, FAILS.format(failure=failure))
    try:
        _, error = processes[1].communicate(timeout=LIMIT)
        began = time.monotonic()
        _, other = processes[0].communicate(timeout=60)
        assert time.monotonic() - began < 30
    finally:
        for process in processes:
            process.kill()
    if "raise" in failure:
        assert "KeyError: 'mine'" in error and processes[1].returncode == 1
    else:
        assert processes[1].returncode == 3
    assert "AnotherFailed: " in other and processes[0].returncode == 1
    for unexpected in ("terminate called", "Exception ignored"):
        assert unexpected not in error + other


def test_another_attempt(tmp_path):
    output, error = run_torchrun(tmp_path, RESTARTS, "--max-restarts", "1")
    assert output.count("trained") == 2
    assert "first attempt" in error


def test_workers_join_nothing(tmp_path):
    output, _ = run_torchrun(tmp_path, WORKERS)
    assert output.count("read [0]") == 2
    assert output.count("told") == 2


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"),
    reason="the threads of C++ libraries are read from /proc",
)
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_no_thread_outlives_its_process_group(shape, tmp_path):
    output, _ = run_torchrun(tmp_path, ENDS.format(shape=shape))
    assert output.count("ends with {'gloo") == 2, output
    assert output.count("left with {}") == 2, output


def test_nothing_is_said_where_one_leaves_first(tmp_path):
    program = FAILS.format(failure="pass")
    processes = []
    for first in range(2):
        later = f"if dist.get_rank() != {first}:\n    time.sleep(4)\n"
        folder = tmp_path / str(first)
        folder.mkdir()
        processes += start_two(folder, program + later)
    try:
        for process in processes:
            _, error = process.communicate(timeout=LIMIT)
            assert process.returncode == 0 and not error
    finally:
        for process in processes:
            process.kill()
