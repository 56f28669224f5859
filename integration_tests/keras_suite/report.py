"""What is printed and written of the results."""

import collections
import fnmatch
import json
import pathlib
import time

from integration_tests.keras_suite.expected import EXPECTED

OUTCOMES = ("passed", "failed", "skipped", "hung")


class Log:
    """Says what happens while it does, and writes all results to a file.

    Args:
        path: of a file for a line of JSON each, or None.
    """

    def __init__(self, path):
        self.file = None if path is None else open(path, "w")
        self.began = time.monotonic()
        self.last_file = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.file is not None:
            self.file.close()

    def say(self, text):
        print(text, flush=True)

    def tell(self, result):
        file = result.nodeid.partition("::")[0]
        if file != self.last_file:
            self.last_file = file
            self.say(f"{time.monotonic() - self.began:6.0f} s  {file}")
        if result.is_bad:
            self.say(f"  {result.outcome}: {result.nodeid}: {result.error}")
        if self.file is not None:
            self.file.write(json.dumps(vars(result)) + "\n")
            self.file.flush()


def reason(nodeid, distribution):
    """Why a test is expected to fail under a distribution, or None."""
    for pattern, (names, text) in EXPECTED.items():
        if distribution in names and fnmatch.fnmatchcase(nodeid, pattern):
            return text
    return None


def summarize(results, distribution):
    """Prints the results by folder, and what failed.

    Args:
        results: list of `Result`s with `fails_released`.
        distribution: name of the distribution.

    Returns:
        List of the results that failed and were not expected to.
    """
    folders = collections.defaultdict(collections.Counter)
    lists = {"expected": [], "released": [], "unexpected": []}
    for result in results:
        counts = folders[_folder(result.nodeid)]
        counts[result.outcome] += 1
        if not result.is_bad:
            continue
        if result.fails_released:
            kind = "released"
        elif reason(result.nodeid, distribution):
            kind = "expected"
        else:
            kind = "unexpected"
        counts[kind] += 1
        lists[kind].append(result)
    columns = [*OUTCOMES, *lists]
    print(f"\n{'':24}" + "".join(f"{name:>12}" for name in columns))
    total = collections.Counter()
    for folder, counts in sorted(folders.items()):
        total += counts
        print(_row(folder, counts, columns))
    print(_row("all", total, columns))
    print("\nFailed, and on released Keras too:")
    for result in lists["released"]:
        print(f"  {result.nodeid}: {result.error}")
    print("\nFailed, as expected:")
    for result in lists["expected"]:
        print(f"  {result.nodeid}: {reason(result.nodeid, distribution)}")
    print("\nFailed:")
    for result in lists["unexpected"]:
        print(f"  {result.outcome}: {result.nodeid}: {result.error}")
    return lists["unexpected"]


def _row(name, counts, columns):
    return f"{name:24}" + "".join(f"{counts[key]:>12}" for key in columns)


def _folder(nodeid):
    parts = pathlib.PurePosixPath(nodeid.partition("::")[0]).parts
    if parts[:2] == ("keras", "src"):
        parts = parts[2:]
    return parts[0] if len(parts) > 1 else "."
