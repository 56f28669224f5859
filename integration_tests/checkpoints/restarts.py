"""A job whose processes are killed at random ends as an undisturbed one does.

`python -m integration_tests.checkpoints.restarts --kills 20` starts one with
`torchrun --max-restarts`, kills one of its processes again and again, at a
random moment, and compares the weights at its end, bit for bit. With `--fewer`
the job is killed as a whole in between, and goes on with one process less.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from integration_tests.processes.programs import environment
from integration_tests.processes.programs import free_port

PROGRAM = '''
import os
import pathlib
import sys
import time

import numpy as np

import keras

folder, epochs, kind = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rate = float(sys.argv[4])
keras.utils.set_random_seed(1)
keras.distribution.initialize()
devices = keras.distribution.list_devices()
mesh = keras.distribution.DeviceMesh((len(devices), 1), ["batch", "model"])
layouts = keras.distribution.LayoutMap(mesh)
layouts[".*hidden/kernel"] = ("batch", None)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )
)
model = keras.Sequential(
    [
        keras.Input((8,)),
        keras.layers.Dense(64, "tanh", name="hidden"),
        keras.layers.Dropout(rate),
        keras.layers.Dense(1),
    ]
)
model.compile(keras.optimizers.Adam(0.001), "mse")
rng = np.random.default_rng(0)
x = rng.standard_normal((38, 8)).astype("float32")


class Shows(keras.callbacks.Callback):
    """Tells that this attempt trains, and as which process."""

    said = False

    def on_train_batch_end(self, batch, logs=None):
        if not self.said:
            self.said = True
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            name = f"{os.environ['TORCHELASTIC_RUN_ID']}-{attempt}"
            path = folder / f"{name}-{os.environ['RANK']}"
            path.with_suffix(".new").write_text(str(os.getpid()))
            path.with_suffix(".new").rename(path)
        time.sleep(0.005)


if kind == "sharded":
    keep = keras.callbacks.ShardedCheckpoint(
        folder / "checkpoints", save_freq=3, max_to_keep=2, verbose=1
    )
else:
    keep = keras.callbacks.BackupAndRestore(
        folder / "backup", delete_checkpoint=False
    )
model.fit(
    x,
    x.sum(1, keepdims=True),
    batch_size=8,
    epochs=epochs,
    verbose=0,
    callbacks=[Shows(), keep],
)
weights = model.get_weights()
if keras.distribution.list_devices() and int(os.environ["RANK"]) == 0:
    np.savez(folder / "weights.npz", *weights)
'''


class Job:
    """A job of torchrun.

    Args:
        folder: path, of its files.
        processes: int.
        restarts: int, how often its processes may be started again.
        epochs, kind, rate: of the program.
    """

    def __init__(
        self, folder, processes=2, restarts=0, epochs=10, kind="sharded", rate=0
    ):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(exist_ok=True)
        self.processes = processes
        self.id = f"{random.getrandbits(32):08x}"
        path = self.folder / "program.py"
        path.write_text(PROGRAM)
        self.output = (self.folder / f"{self.id}.log").open("w+")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--nproc-per-node", str(processes)),
                *("--rdzv-backend", "c10d", "--rdzv-id", self.id),
                *("--rdzv-endpoint", f"127.0.0.1:{free_port()}"),
                *("--max-restarts", str(restarts)),
                *("--monitor-interval", "0.1"),
                *(str(path), str(folder), str(epochs), kind, str(rate)),
            ],
            env=environment(),
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def pids(self, attempt, patience=300):
        """The processes of an attempt, when all of them train.

        Returns None if the job ends before.
        """
        paths = [
            self.folder / f"{self.id}-{attempt}-{rank}"
            for rank in range(self.processes)
        ]
        end = time.monotonic() + patience
        while not all(path.exists() for path in paths):
            if self.process.poll() is not None:
                return None
            if time.monotonic() > end:
                raise TimeoutError(f"No attempt {attempt}: {self.said()}")
            time.sleep(0.02)
        return [int(path.read_text()) for path in paths]

    def kill(self):
        """Kills the launcher and all that it has started."""
        if self.process.poll() is None:
            for attempt in range(100):
                for rank in range(self.processes):
                    path = self.folder / f"{self.id}-{attempt}-{rank}"
                    if path.exists():
                        _kill(int(path.read_text()))
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, patience=600):
        """Waits for its end. Returns its exit code and what it has said."""
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return code, self.said()

    def finish(self):
        """Waits for its end, and kills what is left of it. Returns its
        weights."""
        try:
            code, said = self.wait()
        finally:
            self.kill()
        if code:
            raise RuntimeError(f"The job failed: {said}")
        return self.weights()

    def said(self):
        return (self.folder / f"{self.id}.log").read_text()

    def weights(self):
        with np.load(self.folder / "weights.npz") as file:
            return [file[name] for name in file.files]


def _kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run_killed(folder, kills, seed, longest=0.5, **options):
    """Runs a job and kills one of its processes so many times.

    Returns its weights.
    """
    rng = random.Random(seed)
    job = Job(folder, restarts=kills, **options)
    try:
        for attempt in range(kills):
            pids = job.pids(attempt)
            if pids is None:
                raise RuntimeError(
                    f"The job ended after {attempt} of {kills} kills: "
                    f"{job.said()}"
                )
            time.sleep(rng.uniform(0, longest))
            _kill(rng.choice(pids))
        return job.finish()
    finally:
        job.kill()


def largest_difference(actual, expected):
    return max(
        float(np.abs(a - b).max() / max(1e-2, np.abs(b).max()))
        for a, b in zip(actual, expected)
    )


def run_with_fewer(folder, processes=2, **options):
    """Runs a job that is killed, and goes on with one process less, until one
    is left."""
    while processes > 1:
        job = Job(folder, processes=processes, **options)
        try:
            if job.pids(0) is None:
                raise RuntimeError(f"The job ended too early: {job.said()}")
            time.sleep(0.3)
        finally:
            job.kill()
        processes -= 1
    return undisturbed(folder, processes=1, **options)


def undisturbed(folder, **options):
    return Job(folder, **options).finish()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=("sharded", "backup"), default=None)
    parser.add_argument("--fewer", action="store_true")
    arguments = parser.parse_args()
    # A job ends with the command that has started it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    kinds = [arguments.kind] if arguments.kind else ["sharded", "backup"]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            options = {
                "processes": arguments.processes,
                # Enough to be killed so many times.
                "epochs": 20 + 15 * arguments.kills,
                "kind": kind,
                "rate": 0.0 if arguments.fewer else 0.1,
            }
            root = pathlib.Path(folder) / kind
            expected = undisturbed(f"{root}-whole", **options)
            began = time.monotonic()
            if arguments.fewer:
                actual = run_with_fewer(f"{root}-fewer", **options)
                what, allowed = "killed, with a process less each time", 1e-6
            else:
                actual = run_killed(
                    f"{root}-killed", arguments.kills, arguments.seed, **options
                )
                what, allowed = f"{arguments.kills} kills", 0.0
            difference = largest_difference(actual, expected)
            wrong += difference > allowed
            print(
                f"{kind}: {what} in {time.monotonic() - began:.0f} s, weights "
                f"differ by {difference:.1e}",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
