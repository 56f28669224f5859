"""Processes that end: by an error, for another attempt, beside workers."""

import os
import socket
import subprocess
import sys
import time

import pytest

LIMIT = 240

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
        print("read", batch.tolist(), flush=True)
except RuntimeError as error:
    assert "a worker that one of them has started" in str(error), error
    print("told", flush=True)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(**variables):
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "KERAS_BACKEND": "torch",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


@pytest.fixture
def torchrun(tmp_path):
    """A function that runs a program on two processes; gives its output."""

    def run(program, *options):
        path = tmp_path / "program.py"
        path.write_text(program)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--nproc-per-node", "2", "--master-port", free_port()),
                *options,
                str(path),
            ],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


@pytest.mark.parametrize("failure", ["raise KeyError('mine')", "sys.exit(3)"])
def test_a_process_that_leaves_ends_the_others(failure, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(FAILS.format(failure=failure))
    port = free_port()
    processes = [
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
    assert "Error" in other and processes[0].returncode == 1
    assert "terminate called" not in error + other


def test_another_attempt(torchrun):
    output, error = torchrun(RESTARTS, "--max-restarts", "1")
    assert output.count("trained") == 2
    assert "first attempt" in error


def test_workers_join_nothing(torchrun):
    output, _ = torchrun(WORKERS)
    assert output.count("read [0]") == 2
    assert output.count("told") == 2
