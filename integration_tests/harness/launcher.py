"""Runs marked tests on several processes, each item a result of its own.

pytest collects as ever. For each world size one set of processes is started,
as torchrun would start them, and is sent case after case; a module that is
marked as `apart` has a set of its own. A set in which a
rank failed, died or hung may be out of step: it is killed, and the next case
gets a fresh one.

The sets run at the same time, and beside this process's own tests: processes
that wait for each other leave cores idle. Each has a thread of this process.
What it gives is reported when pytest comes to the item, in pytest's order.
"""

import os
import time
from concurrent import futures

import pytest

from integration_tests import simulated_gpu
from integration_tests.harness import rank_report
from integration_tests.harness import worlds
from integration_tests.harness.process_set import ProcessSet

STARTS = 2


class Launcher:
    """The pytest plugin that has the marked items run, and reports them."""

    def __init__(self, config):
        self.config = config
        # Tests of this process may change it while a set is started.
        self.variables = dict(os.environ)
        self.worlds = None
        self.results = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        if self.worlds is None:
            self.begin(item.session.items)
        if worlds.world_of(item) is None or worlds.lacks_gpu(item):
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = self.results.pop(item).result()
        for report in reports:
            hook.pytest_runtest_logreport(report=report)
        if self.config.option.capture == "no":
            self.show(reports)
        hook.pytest_runtest_logfinish(
            nodeid=item.nodeid, location=item.location
        )
        return True

    def pytest_sessionfinish(self):
        for world in (self.worlds or {}).values():
            world.end()

    def begin(self, items):
        """Has all marked items run, those of a world size one by one."""
        # Made by the first who asks, which is no matter for threads.
        self.config._tmp_path_factory.getbasetemp()
        self.worlds = {}
        by_kind = {}
        for item in items:
            size = worlds.world_of(item)
            if size is not None and not worlds.lacks_gpu(item):
                kind = size, worlds.needs_gpu(item), worlds.apart(item)
                by_kind.setdefault(kind, []).append(item)
        if by_kind and self.config.getoption("simulate_gpu", False):
            folder = self.config._tmp_path_factory.mktemp("gpu")
            try:
                device = simulated_gpu.build(folder)
            except RuntimeError as error:
                pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
            self.variables[simulated_gpu.VARIABLE] = str(device)
        for kind, own in by_kind.items():
            size, on_gpu, _ = kind
            world = World(self.config, self.variables, size, on_gpu, own)
            self.worlds[kind] = world
            self.results |= world.begin()

    def show(self, reports):
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        for report in reports:
            for title, text in report.sections:
                reporter.write_sep("-", title)
                reporter.write(text)


class World:
    """The items of one world size, run in order by a thread.

    Args:
        config: pytest's.
        variables: dict, the environment that the processes are to have.
        size: int, how many processes.
        on_gpu: bool, whether they see the GPUs of this machine.
        items: list of pytest items.
    """

    def __init__(self, config, variables, size, on_gpu, items):
        if not on_gpu:
            # gloo and the CPU, also on a machine with GPUs.
            variables = {**variables, "CUDA_VISIBLE_DEVICES": ""}
        self.config, self.variables = config, variables
        self.size, self.items = size, items
        self.processes = None
        self.is_over = False
        # How often in a row no set came up.
        self.failed_starts = 0
        self.thread = futures.ThreadPoolExecutor(max_workers=1)

    def begin(self):
        """Starts to run all items.

        Returns:
            `{item: future}` of the items' reports.
        """
        return {
            item: self.thread.submit(self.run, item, following)
            for item, following in zip(self.items, [*self.items[1:], None])
        }

    def run(self, item, nextitem):
        """The reports of an item."""
        if self.failed_starts >= STARTS:
            return rank_report.failed(
                item,
                "setup",
                f"The {self.size} processes did not start {STARTS} times: see "
                "the failures before this one.",
            )
        began = time.monotonic()
        if self.processes is None:
            self.start()
        started = time.monotonic()
        if self.processes.started:
            self.failed_starts = 0
            # Tells the processes which fixtures the next case keeps.
            self.processes.run(
                item.nodeid,
                None if nextitem is None else nextitem.nodeid,
                worlds.limit_of(item),
            )
        else:
            self.failed_starts += 1
        reports = rank_report.merge(
            item, self.processes, time.monotonic() - started
        )
        reports[0].duration += started - began
        if nextitem is None:
            self.leave("stop" if self.processes.in_step else "kill")
        elif not self.processes.in_step:
            self.leave("kill")
        return reports

    def start(self):
        self.processes = ProcessSet(
            self.size,
            self.variables,
            self.config._tmp_path_factory.mktemp(f"world{self.size}-"),
            [*sorted({str(item.path) for item in self.items}), *self.options()],
            lambda data: self.config.hook.pytest_report_from_serializable(
                config=self.config, data=data
            ),
        )
        if self.is_over:
            self.processes.signal_end()
        self.processes.start()

    def options(self):
        """The options of the processes' pytest: those that still matter."""
        config = self.config
        options = [
            # What a rank writes goes to its files.
            "--capture=no",
            # The launcher's, such as those that choose or list tests.
            "--override-ini=addopts=",
            "-pno:cacheprovider",
            f"--rootdir={config.rootpath}",
            f"--import-mode={config.getoption('importmode')}",
            f"--tb={config.getoption('tbstyle')}",
            f"--verbosity={config.getoption('verbose')}",
        ]
        if config.inipath is not None:
            options.append(f"--config-file={config.inipath}")
        if config.getoption("showlocals"):
            options.append("--showlocals")
        for warning in config.getoption("pythonwarnings") or []:
            options.append(f"-W{warning}")
        return options

    def leave(self, how):
        """Ends the set: how is "stop" or "kill"."""
        processes, self.processes = self.processes, None
        getattr(processes, how)()

    def end(self):
        """Ends what runs, also in the middle: pytest was stopped or is done."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.is_over = True
        processes = self.processes
        if processes is not None:
            # The thread sees them die, and ends the case.
            processes.signal_end()
        self.thread.shutdown()
        if self.processes is not None:
            self.leave("kill")
