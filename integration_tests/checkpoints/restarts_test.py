"""Jobs of torchrun that are killed or preempted: the short form of
`python -m integration_tests.checkpoints.restarts`."""

import os
import signal
import time

import pytest

from integration_tests.checkpoints import restarts

pytestmark = pytest.mark.limit(300)

OPTIONS = {"epochs": 24, "rate": 0.1}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return restarts.undisturbed(folder / "job", **OPTIONS)


def test_killed_at_random(expected, tmp_path):
    actual = restarts.run_killed(
        tmp_path / "job", kills=1, seed=os.getpid(), longest=0.2, **OPTIONS
    )
    assert restarts.largest_difference(actual, expected) == 0.0


def test_preempted(expected, tmp_path):
    job = restarts.Job(tmp_path / "job", **OPTIONS)
    try:
        assert job.pids(0) is not None
        time.sleep(0.1)
        job.process.send_signal(signal.SIGTERM)
        _, said = job.wait()
    finally:
        job.kill()
    assert said.count("SIGTERM: training ends after step") == 1, said
    assert not (tmp_path / "job/weights.npz").exists()
    actual = restarts.undisturbed(tmp_path / "job", **OPTIONS)
    assert restarts.largest_difference(actual, expected) == 0.0
