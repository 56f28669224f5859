"""Runs test after test on all processes, in lockstep.

A test that fails alike on all of them leaves them in step, where they meet at a
barrier after it. Where one fails and another does not, they have made different
variables, say. Such a set, and one whose processes do not meet, is killed, and
the next test gets a fresh one.
"""

import dataclasses
import os
import pathlib
import shutil
import time

from integration_tests.harness import worlds
from integration_tests.harness.process_set import GRACE_SECONDS
from integration_tests.harness.process_set import ProcessSet
from integration_tests.harness.process_set import RankProcess
from integration_tests.harness.process_set import State
from integration_tests.keras_suite import same_folders

COLLECT_SECONDS = 120
STARTS = 3
# Keeps torch from loading the patch.
RELEASED = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@dataclasses.dataclass
class Result:
    """What came of one test.

    Attributes:
        nodeid: its id, from the root of the source tree.
        outcome: "passed", "failed", "skipped" or "hung".
        error: string, in one line.
        text: string, tracebacks, stacks and output.
        seconds: float.
    """

    nodeid: str
    outcome: str
    error: str = ""
    text: str = ""
    seconds: float = 0.0

    @property
    def is_bad(self):
        return self.outcome in ("failed", "hung")


class SuiteRank(RankProcess):
    module = "integration_tests.keras_suite.worker"

    @property
    def failed(self):
        return any(report["outcome"] == "failed" for report in self.reports)

    @property
    def in_step(self):
        # A test that fails may well fail alike on all processes.
        return (
            self.state is State.DONE and self.joined and self.step_error is None
        )

    @property
    def outcome(self):
        """How the test ended here: "failed", "skipped", "passed" or ""."""
        outcomes = [report["outcome"] for report in self.reports]
        for outcome in ("failed", "skipped", "passed"):
            if outcome in outcomes:
                return outcome
        return ""

    def receive(self, read_report):
        try:
            kind, *content = self.connection.recv()
        except (EOFError, OSError):
            self.state = State.DIED
            return
        self.state = State.DONE
        if kind == "reports":
            (self.reports,) = content
        elif kind == "collected":
            self.ids, self.collect_errors = content
        elif kind == "met":
            self.step_error, self.joined = content


class SuiteSet(ProcessSet):
    """The processes, which run one test file after the other."""

    rank_class = SuiteRank

    def send(self, message):
        for rank in self.ranks:
            rank.send(message)

    def collect(self, file):
        """Has all processes collect a file."""
        self.limit = COLLECT_SECONDS
        for rank in self.ranks:
            rank.begin()
            rank.ids, rank.collect_errors = [], []
        self.send(file)
        self._gather(self.limit)

    def run(self, nodeid, next_nodeid, limit):
        self.limit = limit
        for rank in self.ranks:
            rank.begin()
        self.send((nodeid, next_nodeid))
        self._gather(limit)
        if all(rank.state is State.DONE for rank in self.ranks):
            self.send("meet")
            self._gather(worlds.MEET_SECONDS + GRACE_SECONDS)

    @property
    def is_fit(self):
        """Whether the processes may run another test."""
        return self.in_step and len({r.outcome for r in self.ranks}) == 1

    def result(self, nodeid, seconds):
        """Merges what the processes said of a test."""
        outcomes = [rank.outcome for rank in self.ranks]
        errors = [self._error_of(rank) for rank in self.ranks]
        error = next((e for e in errors if e), "")
        if any(rank.state is State.WAITING for rank in self.ranks):
            # One that failed and left the others waiting has the reason.
            outcome = "failed" if "failed" in outcomes else "hung"
            where = [
                rank.rank for rank in self.ranks if rank.state is State.WAITING
            ]
            error = f"{error} [processes {where} wait]"
        elif "failed" in outcomes or not self.in_step:
            outcome = "failed"
            different = len(set(outcomes)) > 1
            if different:
                error = f"{error} [by process: {', '.join(outcomes)}]"
        elif len(set(outcomes)) > 1:
            outcome = "failed"
            error = f"the processes differ: {', '.join(outcomes)}"
        else:
            outcome = outcomes[0] or "failed"
            if outcome == "skipped":
                error = self.ranks[0].reports[-2]["error"] or error
        text = ""
        if outcome in ("failed", "hung"):
            text = "\n".join(self._text_of(rank) for rank in self.ranks)
        return Result(nodeid, outcome, error.strip(), text, seconds)

    def _error_of(self, rank):
        if rank.state is State.DIED:
            return f"process {rank.rank} ended by itself"
        for report in rank.reports:
            if report["outcome"] == "failed":
                return report["error"]
        if rank.step_error is not None:
            return rank.step_error
        if not rank.joined:
            return f"process {rank.rank} has left the others"
        return ""

    def _text_of(self, rank):
        parts = [f"==== process {rank.rank}: {rank.state.value}"]
        parts += [report["text"] for report in rank.reports if report["text"]]
        parts += [rank.stack] if rank.stack else []
        for name, content in rank.output().items():
            if content:
                parts.append(f"---- {name}\n{content[-12000:]}")
        return "\n".join(parts)


class Driver:
    """Runs files of tests.

    Args:
        tests: path of the copied tests.
        size: int, how many processes.
        distribution: name of the distribution, or `"released"`.
        limit: seconds after which a test counts as hung.
        folder: path of an empty folder.
        tell: function that is handed each `Result`.
    """

    def __init__(self, tests, size, distribution, limit, folder, tell):
        self.tests, self.size = str(tests), size
        self.distribution, self.limit = distribution, limit
        self.folder, self.tell = pathlib.Path(folder), tell
        self.processes = None
        self.sets = 0

    def run(self, files):
        """Runs test files.

        Args:
            files: dict from a file to the ids of its tests that are to run,
                or None for all.

        Returns:
            List of `Result`s.
        """
        results = []
        try:
            for file, chosen in files.items():
                for result in self._run_file(file, chosen):
                    self.tell(result)
                    results.append(result)
        finally:
            self._leave()
        return results

    def _run_file(self, file, chosen):
        ids, error = self._collect(file)
        if error:
            yield Result(file, "failed", *error)
            return
        if chosen is not None:
            ids = [nodeid for nodeid in ids if nodeid in chosen]
        for nodeid, following in zip(ids, [*ids[1:], None]):
            if self.processes is None:
                _, error = self._collect(file)
                if error:
                    yield Result(nodeid, "failed", *error)
                    continue
            began = time.monotonic()
            self.processes.run(nodeid, following, self.limit)
            yield self.processes.result(nodeid, time.monotonic() - began)
            same_folders.remove(self.shared, nodeid)
            if not self.processes.is_fit:
                self._leave()
        if self.processes is not None:
            self.processes.send(None)

    def _collect(self, file):
        """The ids of a file's tests, and what went wrong: line and text."""
        if self.processes is None:
            self._start()
        processes = self.processes
        processes.collect(file)
        texts = [
            text for rank in processes.ranks for text in rank.collect_errors
        ]
        lists = [rank.ids for rank in processes.ranks]
        error = None
        if not processes.in_step:
            error = (
                "the file was not collected",
                "\n".join(processes._text_of(rank) for rank in processes.ranks),
            )
            self._leave()
        elif texts:
            lines = [line for line in texts[0].splitlines() if line.strip()]
            error = lines[-1].strip(), texts[0]
        elif any(ids != lists[0] for ids in lists):
            error = "the processes collected different tests", ""
        if error and self.processes is not None:
            self.processes.send(None)
        return lists[0], error

    def _start(self):
        variables = dict(os.environ)
        # gloo and the CPU, also on a machine with GPUs.
        variables["CUDA_VISIBLE_DEVICES"] = ""
        # Tests named after what a set gives are collected alike.
        variables["PYTHONHASHSEED"] = "0"
        if self.distribution == "released":
            variables |= RELEASED
        for _ in range(STARTS):
            self.sets += 1
            folder = self.folder / f"set{self.sets}"
            folder.mkdir(parents=True)
            self.processes = SuiteSet(
                self.size,
                variables,
                folder,
                [self.tests, self.distribution],
                None,
            )
            self.shared = folder
            self.processes.start()
            if self.processes.started:
                return
            text = "\n".join(
                self.processes._text_of(rank) for rank in self.processes.ranks
            )
            self._leave()
        raise RuntimeError(
            f"The {self.size} processes did not start {STARTS} times:\n{text}"
        )

    def _leave(self):
        processes, self.processes = self.processes, None
        if processes is not None:
            processes.kill()
            shutil.rmtree(self.shared, ignore_errors=True)
