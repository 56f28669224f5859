"""Tests of the launcher: what it tells of cases that fail, hang and die."""

import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time

import pytest

TESTS = pathlib.Path(__file__).parents[1]

CASES = """
    import os
    import pathlib
    import signal
    import time

    import pytest

    pytestmark = pytest.mark.world(2)
    ran = []


    @pytest.fixture(autouse=True)
    def mark(rank):
        pids = pathlib.Path(__file__).with_name("pids.txt")
        with pids.open("a") as file:
            file.write(f"{os.getpid()}\\n")


    @pytest.mark.parametrize("function", [lambda: 1])
    def test_first(function, rank, world_size, tmp_path):
        ran.append(tmp_path)
        assert world_size == 2


    def test_second():
        assert ran


    def test_rank_1_fails(rank):
        print("written by", rank)
        if rank == 1:
            value = 3
            assert value == 4
        time.sleep(60)


    def test_fresh():
        assert not ran


    def test_all_fail():
        raise ValueError("everywhere")


    @pytest.mark.limit(2)
    def test_rank_0_hangs(rank):
        def wait_for_nobody():
            time.sleep(60)

        if rank == 0:
            wait_for_nobody()


    def test_rank_0_dies(rank):
        if rank == 0:
            os._exit(7)


    def test_rank_1_crashes(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)


    def test_skips():
        pytest.skip("for a reason")


    @pytest.mark.xfail(raises=KeyError)
    def test_expected():
        raise KeyError


    @pytest.mark.world(1)
    def test_alone(rank, world_size):
        assert (rank, world_size) == (0, 1)


    def test_last():
        pass
"""

# A case of each world size waits for the other; so does one that is apart.
MEETING_CASES = """
    import pathlib
    import time

    import pytest

    HERE = pathlib.Path(__file__).parent


    def meet(mine, theirs):
        (HERE / mine).touch()
        while not (HERE / theirs).exists():
            time.sleep(0.05)


    @pytest.mark.limit(30)
    @pytest.mark.world(1, 2)
    def test_meets(world_size):
        meet(f"from {world_size}", f"from {3 - world_size}")


    # In one set of processes it would wait for what comes after it.
    @pytest.mark.limit(30)
    @pytest.mark.world(1, 2)
    def test_meets_what_is_apart(world_size):
        meet(f"among others {world_size}", f"apart {world_size}")


    @pytest.mark.limit(30)
    @pytest.mark.apart
    @pytest.mark.world(1, 2)
    def test_apart(world_size):
        meet(f"apart {world_size}", f"among others {world_size}")
"""

STOPPED_CASES = """
    import os
    import pathlib
    import time

    import pytest

    HERE = pathlib.Path(__file__).parent


    @pytest.fixture(autouse=True)
    def mark(rank, world_size):
        (HERE / f"pid {os.getpid()}").touch()


    @pytest.mark.world(1)
    def test_fails():
        while len(list(HERE.glob("pid *"))) < 3:
            time.sleep(0.05)
        raise ValueError


    @pytest.mark.world(1, 2)
    def test_waits():
        time.sleep(100)
"""

TORCHRUN_CASES = """
    import time

    import pytest


    # On a busy machine one process may start long after the other.
    @pytest.mark.limit(60)
    @pytest.mark.world(2)
    def test_shares_folder(rank, tmp_path):
        def wait_for(name):
            while not (tmp_path / name).exists():
                time.sleep(0.05)

        # Rank 0 leaves last: it removes the folder when it is through, and
        # these processes have no barrier to keep them in step.
        if rank == 1:
            wait_for("from 0")
            (tmp_path / "from 1").touch()
        else:
            (tmp_path / "from 0").touch()
            wait_for("from 1")


    @pytest.mark.world(4)
    def test_needs_four():
        raise ValueError


    @pytest.mark.world(2)
    def test_rank_1_fails(rank):
        assert rank == 0
"""


def run_cases(folder, cases, *command, options=()):
    """Runs cases in a copy of this launcher, without torch and Keras."""
    copy = folder / "integration_tests"
    copy.mkdir()
    shutil.copy(TESTS / "conftest.py", copy)
    ignore = shutil.ignore_patterns("*_test.py", "__pycache__")
    for name in ("harness", "simulated_gpu"):
        shutil.copytree(TESTS / name, copy / name, ignore=ignore)
    (copy / "case_test.py").write_text(textwrap.dedent(cases))
    (folder / "pytest.ini").write_text(
        "[pytest]\n"
        "addopts = --import-mode=importlib\n"
        "consider_namespace_packages = true\n"
        "python_files = *_test.py\n"
        "testpaths = integration_tests\n"
    )
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTEST_")
    }
    variables |= {
        "INTEGRATION_TESTS_BARE": "1",
        "COLUMNS": "200",
        "TMPDIR": str(folder),
    }
    result = subprocess.run(
        [sys.executable, "-m", *command, "pytest", "-rA", *options],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launcher")


@pytest.fixture(scope="module")
def output(folder):
    return run_cases(folder, CASES)


def result_of(output, case):
    """The word of the summary for a case."""
    return re.search(rf"^(\w+) \S+::{case}\[", output, re.MULTILINE)[1]


def report_of(output, case):
    """What is shown of a failed case."""
    report = re.search(
        rf"^_+ (ERROR at \w+ of )?{case}\[.*?\] _+$(.*?)^(__|==)",
        output,
        re.MULTILINE | re.DOTALL,
    )
    return report[2]


def test_each_case_has_its_result(output):
    results = {
        "test_first": "PASSED",
        "test_rank_1_fails": "FAILED",
        "test_all_fail": "FAILED",
        "test_rank_0_hangs": "FAILED",
        "test_rank_0_dies": "FAILED",
        "test_rank_1_crashes": "FAILED",
        "test_expected": "XFAIL",
        "test_alone": "PASSED",
        "test_last": "PASSED",
    }
    assert {case: result_of(output, case) for case in results} == results
    assert "for a reason" in output
    assert "5 failed, 5 passed, 1 skipped, 1 xfailed" in output


def test_cases_share_processes_until_one_fails(output):
    assert result_of(output, "test_second") == "PASSED"
    assert result_of(output, "test_fresh") == "PASSED"


def test_failing_rank_shows_its_traceback(output):
    report = report_of(output, "test_rank_1_fails")
    assert "rank 1 failed in call" in report
    assert ">           assert value == 4" in report
    assert "E           assert 3 == 4" in report
    assert "Captured stdout rank 1" in report
    assert "written by 1" in report
    _, waiting = report.split("rank 0 was still waiting 5 s after the failure")
    assert "in test_rank_1_fails" in waiting
    assert "test_rank_1_fails[world=2] - rank 1: assert 3 == 4" in output


def test_same_failure_is_shown_once(output):
    report = report_of(output, "test_all_fail")
    assert report.count("ranks 0, 1 failed in call") == 1
    assert report.count("E       ValueError: everywhere") == 1


def test_hang_names_the_waiting_ranks_and_where(output):
    report = report_of(output, "test_rank_0_hangs")
    assert "rank 0 was still waiting at the limit of 2 s, rank 1 done" in report
    assert "stack of rank 0" in report
    assert "in wait_for_nobody" in report
    assert "stack of rank 1" not in report
    # pytest's own frames and the launcher's are nobody's concern.
    assert "pluggy" not in report
    assert "worker.py" not in report


def test_dead_rank_is_named(output):
    report = report_of(output, "test_rank_0_dies")
    assert "rank 0 died: exit code 7" in report
    assert "still waiting" not in report


def test_where_a_rank_crashed(output):
    report, _, _ = report_of(output, "test_rank_1_crashes").partition("Capt")
    assert "rank 1 died: SIGSEGV" in report
    assert "in test_rank_1_crashes" in report and "pluggy" not in report
    assert re.search(r"died: SIGSEGV at \w+\.py:\d+ in test_rank_1", output)


def test_no_process_is_left(output, folder):
    text = (folder / "integration_tests" / "pids.txt").read_text()
    pids = {int(line) for line in text.splitlines()}
    # Two for each of seven sets, and one alone.
    assert len(pids) == 15
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_world_sizes_run_at_once(tmp_path):
    output = run_cases(tmp_path, MEETING_CASES)
    assert "6 passed" in output


def test_what_runs_ahead_ends_with_pytest(tmp_path):
    began = time.monotonic()
    output = run_cases(tmp_path, STOPPED_CASES, options=["-x"])
    assert time.monotonic() - began < 60
    assert "stopping after 1 failures" in output
    paths = (tmp_path / "integration_tests").glob("pid *")
    pids = [int(path.name.partition(" ")[2]) for path in paths]
    assert len(pids) >= 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_torchrun_reports_once_and_ends_at_a_failure(tmp_path):
    output = run_cases(
        tmp_path,
        TORCHRUN_CASES,
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
    )
    assert output.count("test session starts") == 1
    assert result_of(output, "test_shares_folder") == "PASSED"
    assert "needs 4 processes, WORLD_SIZE is 2" in output
    assert "rank 1 failed: integration_tests/case_test.py" in output
    assert output.count("E       assert 1 == 0") == 1


@pytest.mark.world(2)
def test_processes_are_joined(rank, world_size):
    import torch
    import torch.distributed as dist

    ranks = torch.zeros(world_size)
    ranks[rank] = 1
    dist.all_reduce(ranks)
    assert ranks.tolist() == [1] * world_size


@pytest.mark.world(2)
def test_folder_is_shared(rank, world_size, tmp_path):
    import torch.distributed as dist

    (tmp_path / str(rank)).touch()
    dist.barrier()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {str(each) for each in range(world_size)}


@pytest.mark.world(2)
@pytest.mark.parametrize("turn", ["first", "second"])
def test_state_is_put_back(turn):
    import keras

    assert keras.distribution.distribution() is None
    assert random.random() == random.Random(0).random()
    assert keras.layers.Dense(1).name == "dense"
    keras.distribution.set_distribution(keras.distribution.DataParallel())
