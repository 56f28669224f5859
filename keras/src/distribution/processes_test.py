"""Files of Keras that know no backend: what they import, and that they do on
another backend what released Keras does."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from keras.src.backend.torch import distribution_lib
from keras.src.distribution import files
from keras.src.distribution import processes

SOURCES = pathlib.Path(__file__).parents[1]
# Overlays of what is torch's own.
OF_TORCH = {
    "backend",  # a folder
    "distribution/distribution_lib.py",
    "utils/torch_utils.py",
}


def neutral_files():
    for path in sorted(SOURCES.rglob("*.py")):
        name = str(path.relative_to(SOURCES))
        if name.endswith("_test.py") or "backend/" in name:
            continue
        if name not in OF_TORCH:
            yield path


NEUTRAL = list(neutral_files())


@pytest.mark.parametrize(
    "path", NEUTRAL, ids=lambda p: str(p.relative_to(SOURCES))
)
def test_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        for name in names:
            assert not name.startswith(("torch", "keras.src.backend.torch"))


def test_the_backend_has_an_answer_to_each_question():
    for name, default in vars(processes).items():
        if hasattr(default, "__wrapped__"):
            answer = getattr(distribution_lib, name)
            assert answer is not default, name
            assert name in distribution_lib.__all__


def test_without_a_distribution_nothing_communicates(fake_world, monkeypatch):
    # One process of two, in code that the others do not run.
    fake_world(2)
    for name in ("all_reduce", "broadcast", "all_gather_object"):
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: pytest.fail())
    assert not processes.is_distributed()
    assert processes.any_process(True) and not processes.any_process(False)
    assert processes.any_of_each([1, 0]) == [True, False]
    with processes.work("nothing") as work:
        work.flag = True
    with pytest.raises(KeyError), processes.work("nothing"):
        raise KeyError
    assert processes.share_of_rows() is None
    assert not processes.spans_rows(torch.ones(2), (0,))
    assert processes.call_metric(None, max, (1, 2), {}) == 2
    assert processes.metric_result(None, lambda: 3) == 3
    assert processes.call_loss(None, lambda *args: args, 1, 2, 3) == (1, 2, 3)
    assert files.exists(__file__)


PROGRAM = """
import json
import pathlib
import sys
import tempfile

from keras_torch_distribution import overlay

files = {
    name: file
    for name, file in overlay._files().items()
    if file in json.loads(sys.argv[1])
}
overlay._files = lambda: files
overlay._applies = lambda: True
overlay.install()

import keras
import numpy as np
from keras import layers
from keras import losses
from keras import metrics

# Those that a program may not import by itself.
for name in files:
    if "tensorboard" not in name and "orbax" not in name:
        __import__(name)
amended = [
    name
    for name in files
    if name in sys.modules and name != "keras.src.distribution.processes"
]

keras.utils.set_random_seed(3)
rng = np.random.default_rng(0)
x = rng.normal(size=(5, 4)).astype("float32")
y = rng.random((5, 3)).astype("float32")
weights = rng.random(5).astype("float32")

model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "sigmoid")])
predicted = keras.ops.convert_to_numpy(model(x))
said = []
for loss in (losses.MeanSquaredError(), losses.Dice(), losses.Tversky()):
    said += [loss(y, predicted), loss(y, predicted, weights)]
labels = np.arange(5) % 2
said.append(losses.Circle()(labels, predicted))
said.append(losses.MeanSquaredError("mean_with_sample_weight")(y, predicted))
for metric in (metrics.MeanSquaredError(), metrics.AUC(), metrics.Mean()):
    arguments = (y > 0.5, predicted) if metric.name != "mean" else (y,)
    metric.update_state(*arguments)
    said.append(metric.result())
norm = layers.BatchNormalization()
masked = rng.normal(size=(5, 3, 2)).astype("float32")
mask = rng.random((5, 3)) > 0.3
said.append(keras.ops.sum(norm(masked, training=True, mask=mask) ** 2))
said.append(keras.ops.sum(norm.moving_variance))
with tempfile.TemporaryDirectory() as folder:
    for name in ("m.keras", "m.weights.h5", "m.h5"):
        path = pathlib.Path(folder) / name
        if "weights" in name:
            model.save_weights(path)
            model.load_weights(path)
            loaded = model
        else:
            model.save(path)
            loaded = keras.models.load_model(path)
        said.append(keras.ops.sum(loaded(x)))
    assert len(list(pathlib.Path(folder).iterdir())) == 3
print(json.dumps([amended, [float(s) for s in said]]))
"""


@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_another_backend(backend):
    pytest.importorskip("jax", reason="Keras takes it for both backends")

    def run(files):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(files)],
            env={**os.environ, "KERAS_BACKEND": backend},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    files = [str(path) for path in NEUTRAL]
    amended, numbers = run(files)
    nothing, expected = run([])
    assert len(amended) > 15 and not nothing
    assert numbers == expected
