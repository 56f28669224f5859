"""The process of one rank, which runs the cases that the launcher sends.

It is a pytest of its own: so each rank has every fixture, and its failures
are pytest's own reports. Messages to the launcher are tuples:

    ("ready",)               the process has joined the others
    ("reports", reports)     a case's reports; the launcher says "meet"
    ("met", error, joined)   the barrier after the case
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

import pytest

from integration_tests import simulated_gpu
from integration_tests.harness import process
from integration_tests.harness import worlds


class Worker:
    """The pytest plugin that runs cases by their node id."""

    def __init__(self, connection):
        self.connection = connection

    # Last, when the terminal reporter is there: the launcher has its own.
    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config):
        self.config = config
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        config.pluginmanager.unregister(reporter)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        try:
            self.run({item.nodeid: item for item in session.items})
        except Exception:
            # The launcher shows it. Not as pytest's internal error.
            traceback.print_exc()
            leave(1)
        return True

    def run(self, items):
        process.start_processes()
        self.connection.send(("ready",))
        while (case := self.connection.recv()) is not None:
            nodeid, next_nodeid = case
            self.reports = []
            item = items[nodeid]
            item.config.hook.pytest_runtest_protocol(
                item=item, nextitem=items.get(next_nodeid)
            )
            sys.stdout.flush()
            sys.stderr.flush()
            self.connection.send(("reports", self.reports))
            if self.connection.recv() == "meet":
                self.meet()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        process.reset_state()

    def meet(self):
        try:
            process.wait_in_step(worlds.MEET_SECONDS)
        except RuntimeError as error:
            self.connection.send(("met", str(error), False))
        else:
            self.connection.send(("met", None, process.is_joined()))

    def pytest_runtest_logreport(self, report):
        self.reports.append(
            self.config.hook.pytest_report_to_serializable(
                config=self.config, report=report
            )
        )


def end_with(parent):
    """Ends this process when its parent is gone, even out of a hang."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def leave(status):
    """Ends this process at once: a common end may wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main():
    # Keras imports it where it is there, which takes more than a second.
    sys.modules["sklearn"] = None
    settings = json.loads(sys.argv[1])
    # Asked for by the launcher when this process hangs.
    faulthandler.register(signal.SIGUSR1, file=open(settings["stacks"], "w"))
    threading.Thread(
        target=end_with, args=[settings["parent"]], daemon=True
    ).start()
    if simulated_gpu.VARIABLE in os.environ:
        simulated_gpu.install()
    worker = Worker(Connection(settings["connection"]))
    status = pytest.main(settings["arguments"], plugins=[worker])
    leave(status)


if __name__ == "__main__":
    main()
