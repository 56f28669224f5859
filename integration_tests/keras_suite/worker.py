"""The process of one rank, which runs the tests that the driver sends.

For each file it is a pytest of its own. Messages to the driver:

    ("ready",)                  the process has joined the others
    ("collected", ids, errors)  the tests of a file
    ("reports", reports)        a test's reports; the driver says "meet"
    ("met", error, joined)      the barrier after the test
"""

import faulthandler
import json
import os
import re
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection

import pytest

from integration_tests.harness import process
from integration_tests.harness import worlds
from integration_tests.harness.worker import end_with
from integration_tests.harness.worker import leave
from integration_tests.keras_suite import distributions
from integration_tests.keras_suite import tests_tree
from integration_tests.keras_suite.expected import PRIVATE_FOLDERS
from integration_tests.keras_suite.same_folders import SameFolders

# Of Keras's own `pyproject.toml`.
WARNINGS = (
    "error",
    "ignore::DeprecationWarning",
    "ignore::ImportWarning",
    "ignore::RuntimeWarning",
    "ignore::PendingDeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
)


class Files:
    """Runs file after file.

    Args:
        connection: to the driver.
        tests: path of the copied tests.
        distribution: name of the distribution; `"released"` means Keras
            without the patch.
    """

    def __init__(self, connection, tests, distribution):
        self.connection, self.tests = connection, tests
        self.name = distribution
        self.distribution = None
        self.folders = SameFolders(
            worlds.shared_folder(),
            int(os.environ["RANK"]),
            PRIVATE_FOLDERS,
            self.meet,
        )

    def run(self):
        self.start()
        self.connection.send(("ready",))
        while (file := self.connection.recv()) is not None:
            arguments = [
                os.path.join(self.tests, file),
                f"--rootdir={self.tests}",
                f"--config-file={os.path.join(self.tests, 'pytest.ini')}",
                "--import-mode=importlib",
                "--capture=no",
                "--tb=short",
                # pytest would import the tests, not `tests_tree.Loader`.
                "--assert=plain",
                "-pno:cacheprovider",
                "-pno:hypothesispytest",
                *(f"-W{warning}" for warning in WARNINGS),
            ]
            pytest.main(arguments, plugins=[OneFile(self)])

    def start(self):
        if self.name == "released":
            import keras  # noqa: F401
        else:
            process.start_processes()
            self.distribution = distributions.create(self.name)
        tests_tree.Finder(self.tests).install()
        import keras.src.testing  # noqa: F401

        if self.distribution is not None:
            distributions.keep(self.distribution)
        self.folders.install()
        os.chdir(self.folders.make())

    def meet(self):
        """Raises where the processes are out of step."""
        if self.name != "released":
            process.wait_in_step(worlds.MEET_SECONDS)

    def begin_test(self, nodeid):
        import keras

        self.folders.begin(nodeid)
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(1337)


class OneFile:
    """The pytest plugin that runs the tests of one file by their ids."""

    def __init__(self, files):
        self.files = files
        self.connection = files.connection
        self.errors = []

    # Last, when the terminal reporter is there.
    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config):
        self.config = config
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        config.pluginmanager.unregister(reporter)

    def pytest_collectreport(self, report):
        if report.failed:
            self.errors.append(report.longreprtext)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        try:
            self.run(by_name(session.items))
        except Exception:
            # Not as pytest's internal error: nobody would see it.
            traceback.print_exc()
            leave(1)
        return True

    def run(self, items):
        self.connection.send(("collected", list(items), self.errors))
        while (case := self.connection.recv()) is not None:
            nodeid, next_nodeid = case
            self.reports = []
            self.nodeid = nodeid
            self.config.hook.pytest_runtest_protocol(
                item=items[nodeid], nextitem=items.get(next_nodeid)
            )
            sys.stdout.flush()
            sys.stderr.flush()
            self.connection.send(("reports", self.reports))
            if self.connection.recv() == "meet":
                self.meet()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        self.files.begin_test(self.nodeid)

    def meet(self):
        joined = self.files.name == "released" or process.is_joined()
        try:
            self.files.meet()
        except RuntimeError as error:
            self.connection.send(("met", str(error), False))
        else:
            self.connection.send(("met", None, joined))

    def pytest_runtest_logreport(self, report):
        self.reports.append(
            {
                "when": report.when,
                "outcome": report.outcome,
                "error": first_lines(report),
                "text": report.longreprtext if report.failed else "",
            }
        )


def by_name(items):
    """Tests by names that are the same on all processes: ids of parameters may
    hold addresses of memory."""
    named = {}
    for item in items:
        name = re.sub(r"0x[0-9a-f]{6,}", "0x", item.nodeid)
        while name in named:
            name += "'"
        named[name] = item
    return named


def first_lines(report):
    """What went wrong, or why a test was skipped, in a line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return " ".join(text.split())[:300]


def main():
    settings = json.loads(sys.argv[1])
    # Asked for by the driver when this process hangs.
    faulthandler.register(signal.SIGUSR1, file=open(settings["stacks"], "w"))
    threading.Thread(
        target=end_with, args=[settings["parent"]], daemon=True
    ).start()
    tests, distribution = settings["arguments"]
    files = Files(Connection(settings["connection"]), tests, distribution)
    try:
        files.run()
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


if __name__ == "__main__":
    main()
