import json
import os
import sys

import pytest
import torch

from keras import layers
from keras.src.backend.torch.distribution.mesh import failures
from keras.src.backend.torch.distribution.mesh import meeting


class Fails(layers.Layer):
    def call(self, x):
        raise ValueError("one\nand another")


def caught(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


def test_what_is_told_of_an_error():
    facts = failures.facts_of(caught(lambda: Fails()(torch.ones(2))), rank=3)
    # No line is the user's own: this file is of Keras's tree.
    assert facts["text"] == (
        "Process 3 failed first: ValueError: one and another"
    )
    long = failures.facts_of(caught(lambda: float("x" * 999)), rank=0)
    assert len(long["message"]) == failures.LENGTH


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("[/a/gloo/transport/tcp/pair.cc:5] closed"), True),
        (RuntimeError("shapes do not fit"), False),
        (meeting.AnotherLeft("gone"), True),
        # Of a program that reads what is far away.
        (ConnectionResetError("Connection reset by peer"), False),
        (torch.distributed.DistBackendError("NCCL"), True),
        (ValueError("/gloo/"), False),
    ],
)
def test_what_tells_of_another_process(error, expected):
    assert failures.is_of_another(error) is expected


def test_nothing_is_done_without_others():
    with pytest.raises(KeyError), failures.told():
        raise KeyError("mine")
    assert failures.tell(KeyError()) is None
    assert failures.caused_by(meeting.AnotherLeft("gone")) is None


def test_what_torchrun_is_told(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv(failures.FILE_OF_TORCHRUN, str(path))
    failures._write_for_torchrun("it failed", 17)
    from torch.distributed.elastic.multiprocessing import errors

    failure = errors.ProcessFailure(0, 1, 1, str(path))
    assert failure.timestamp == 17
    assert failure.message["extraInfo"]["py_callstack"] == "it failed"
    assert json.loads(path.read_text())["message"]["message"] == "it failed"
    assert os.listdir(tmp_path) == ["error.json"]


def test_what_shows_errors_is_put_back():
    before = sys.excepthook
    end = failures.begin(torch.distributed.HashStore(), 0, 2, True)
    assert sys.excepthook is not before
    end()
    assert sys.excepthook is before
