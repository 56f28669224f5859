"""Runs marked tests on several processes, each item a result of its own.

pytest collects as ever. For each world size one set of processes is started,
as torchrun would start them, and is sent case after case. A set in which a
rank failed, died or hung may be out of step: it is killed, and the next case
gets a fresh one.
"""

import time

import pytest

from integration_tests import rank_report
from integration_tests import worlds
from integration_tests.process_set import ProcessSet

STARTS = 2


class Launcher:
    """The pytest plugin that runs the marked items."""

    def __init__(self, config):
        self.config = config
        self.processes = None
        self.world = None
        # For each world size, how often in a row no set came up.
        self.failed_starts = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        if worlds.world_of(item) is None:
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        try:
            reports = self.run(item, nextitem)
        except BaseException:
            # An interrupt leaves the ranks anywhere.
            self.end("kill")
            raise
        for report in reports:
            hook.pytest_runtest_logreport(report=report)
        if self.config.option.capture == "no":
            self.show(reports)
        hook.pytest_runtest_logfinish(
            nodeid=item.nodeid, location=item.location
        )
        return True

    def pytest_sessionfinish(self):
        self.end("stop")

    def run(self, item, nextitem):
        """The reports of an item."""
        world = worlds.world_of(item)
        if self.failed_starts.get(world, 0) >= STARTS:
            return rank_report.failed(
                item,
                "setup",
                f"The {world} processes did not start {STARTS} times: see "
                "the failures before this one.",
            )
        began = time.monotonic()
        if self.processes is None or self.world != world:
            self.start(item.session, world)
        started = time.monotonic()
        if self.processes.started:
            self.failed_starts[world] = 0
            # Tells the processes which fixtures the next case keeps.
            same = nextitem is not None and worlds.world_of(nextitem) == world
            self.processes.run(
                item.nodeid,
                nextitem.nodeid if same else None,
                worlds.limit_of(item),
            )
        else:
            self.failed_starts[world] = self.failed_starts.get(world, 0) + 1
        reports = rank_report.merge(
            item, self.processes, time.monotonic() - started
        )
        reports[0].duration += started - began
        if not self.processes.in_step:
            self.end("kill")
        return reports

    def start(self, session, world):
        self.end("stop")
        paths = {
            str(item.path)
            for item in session.items
            if worlds.world_of(item) == world
        }
        self.world = world
        folder = self.config._tmp_path_factory.mktemp(f"world{world}-")
        self.processes = ProcessSet(
            world,
            folder,
            [*sorted(paths), *self.options()],
            lambda data: self.config.hook.pytest_report_from_serializable(
                config=self.config, data=data
            ),
        )

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

    def show(self, reports):
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        for report in reports:
            for title, text in report.sections:
                reporter.write_sep("-", title)
                reporter.write(text)

    def end(self, how):
        """Ends the set, if there is one: how is "stop" or "kill"."""
        processes, self.processes = self.processes, None
        if processes is not None:
            getattr(processes, how)()
