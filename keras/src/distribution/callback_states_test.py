"""What callbacks recorded is there again in others of their kind."""

import json

import numpy as np
import pytest

from keras.src import backend
from keras.src import callbacks
from keras.src.distribution import callback_states


def logger(path, **kwargs):
    created = callbacks.CSVLogger(str(path), **kwargs)
    callbacks.CallbackList([created, callbacks.BackupAndRestore("unused")])
    created.on_train_begin()
    return created


def saved(*others):
    return json.loads(json.dumps(callback_states.get(others)[0]))


@pytest.mark.parametrize("append", [False, True])
def test_rows_of_epochs_that_are_trained_again_are_removed(tmp_path, append):
    path = tmp_path / "log.csv"
    path.write_text("of another training\n" if append else "")
    before = path.read_text()
    first = logger(path, append=append)
    for epoch in range(3):
        first.on_epoch_end(epoch, {"loss": 1.5})
        if not epoch:
            states, rows = saved(first), path.read_text()
    again = logger(path, append=append)
    # As long as it is not known whether the training goes on.
    assert len(path.read_text()) > len(rows)
    callback_states.set([again], states, None)
    assert path.read_text() == rows
    again.on_epoch_end(1, {"loss": 0.5, "new": 3.0})
    again.on_train_end()
    assert path.read_text().startswith(rows)
    assert path.read_text()[len(rows) :].split() == ["1,0.5,NA"]
    assert rows.startswith(before)


@pytest.mark.parametrize("epochs", [0, 1])
def test_rows_of_another_training_are_removed(tmp_path, epochs):
    path = tmp_path / "log.csv"
    path.write_text("of another training\n")
    csv_logger = logger(path)
    for epoch in range(epochs):
        csv_logger.on_epoch_end(epoch, {"loss": 1.5})
    csv_logger.on_train_end()
    rows = ["epoch,loss,val_loss", "0,1.5,NA"] if epochs else []
    assert path.read_text().split() == rows


def test_a_file_that_lacks_rows(tmp_path):
    path = tmp_path / "log.csv"
    first = logger(path)
    first.on_epoch_end(0, {"loss": 1.5})
    states = saved(first)
    path.unlink()
    again = logger(path)
    with pytest.warns(UserWarning, match="rows are missing"):
        callback_states.set([again], states, None)
    again.on_epoch_end(1, {"loss": 0.5})
    assert path.read_text().split() == ["epoch,loss,val_loss", "1,0.5,NA"]


def test_without_one_that_saves_it_is_keras_s(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("of another training\n")
    created = callbacks.CSVLogger(str(path))
    callbacks.CallbackList([created])
    created.on_train_begin()
    assert path.read_text() == ""
    created.on_train_end()


def test_history():
    history = callbacks.History()
    history.on_train_begin()
    history.epoch = [0, 1]
    history.history = {
        "loss": [0.1, float("nan")],
        "each": [np.float32([1, 2]), np.float32([3, 4])],
        "strange": [object()],
    }
    with pytest.warns(UserWarning, match="history of 'strange'"):
        states = saved(history)
    other = callbacks.History()
    other.on_train_begin()
    callback_states.set([other], states, None)
    assert other.epoch == [0, 1]
    assert other.history["loss"][0] == 0.1
    assert np.isnan(other.history["loss"][1])
    assert other.history["each"] == [[1, 2], [3, 4]]
    assert sorted(other.history) == ["each", "loss"]


def test_numbers_of_a_backend_in_logs():
    history = callbacks.History()
    history.on_train_begin()
    history.history = {"loss": [backend.convert_to_tensor(0.5)]}
    other = callbacks.History()
    callback_states.set([other], saved(history), None)
    assert other.history == {"loss": [0.5]}
