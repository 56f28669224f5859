"""The processes of one world size, as the launcher holds them."""

import enum
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import connection

from integration_tests.harness import worlds

ROOT = pathlib.Path(__file__).parents[2]
GRACE_SECONDS = 5
START_SECONDS = 180
STOP_SECONDS = 10


class State(enum.Enum):
    """Where a rank is, for the launcher."""

    BUSY = "has not answered yet"
    DONE = "answered"
    WAITING = "did not answer in time"
    DIED = "ended"


class RankProcess:
    """One rank's process, with what it said and wrote in this case."""

    # What it runs.
    module = "integration_tests.harness.worker"

    def __init__(self, rank, world, port, variables, folder, arguments):
        self.rank = rank
        self.world = world
        self.paths = {
            name: folder / f"rank{rank}.{name}"
            for name in ("stdout", "stderr", "stacks")
        }
        self.connection, theirs = connection.Pipe()
        settings = {
            "connection": theirs.fileno(),
            "parent": os.getpid(),
            "stacks": str(self.paths["stacks"]),
            "arguments": arguments,
        }
        with (
            open(self.paths["stdout"], "wb") as stdout,
            open(self.paths["stderr"], "wb") as stderr,
        ):
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    self.module,
                    json.dumps(settings),
                ],
                cwd=ROOT,
                env=environment(rank, world, port, variables, folder),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[theirs.fileno()],
                # A group of its own, so that it ends with its children.
                start_new_session=True,
            )
        theirs.close()
        self.begin()

    def begin(self):
        """Forgets the case before."""
        self.state = State.BUSY
        self.reports = []
        self.step_error = None
        self.joined = True
        self.stack = ""
        self.offsets = {
            name: path.stat().st_size
            for name, path in self.paths.items()
            if name != "stacks"
        }

    @property
    def failed(self):
        return any(report.failed for report in self.reports)

    @property
    def in_step(self):
        """Whether this rank may run another case after this one."""
        raised = any(
            # An expected failure is one, too.
            report.failed or (report.skipped and hasattr(report, "wasxfail"))
            for report in self.reports
        )
        return (
            self.state is State.DONE
            and self.joined
            and self.step_error is None
            and not raised
        )

    def send(self, message):
        self.state = State.BUSY
        try:
            self.connection.send(message)
        except OSError:
            self.state = State.DIED

    def receive(self, read_report):
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            self.state = State.DIED
            return
        self.state = State.DONE
        if kind == "reports":
            self.reports = [read_report(data) for data in content[0]]
        elif kind == "met":
            self.step_error, self.joined = content

    def output(self):
        """What was written in this case: a text for stdout and stderr."""
        texts = {}
        for name, offset in self.offsets.items():
            with open(self.paths[name], "rb") as file:
                file.seek(offset)
                texts[name] = file.read().decode(errors="replace")
        return texts

    def ask_for_stack(self):
        before = self.paths["stacks"].stat().st_size
        os.killpg(self.process.pid, 0)
        self.process.send_signal(signal.SIGUSR1)
        return before

    def read_stack(self, before):
        """The stack written since `before`, once it is all there."""
        size = before
        for _ in range(20):
            time.sleep(0.05)
            last, size = size, self.paths["stacks"].stat().st_size
            if size == last > before:
                break
        with open(self.paths["stacks"], "rb") as file:
            file.seek(before)
            return file.read().decode(errors="replace")

    def signal_end(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def kill(self):
        self.signal_end()
        self.process.wait()
        self.connection.close()


class ProcessSet:
    """The processes of one world size.

    Args:
        world: int, how many.
        variables: dict, the environment of the launcher.
        folder: an empty folder, for what they write.
        arguments: list of strings, the arguments of their pytest.
        read_report: function that turns a report as sent into a report.
    """

    rank_class = RankProcess

    def __init__(self, world, variables, folder, arguments, read_report):
        self.read_report = read_report
        self.started = False
        port = free_port()
        self.ranks = [
            self.rank_class(rank, world, port, variables, folder, arguments)
            for rank in range(world)
        ]

    def start(self):
        """Waits until all have joined each other."""
        self.limit = START_SECONDS
        self._gather(self.limit)
        self.started = self.in_step

    @property
    def in_step(self):
        return all(rank.in_step for rank in self.ranks)

    def run(self, nodeid, next_nodeid, limit):
        """Runs a case on every rank, and leaves the outcome in `ranks`."""
        self.limit = limit
        for rank in self.ranks:
            rank.begin()
            rank.send((nodeid, next_nodeid))
        self._gather(limit)
        if not self.in_step:
            return
        for rank in self.ranks:
            rank.send("meet")
        # The processes themselves give up before that.
        self._gather(worlds.MEET_SECONDS + GRACE_SECONDS)

    def _gather(self, limit):
        """Waits for an answer of every rank.

        Once a rank failed, the others get a moment to fail as well: they may
        wait for it forever.
        """
        deadline = time.monotonic() + limit
        busy = {
            rank.connection: rank
            for rank in self.ranks
            if rank.state is State.BUSY
        }
        if len(busy) < len(self.ranks):
            deadline = time.monotonic() + GRACE_SECONDS
        while busy:
            left = max(deadline - time.monotonic(), 0)
            answered = connection.wait(list(busy), timeout=left)
            if not answered:
                break
            for each in answered:
                rank = busy.pop(each)
                rank.receive(self.read_report)
                if not rank.in_step:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        waiting = list(busy.values())
        # All are asked before one is read: they change little in between.
        sizes = [rank.ask_for_stack() for rank in waiting]
        for rank, size in zip(waiting, sizes):
            rank.state = State.WAITING
            rank.stack = rank.read_stack(size)

    def stop(self):
        """Lets the processes end by themselves, if they can."""
        for rank in self.ranks:
            rank.send(None)
        deadline = time.monotonic() + STOP_SECONDS
        for rank in self.ranks:
            left = max(deadline - time.monotonic(), 0)
            try:
                rank.process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self):
        for rank in self.ranks:
            rank.kill()

    def signal_end(self):
        """Has all die, while another thread may wait for them."""
        for rank in self.ranks:
            rank.signal_end()


def environment(rank, world, port, variables, folder):
    """The environment that torchrun would give to a rank."""
    variables = {
        **variables,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "KERAS_BACKEND": "torch",
        "PYTHONUNBUFFERED": "1",
        worlds.FOLDER_VARIABLE: str(folder),
    }
    # Meant for the pytest of the launcher.
    variables.pop("PYTEST_ADDOPTS", None)
    variables.pop("PYTEST_CURRENT_TEST", None)
    return variables


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
