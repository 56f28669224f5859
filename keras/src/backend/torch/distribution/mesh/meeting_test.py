import pytest
import torch.distributed as dist

from keras.src.backend.torch.distribution.mesh import meeting
from keras.src.backend.torch.distribution.mesh import together


def outcome(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_what_is_said(on_threads):
    def run(rank):
        return (
            meeting.meet("here", flag=rank == 1, depth=rank + 2, digest=7),
            meeting.meet("there", failed=rank == 0, digest=rank),
        )

    for first, second in on_threads(2, run):
        assert first == meeting.Met(True, False, 2, True)
        assert second == meeting.Met(False, True, 0, False)


def test_different_places(on_threads):
    places = ["in `fit`", "in `evaluate`", "in `fit`"]
    for found in on_threads(
        3, lambda rank: outcome(lambda: meeting.meet(places[rank]))
    ):
        assert "processes 0, 2: in `fit`" in found
        assert "process 1: in `evaluate`" in found
        assert "every process" in found


def test_one_goes_on_alone(on_threads):
    def run(rank):
        met = []
        if rank == 0:
            for i in range(3):
                met.append(meeting.meet(f"alone {i}", flag=True, alone=True))
        met.append(meeting.meet("all"))
        return met

    all_met = meeting.Met(False, False, 0, True)
    first, *others = on_threads(3, run)
    assert first == [None, None, None, all_met]
    assert others == [[all_met]] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_work_of_the_writer(on_threads, monkeypatch, fails):
    monkeypatch.setattr(
        together.process_group, "is_first", lambda: dist.get_rank() == 0
    )

    def save(rank):
        with together.work("saving to a file", by_writer=True):
            if fails and rank == 0:
                raise OSError("full")

    def run(rank):
        with together.work("`hook` of the callbacks") as work:
            if rank == 0:
                save(rank)
            work.flag = rank == 1
        return work.flag

    for found in on_threads(2, lambda rank: outcome(lambda: run(rank))):
        assert found == ("OSError: full" if fails else True)


def test_works_of_some(on_threads):
    def run(rank):
        with together.work("`hook` of the callbacks"):
            if rank == 1:
                together.go_on()

    first, second = on_threads(2, lambda rank: outcome(lambda: run(rank)))
    assert first == second
    assert "process 0: the end of `hook`" in first
    assert "process 1: `hook`" in first
