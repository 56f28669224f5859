import gc
import weakref

import pytest

from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.training import late
from keras.src.backend.torch.distribution.training import logs


class Work:
    """Of torch's, under way."""

    waited = 0

    def wait(self):
        self.waited += 1


def make_pending():
    work = Work()

    def adding_up():
        work.wait()
        return {"loss": 3.0}, [1.0]

    reduction = logs.Reduction(adding_up, lambda sums: {"loss": sums["loss"]})
    return work, late.Pending(reduction, None, None)


def test_logs_are_waited_for_when_they_are_read():
    work, pending = make_pending()
    found = late.Logs(pending)
    assert not work.waited
    assert found.get("loss") == 3.0
    assert dict(found) == {"loss": 3.0} and len(found) == 1
    assert {**found} == found.settled() == {"loss": 3.0}
    assert pending.reduction.flags == [1.0]
    assert work.waited == 1


def test_logs_of_an_earlier_step_are_not_made_up():
    _, pending = make_pending()
    found = late.Logs(pending)
    pending.reduction.forget()
    with pytest.raises(RuntimeError, match="next step"):
        found["loss"]


def test_a_variable_is_read_after_the_step():
    work, pending = make_pending()
    late.end(pending)
    assert not work.waited
    modes.modes.settle()
    assert work.waited == 1 and modes.modes.settle is None
    late.end(pending)  # Nothing is left to wait for.
    assert modes.modes.settle is None


def test_nothing_under_way_is_kept_where_the_program_ends():
    work, pending = make_pending()
    work = weakref.ref(work)
    late.end(pending)
    late._leave()
    gc.collect()
    assert work() is None and modes.modes.settle is None
