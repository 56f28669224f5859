"""Who waits for whom is said: one sleeps, is stopped, does something else.

Every program goes on after that, and ends well.
"""

import sys

import numpy as np
import pytest

import keras
from integration_tests.processes.programs import run_torchrun
from keras.src.backend.torch.distribution.mesh import watch

PROGRAM = """
import os
import signal
import subprocess
import time

import keras
import numpy as np
import torch.distributed as dist

keras.distribution.initialize()
keras.distribution.set_distribution(keras.distribution.DataParallel())
rank = dist.get_rank()
last = dist.get_world_size() - 1
model = keras.Sequential(
    [keras.Input((4,)), keras.layers.Dense(2, name="only")]
)
model.compile("sgd", "mse")
x, y = np.ones((8, 4)), np.ones((8, 2))
model.fit(x, y, verbose=0)


class Slow(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            time.sleep(14)  # in the callback


def stop_for_a_while():
    # Whoever wakes it up must not be stopped itself.
    command = f"sleep 18; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", command], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


%s
model.fit(x, y, verbose=0)
"""

SLEEPS = """
if rank == last:
    time.sleep(14)  # alone
"""

IS_STOPPED = """
if rank == last:
    stop_for_a_while()
"""

DOES_SOMETHING_ELSE = """
if rank == 0:
    weights = model.get_weights()
    model.save("m.keras")  # what the others do not
if rank:
    time.sleep(14)  # and saves later
    model.save("m.keras")
"""

IN_A_CALLBACK = """
model.fit(x, y, epochs=2, verbose=0, callbacks=[Slow()] if rank == last else [])
"""


# Name -> program, processes, the line that waits, and what the last one does.
PROGRAMS = {
    "sleeps": (SLEEPS, 4, "model.fit(x, y, verbose=0)", "# alone"),
    "is stopped": (IS_STOPPED, 2, "model.fit(x, y, verbose=0)", None),
    "does something else": (
        DOES_SOMETHING_ELSE,
        2,
        "# what the others",
        "# and saves later",
    ),
    "in a callback": (IN_A_CALLBACK, 2, "epochs=2", "# in the callback"),
}


def line_of(program, text):
    """The number of the last line that has a text: `fit` comes twice."""
    lines = program.splitlines()
    return max(i for i, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_said_once(name, tmp_path):
    program, processes, waits, others = PROGRAMS[name]
    source = (PROGRAM % program).replace("m.keras", f"{tmp_path}/m.keras")
    _, error = run_torchrun(
        tmp_path,
        source,
        processes=processes,
        KERAS_DISTRIBUTION_STALL_SECONDS="2",
    )
    # By one process.
    assert error.count("Processes have waited for others for 2 s") == 1, error
    *first, last = range(processes)
    waiting = f"process{'es' if len(first) > 1 else ''} " + ", ".join(
        map(str, first)
    )
    place = f"program.py:{line_of(source, waits)}"
    assert f"  {waiting}: waiting, {place}, in `" in error, error
    does = "not answering"
    if others is not None:
        does = f"busy, program.py:{line_of(source, others)}"
    assert f"  process {last}: {does}" in error, error


def test_place_of_a_layer():
    seen = []

    class Layer(keras.layers.Layer):
        def call(self, x):
            seen.append(watch.Place(sys._getframe()))
            return x

    model = keras.Sequential([keras.Input((2,)), Layer()])
    seen.clear()
    model.predict(np.ones((1, 2)), verbose=0)
    # The innermost line of the user's own.
    assert "waiting_test.py" in seen[-1].line
    assert not seen[-1].communicates


def test_place_of_a_call():
    places = []

    class Callback(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            frame = sys._getframe().f_back  # Keras calls it.
            places.append(watch.Place(frame, closely=True))

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(
        np.ones((4, 2)),
        np.ones((4, 1)),
        batch_size=2,
        epochs=2,
        verbose=0,
        callbacks=[Callback()],
    )
    assert places[-1].call == "fit, epoch 2, step 1"
    assert "waiting_test.py" in places[-1].line
