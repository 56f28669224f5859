"""Runs Keras's own tests on several processes, under a distribution.

    python -m integration_tests.keras_suite PATH_TO_KERAS_SOURCE \
        --distribution model layers losses/losses_test.py

What fails is run again on released Keras, in one process without the patch:
what fails there too is not counted.
"""

import argparse
import os
import pathlib
import sys
import tempfile

from integration_tests.keras_suite import distributions
from integration_tests.keras_suite import report
from integration_tests.keras_suite import tests_tree
from integration_tests.keras_suite.driver import Driver

LIMIT = 300


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m integration_tests.keras_suite",
        description="Runs Keras's own tests under a distribution.",
    )
    parser.add_argument(
        "source", help="a source tree of the Keras release that is installed"
    )
    parser.add_argument(
        "names",
        nargs="*",
        help="folders, files or tests, from the tree's root or `keras/src`",
    )
    parser.add_argument(
        "--distribution", choices=distributions.NAMES, default="data"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds a test"
    )
    parser.add_argument(
        "--results", help="a file for all results, a line of JSON each"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments=None):
    """Runs the tests and prints the report.

    Returns:
        0 if all that failed is expected to, or fails on released Keras.
    """
    options = parse(arguments)
    os.environ["KERAS_BACKEND"] = "torch"
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        tests = folder / "tests"
        tests_tree.copy(options.source, tests)
        (tests / "pytest.ini").write_text(
            "[pytest]\nconsider_namespace_packages = true\n"
        )
        results = run(options, tests, folder)
    unexpected = report.summarize(results, options.distribution)
    return 1 if unexpected else 0


def run(options, tests, folder):
    """All results, with those of released Keras for what failed."""
    # `file::test` chooses single tests.
    names = [name.partition("::")[0] for name in options.names]
    chosen = [
        name.rpartition("::")[2] for name in options.names if "::" in name
    ]
    files = tests_tree.files_of(tests, names)
    with report.Log(options.results) as log:
        driver = Driver(
            tests,
            options.processes,
            options.distribution,
            options.limit,
            folder / "run",
            log.tell,
        )
        results = driver.run({file: _Chosen(chosen) for file in files})
        again = {}
        for result in results:
            if result.is_bad:
                file = result.nodeid.partition("::")[0]
                again.setdefault(file, set()).add(result.nodeid)
        log.say("\nOn released Keras, without a distribution:")
        driver = Driver(
            tests, 1, "released", options.limit, folder / "again", log.tell
        )
        released = {result.nodeid: result for result in driver.run(again)}
    for result in results:
        result.fails_released = (
            result.is_bad
            and result.nodeid in released
            and released[result.nodeid].is_bad
        )
    return results


class _Chosen:
    """The tests whose ids end in one of the given names; all, if none is."""

    def __init__(self, names):
        self.names = tuple(names)

    def __contains__(self, nodeid):
        return not self.names or nodeid.endswith(self.names)


if __name__ == "__main__":
    sys.exit(main())
