"""Runs the marked tests of this folder in several processes.

`pytest` starts the processes itself, one set for each world size, see
`harness/launcher.py`; each of them runs a pytest, see `harness/worker.py`.
Under `torchrun` this pytest is one of them already, see `harness/process.py`.
"""

import os
import pathlib

import pytest

from integration_tests.harness import process
from integration_tests.harness import worlds

HERE = pathlib.Path(__file__).parent
DIFFERENCE = "difference from one device"
IS_PROCESS = "WORLD_SIZE" in os.environ

# Failing asserts in shared helpers show their values, as those in tests do.
pytest.register_assert_rewrite("integration_tests.harness.parity")


# Last, when the terminal reporter is there: all ranks but one take it away.
@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "world(*sizes): run in that many processes; a size each gives an item",
    )
    config.addinivalue_line(
        "markers",
        f"limit(seconds): end the case after that long, not "
        f"{worlds.CASE_LIMIT} seconds",
    )
    config.addinivalue_line(
        "markers", "apart: share processes with cases of the same module alone"
    )
    config.addinivalue_line(
        "markers", "gpu: run on a GPU, which the processes share"
    )
    if worlds.is_launched():
        return
    if IS_PROCESS and config.getoption("simulate_gpu", False):
        raise pytest.UsageError(
            "`--simulate-gpu` gives a GPU to the processes that pytest starts "
            "itself: run it without torchrun."
        )
    if IS_PROCESS:
        from integration_tests.harness.process import TorchrunProcess

        plugin = TorchrunProcess()
        config.pluginmanager.register(plugin, "process")
        plugin.quieten(config)
    else:
        from integration_tests.harness.launcher import Launcher

        config.pluginmanager.register(Launcher(config), "launcher")


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("world")
    if marker is None:
        return
    # Every marked test has a world size, whether it asks for it or not.
    if "world_size" not in metafunc.fixturenames:
        metafunc.fixturenames.append("world_size")
    sizes = worlds.sizes_of(marker)
    metafunc.parametrize(
        "world_size", sizes, ids=[f"world={size}" for size in sizes]
    )


def pytest_itemcollected(item):
    # `-k world2` chooses a size; `-k` does not take the `=` of the item's name.
    world = worlds.world_of(item)
    if world is not None:
        item.extra_keyword_matches.add(f"world{world}")


def pytest_collection_modifyitems(items):
    # One set of processes at a time, each started once.
    items.sort(key=lambda item: worlds.world_of(item) or 0)
    for item in items:
        if worlds.lacks_gpu(item):
            item.add_marker(pytest.mark.skip(reason="there is no GPU here"))
    if not IS_PROCESS:
        return
    here = int(os.environ["WORLD_SIZE"])
    for item in items:
        world = worlds.world_of(item)
        if world is None and HERE in item.path.parents:
            reason = "runs without torchrun"
        elif world not in (None, here):
            reason = f"needs {world} processes, WORLD_SIZE is {here}"
        else:
            continue
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def difference(request):
    """Reports the largest difference from one device that a case met."""
    if worlds.world_of(request.node) is None or process.BARE:
        yield
        return
    from integration_tests.harness import parity

    parity.largest_difference()
    yield
    largest = parity.largest_difference()
    request.node.user_properties.append((DIFFERENCE, largest))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("differences", False):
        return
    largest = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == DIFFERENCE:
                    file = report.nodeid.partition("::")[0]
                    largest[file] = max(largest.get(file, 0.0), value)
    terminalreporter.section("largest relative differences from one device")
    for file, value in sorted(largest.items()):
        terminalreporter.line(f"{value:.1e}  {file}")


@pytest.fixture
def rank(request):
    """The rank of this process."""
    if worlds.world_of(request.node) is None:
        pytest.fail("A test that asks for `rank` needs pytest.mark.world(n).")
    return int(os.environ["RANK"])


@pytest.fixture
def tmp_path(request):
    """A folder for this case, the same one on all its processes."""
    if worlds.world_of(request.node) is None:
        return request.getfixturevalue("tmp_path")
    path = worlds.shared_folder() / worlds.folder_name(request.node.nodeid)
    path.mkdir(parents=True, exist_ok=True)
    return path
