import threading
import time

import pytest

from keras.src.backend.torch.distribution.mesh import watch


def test_description():
    text = watch.describe(
        {
            0: {"waits": True, "place": "a.py:3, in `fit`"},
            1: {"waits": False, "place": "a.py:7"},
            3: {"waits": True, "place": "a.py:3, in `fit`"},
        },
        4,
        2.5,
    )
    lines = text.splitlines()
    assert lines[0] == "Processes have waited for others for 2.5 s:"
    assert lines[1] == "  processes 0, 3: waiting, a.py:3, in `fit`"
    assert lines[2] == "  process 1: busy, a.py:7"
    assert lines[3].startswith("  process 2: not answering")


def test_setting(monkeypatch):
    monkeypatch.setenv(watch.VARIABLE, "soon")
    with pytest.raises(ValueError, match="is a number of seconds.*'soon'"):
        watch.begin(None, 0, 2)
    monkeypatch.setenv(watch.VARIABLE, "0")
    threads = threading.active_count()
    watch.begin(None, 0, 2)()
    assert threading.active_count() == threads


class Store:
    def __init__(self):
        self.values = {}
        self.set = self.values.__setitem__
        self.get = self.values.__getitem__

    def clone(self):
        return self

    def set_timeout(self, timeout):
        assert timeout.total_seconds() == watch.TIMEOUT

    def add(self, key, count):
        self.values[key] = self.values.get(key, 0) + count
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


def test_a_busy_thread_does_not_wait(caplog):
    seen = watch.Watch(Store(), 0, 2, patience=0.05)
    for _ in range(3):
        thread = threading.Thread(target=seen._look)
        thread.start()
        thread.join()
        time.sleep(0.06)
    assert seen.store.check([watch.KEY.format(0)])
    # It sleeps, and communicates with nobody.
    assert not caplog.records


def said(place, waits=True, call="fit", **more):
    return {"waits": waits, "place": place, "call": call, **more}


@pytest.mark.parametrize(
    "answers, text",
    [
        ({0: said("a.py:3")}, "that does not answer is stopped"),
        ({0: said("a.py:3"), 1: said("a.py:5")}, "goes another way on some"),
        ({0: said("a"), 1: said("b", waits=False)}, "if it only takes long"),
        ({0: said("a"), 1: said("b", call="save")}, "process_id() == 0"),
        ({0: said("a"), 1: {"left": True}}, "process_id() == 0"),
    ],
)
def test_what_to_look_for(answers, text):
    assert text in watch.describe(answers, 2, 1.0)


def test_what_a_process_says_of_itself():
    answers = {0: said("a", failure="OSError: full"), 1: {"left": True}}
    lines = watch.describe(answers, 2, None).splitlines()
    assert lines[0] == "Processes have waited for others for too long:"
    assert lines[1] == "  process 0: waiting, a, after OSError: full"
    assert lines[2] == "  process 1: its program has ended"
