"""What the launcher and the processes both know of a case."""

import hashlib
import os
import pathlib
import re
import tempfile

import pytest

CASE_LIMIT = 120
MEET_SECONDS = 10
FOLDER_VARIABLE = "INTEGRATION_TESTS_FOLDER"


def sizes_of(marker):
    """The world sizes that a `world` marker names."""
    sizes = marker.args
    if not sizes or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise pytest.UsageError(
            "pytest.mark.world takes one or more numbers of processes. "
            f"Received: {marker}"
        )
    return sizes


def world_of(item):
    """The number of processes that a test item needs, or None."""
    marker = item.get_closest_marker("world")
    if marker is None:
        return None
    callspec = getattr(item, "callspec", None)
    if callspec is not None and "world_size" in callspec.params:
        return callspec.params["world_size"]
    # pytest does not parametrize the methods of a `unittest.TestCase`.
    sizes = sizes_of(marker)
    if len(sizes) > 1:
        raise pytest.UsageError(
            f"{item.nodeid} is a TestCase's method, for which "
            "pytest.mark.world takes one number of processes. "
            f"Received: {marker}"
        )
    return sizes[0]


def apart(item):
    """The module of a test item whose cases share processes with no other."""
    marker = item.get_closest_marker("apart")
    return None if marker is None else item.module.__name__


def limit_of(item):
    """The seconds after which a case counts as hanging."""
    marker = item.get_closest_marker("limit")
    return CASE_LIMIT if marker is None else marker.args[0]


def needs_gpu(item):
    """Whether the processes of a test item run on a GPU."""
    if item.config.getoption("on_gpu", False):
        return True
    return item.get_closest_marker("gpu") is not None


def lacks_gpu(item):
    """Whether a test item needs a GPU, and there is none."""
    if not needs_gpu(item) or item.config.getoption("simulate_gpu", False):
        return False
    import torch

    return not torch.cuda.is_available()


def is_launched():
    """Whether the launcher started this process."""
    return FOLDER_VARIABLE in os.environ


def shared_folder():
    """The folder that all processes of this run share."""
    if is_launched():
        return pathlib.Path(os.environ[FOLDER_VARIABLE])
    # Under torchrun nobody made one. Its processes have these in common; the
    # parent's id keeps two runs with the same default port apart.
    parts = [
        os.environ.get("TORCHELASTIC_RUN_ID", "none"),
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        os.environ.get("MASTER_PORT", "0"),
        str(os.getppid()),
    ]
    name = "keras-integration-" + "-".join(parts)
    return pathlib.Path(tempfile.gettempdir()) / name


def folder_name(nodeid):
    """A short name for a case's folder, different for each case."""
    digest = hashlib.sha1(nodeid.encode()).hexdigest()[:8]
    name = nodeid.rpartition("::")[2]
    return re.sub(r"\W+", "_", name)[:40] + "_" + digest
