"""What TensorBoard shows is written once, and is of whole weights.

Keras's callback writes with TensorFlow, which nobody needs to have installed
for this backend: a module that records what it is handed stands in for it.
"""

import pathlib
import sys
import types

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import callbacks
from keras import layers

pytestmark = [pytest.mark.world(2), pytest.mark.limit(60)]

ROWS, BATCH, FEATURES = 10, 4, 5
LAYOUTS = {
    # The first has an odd number of rows, the last of columns.
    ".*up/kernel": ("model", None),
    ".*conv/kernel": (None, None, "model"),
    ".*down/kernel": (None, "model"),
}


class Writer:
    """A file of events; within `as_default`, the one that is written to."""

    def __init__(self, recorder, folder):
        self.recorder = recorder
        self.name = pathlib.Path(folder).name
        pathlib.Path(folder).mkdir(parents=True)
        (pathlib.Path(folder) / "events").touch()

    def as_default(self, step=None):
        return self

    def __enter__(self):
        self.recorder.writers.append(self.name)
        return self

    def __exit__(self, *args):
        self.recorder.writers.pop()

    def flush(self):
        self.recorder.record("flush")

    def close(self):
        self.recorder.record("close")


class Recorder(types.ModuleType):
    """Stands in for `tensorflow.summary`."""

    def __init__(self):
        super().__init__("tensorflow.summary")
        self.said, self.writers = [], []
        self.experimental = self

    def record(self, kind, name="", value=0.0, step=0):
        writer = "".join(self.writers[-1:])
        value = np.array(value, "float64")
        self.said.append((f"{writer}: {kind} {name}", value, step))

    def create_file_writer(self, folder):
        return Writer(self, folder)

    def record_if(self, condition):
        self.record("record_if", value=condition())
        return self

    def summary_scope(self, name, *args, **kwargs):
        return self

    # As a context, of `record_if` and `summary_scope`.
    def __enter__(self):
        return "tag", None

    def __exit__(self, *args):
        return None

    def write(self, tag, tensor, step, metadata):
        self.record("graph", value="Sequential" in tensor)

    def scalar(self, name, value, step):
        self.record("scalar", name, value, int(step))

    def histogram(self, name, value, step):
        self.record("histogram", name, value, step)

    def image(self, name, value, step):
        self.record("image", name, value, step)


@pytest.fixture
def recorder(monkeypatch):
    summary = Recorder()

    class SummaryMetadata:
        plugin_data = types.SimpleNamespace()

    v1 = types.ModuleType("tensorflow.compat.v1")
    v1.SummaryMetadata = SummaryMetadata
    tensorflow = types.ModuleType("tensorflow")
    tensorflow.summary = summary
    for module in (tensorflow, summary, v1):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    compat = types.ModuleType("tensorflow.compat")
    monkeypatch.setitem(sys.modules, "tensorflow.compat", compat)
    return summary


def make_model():
    model = keras.Sequential(
        [
            keras.Input((FEATURES, 4)),
            layers.Dense(6, "tanh", name="up"),
            layers.Conv1D(4, 2, name="conv"),
            layers.Flatten(),
            layers.Dense(3, name="down"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model


def data():
    rng = np.random.default_rng(8)
    return (
        rng.standard_normal((ROWS, FEATURES, 4)).astype("float32"),
        rng.standard_normal((ROWS, 3)).astype("float32"),
    )


def wrote(recorder, folder, distribution=None):
    """What was handed to the writers: texts, and numbers with their steps."""
    del recorder.said[:]
    x, y = data()

    def program(model):
        board = callbacks.TensorBoard(
            folder, histogram_freq=1, write_images=True, update_freq="batch"
        )
        arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
        model.fit(
            x,
            y,
            epochs=2,
            validation_data=(x[:5], y[:5]),
            callbacks=[board],
            **arguments,
        )
        return list(recorder.said)

    said = parity.run(program, make_model, distribution)["said"]
    return [line[0] for line in said], [line[1:] for line in said]


def test_as_on_one_device(rank, tmp_path, recorder):
    expected = wrote(recorder, tmp_path / f"alone{rank}")
    kinds = {text.split()[1] for text in expected[0]}
    assert kinds >= {"graph", "histogram", "image", "scalar", "close"}
    for name, distribution in {
        "data": keras.distribution.DataParallel(),
        "model": parity.model_parallel((1, 2), LAYOUTS),
        "fsdp": parity.model_parallel(
            (2, 1),
            {
                ".*/(up|down)/kernel": ("batch", None),
                ".*/conv/kernel": ("batch", None, None),
            },
        ),
    }.items():
        actual = wrote(recorder, tmp_path / name, distribution)
        # Process 0 writes after the others have gone on.
        everyone.gather(None)
        files = [path.parent.name for path in tmp_path.rglob(f"{name}/*/*")]
        assert sorted(files) == ["train", "validation"]
        if rank:
            assert actual == ([], [])
        else:
            assert actual[0] == expected[0]
            parity.assert_same(actual[1], expected[1])


def test_without_tensorflow(monkeypatch):
    """Where it is missing, all processes say so."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with keras.distribution.DataParallel().scope():
        model = make_model()
        board = callbacks.TensorBoard(write_graph=False)
        outcomes = everyone.outcomes(
            lambda: model.fit(*data(), callbacks=[board], verbose=0)
        )
    assert all("tensorflow" in outcome for outcome in outcomes)
