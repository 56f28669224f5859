"""Logs of a step are reduced while the next one runs; whoever reads between
two steps reads what one device gives."""

import contextlib
import io
import re

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from integration_tests.training import training_test
from keras.src.backend.torch.distribution.training import logs as logs_lib

pytestmark = [pytest.mark.world(2, 4), pytest.mark.limit(60)]

Callback = keras.callbacks.Callback


def fit(model, *callbacks, rows=23, **kwargs):
    x, y = training_test.data(rows)
    return model.fit(
        x, y, batch_size=5, verbose=0, callbacks=list(callbacks), **kwargs
    ).history


def result(model):
    return [float(m.result()) for m in model.metrics if m.name == "loss"]


class Reads(Callback):
    """Reads a metric, its state, and the weights, before each batch."""

    def on_train_batch_begin(self, batch, logs=None):
        state = [v.numpy() for v in self.model.metrics[0].variables]
        self.seen.append([*result(self.model), *state])

    def on_train_begin(self, logs=None):
        self.seen = []


class ReadsSomeLogs(Callback):
    seen = ()

    def on_train_batch_end(self, batch, logs=None):
        if batch % 3 == 1:
            self.seen = (*self.seen, *(float(x) for x in logs.values()))


class Resets(Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            self.model.reset_metrics()


class Evaluates(Callback):
    """And trains one batch more, in the middle of an epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            x, y = training_test.data(9)
            self.seen = self.model.evaluate(x, y, batch_size=4, verbose=0)
        if batch == 3:
            self.model.train_on_batch(*training_test.data(7))


class Stops(Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch == 2


class Fails(Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 3:
            raise KeyError("for a reason")


class KeepsLogs(keras.callbacks.CallbackList):
    """A list of the program's own, which is handed logs first."""

    def on_train_batch_end(self, batch, logs=None):
        self.kept = [*getattr(self, "kept", []), logs]
        super().on_train_batch_end(batch, logs)


class Batches(keras.utils.PyDataset):
    """Whose batches depend on what the model has reached."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def __len__(self):
        return 5

    def __getitem__(self, index):
        (x, y), reached = training_test.data(), result(self.model)
        self.seen += reached
        return x[index::5] * (1 + sum(reached)), y[index::5]


def reading(callback):
    def program(model):
        history = fit(model, callback(), epochs=2)
        return history, result(model)

    return program


def with_reads(model):
    callback = Reads()
    return fit(model, callback, epochs=2), callback.seen


def with_some_logs(model):
    callback = ReadsSomeLogs()
    return fit(model, callback, epochs=2), callback.seen


def with_evaluations(model):
    callback = Evaluates()
    return fit(model, callback, epochs=2), callback.seen


def that_fails(model):
    try:
        fit(model, Fails())
    except KeyError:
        seen = result(model)
        return seen, fit(model, epochs=2)


def with_a_list_of_its_own(model):
    x, y = training_test.data()
    callbacks = KeepsLogs(add_history=True, model=model, epochs=1, steps=5)
    model.fit(x, y, batch_size=5, verbose=0, callbacks=callbacks)
    return [{k: float(v) for k, v in logs.items()} for logs in callbacks.kept]


def with_batches_of_its_own(model):
    batches = Batches(model)
    history = model.fit(batches, epochs=2, shuffle=False, verbose=0)
    return history.history, batches.seen


PROGRAMS = {
    "reads": with_reads,
    "reads some logs": with_some_logs,
    "resets": reading(Resets),
    "evaluates": with_evaluations,
    "stops": reading(Stops),
    "fails": that_fails,
    "own list": with_a_list_of_its_own,
    "own batches": with_batches_of_its_own,
    "validates": lambda model: fit(
        model, epochs=2, validation_data=training_test.data(9)
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_read_between_steps(name, world_size):
    training_test.assert_as_alone(PROGRAMS[name], world_size)


def test_nobody_waits_for_what_nobody_reads(rank, world_size, monkeypatch):
    """States are written once an epoch, or evaluation."""
    written, released = [], logs_lib._write_states

    def write(*args):
        written.append(1)
        return released(*args)

    monkeypatch.setattr(logs_lib, "_write_states", write)
    with parity.fresh(keras.distribution.DataParallel(), 3):
        model = training_test.make_model()
        x, y = training_test.data()
        fit(model, epochs=3)
        assert len(written) == 3
        model.evaluate(x, y, batch_size=4, verbose=0)
        assert len(written) == 4
        fit(model, epochs=2, validation_data=(x, y), validation_batch_size=2)
        assert len(written) == 8
        fit(model, Reads())
        assert len(written) == 13


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_progress_bar_ends_as_on_one_device(epochs, rank):
    x, y = training_test.data()

    def shown(distribution):
        with parity.fresh(distribution, 3):
            model = training_test.make_model()
            with contextlib.redirect_stdout(io.StringIO()) as out:
                model.fit(x, y, batch_size=2, epochs=epochs)
                model.evaluate(x, y, batch_size=2)
        # The last one of an epoch ends its line.
        lines = out.getvalue().split("\n")
        ends = [line.split("\b")[-1] for line in lines if "12/12" in line]
        found = [re.findall(r"(\w+): (\d\.\d+)", line) for line in ends]
        return [[(name, float(x)) for name, x in line] for line in found]

    expected = shown(None)
    actual = shown(keras.distribution.DataParallel())
    if rank:
        assert not actual
        return
    assert len(expected) == epochs + 1
    for ours, theirs in zip(
        [actual[0], actual[-1]], [expected[0], expected[-1]]
    ):
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        np.testing.assert_allclose(
            [x for _, x in ours], [x for _, x in theirs], atol=2e-4
        )


@pytest.mark.parametrize("rows", [5, 10, 23])
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_other_data_is_found(shape, rows, rank, world_size):
    """Also where no step follows."""
    distribution = parity.model_parallel(
        (shape[0] * world_size // 2, shape[1]), training_test.LAYOUTS
    )
    x, y = training_test.data(rows)
    x[-1] += rank
    with parity.fresh(distribution, 3):
        model = training_test.make_model()
        outcomes = everyone.outcomes(
            lambda: model.fit(x, y, batch_size=5, verbose=0, shuffle=False)
        )
    for outcome in outcomes:
        assert "Processes differ" in outcome and "batch" in outcome
