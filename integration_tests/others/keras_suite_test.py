"""The runner of Keras's own tests, on tests of our own."""

import subprocess
import sys

import pytest

from integration_tests.harness.process_set import ROOT
from integration_tests.keras_suite import report
from integration_tests.keras_suite import tests_tree
from integration_tests.keras_suite.driver import Result

TOYS = """
import os
import time

import pytest

from keras.src import distribution
from keras.src import testing
from keras.src.backend.common import global_state
from keras.src.losses.helpers_test import the_answer

RANK = int(os.environ["RANK"])
IS_RELEASED = "TORCH_DEVICE_BACKEND_AUTOLOAD" in os.environ


class Toys(testing.TestCase):
    def test_a_passes(self):
        global_state.clear_session()
        distribution.set_distribution(None)
        assert isinstance(
            distribution.distribution(), distribution.DataParallel
        )
        assert the_answer() == 42

    def test_b_fails_everywhere(self):
        assert IS_RELEASED, "only under a distribution"

    def test_c_fails_released(self):
        raise ValueError("everywhere")

    def test_d_hangs_on_one(self):
        while RANK == 1:
            time.sleep(0.1)

    def test_e_shares_folders(self):
        import torch.distributed as dist

        folder = self.get_temp_dir()
        if RANK == 0:
            open(os.path.join(folder, "file"), "w").close()
        dist.barrier()
        assert os.listdir(folder) == ["file"]

    @pytest.mark.skipif(True, reason="is skipped")
    def test_f_is_skipped(self):
        pass

    def test_g_fails_on_one(self):
        assert RANK == 0, "on one process"
"""
HELPERS = """
def the_answer():
    return 42
"""


@pytest.fixture
def source(tmp_path):
    """A tree like Keras's, with a file of tests."""
    folder = tmp_path / "source" / "keras" / "src" / "losses"
    folder.mkdir(parents=True)
    (folder / "toys_test.py").write_text(TOYS)
    (folder / "helpers_test.py").write_text(HELPERS)
    (folder / "losses.py").write_text("raise ImportError('not installed')")
    return tmp_path / "source"


def test_lockstep(source):
    """What fails or hangs stops no other test, and what is counted."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "integration_tests.keras_suite", source),
            *("--limit", "5", "losses"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout
    assert done.returncode == 1, said + done.stderr
    row = next(line for line in said.splitlines() if line.startswith("losses"))
    # Passed, failed, skipped, hung; expected, released, unexpected.
    assert row.split()[1:] == ["2", "3", "1", "1", "0", "1", "3"], said
    failed = said.rpartition("Failed:")[2]
    for name, words in {
        "test_b_fails_everywhere": "only under a distribution",
        "test_d_hangs_on_one": "processes [1] wait",
        "test_g_fails_on_one": "passed, failed",
    }.items():
        (line,) = [x for x in failed.splitlines() if f"::{name}:" in x]
        assert words in line


def test_expected(monkeypatch, capsys):
    """An expected failure is told with its reason, and is not counted."""
    monkeypatch.setattr(
        report, "EXPECTED", {"*::test_threads*": (("data",), "counts threads")}
    )
    results = [
        Result("keras/src/utils/a_test.py::A::test_threads1", "failed"),
        Result("keras/src/utils/a_test.py::A::test_other", "passed"),
    ]
    for result in results:
        result.fails_released = False
    assert report.summarize(results, "data") == []
    assert "test_threads1: counts threads" in capsys.readouterr().out
    assert report.summarize(results, "model") == results[:1]


def test_what_has_no_tests(tmp_path, source):
    with pytest.raises(ValueError, match="folder of Keras's sources"):
        tests_tree.copy(tmp_path / "nothing", tmp_path / "copy")
    tests_tree.copy(source, tmp_path / "copy")
    files = tests_tree.files_of(tmp_path / "copy", ["losses"])
    assert [file.rpartition("/")[2] for file in files] == [
        "helpers_test.py",
        "toys_test.py",
    ]
    with pytest.raises(ValueError, match="no tests in: 'lozzes'"):
        tests_tree.files_of(tmp_path / "copy", ["lozzes"])
