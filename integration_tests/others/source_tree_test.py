"""Merged into Keras's source tree, the patch needs no overlay, and what knows
no backend does on another one what released Keras does."""

import json
import os
import subprocess
import sys

import pytest

from integration_tests import source_tree

PROGRAM = """
import json
import os
import pathlib
import sys
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
import numpy as np
from keras import layers
from keras import losses
from keras import metrics

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
if keras.backend.backend() == "jax":
    # JAX's own cut of a kernel.
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"))
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*kernel"] = (None, "model")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout_map)
    )
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    spec = str(model.weights[0].value.sharding.spec)
    assert "model" in spec, spec
    model.compile("sgd", "mse")
    said.append(model.fit(x, x, verbose=0).history["loss"][0])
torch = [name for name in sys.modules if name.startswith(
    ("keras.src.backend.torch.", "keras_torch_distribution")
)]
print(json.dumps([keras.__file__, torch, [float(s) for s in said]]))
"""

TRAINING = """
import json
import os
import sys

import keras
import numpy as np

distributed = sys.argv[1] == "distributed"
if distributed:
    keras.distribution.initialize()
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 1), ("batch", "model"), devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*kernel"] = ("batch", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=layout_map, batch_dim_name="batch"
        )
    )
keras.utils.set_random_seed(3)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(7, 4)).astype("float32"), rng.random((7, 3))
inputs = keras.Input((4,))
h = keras.layers.Dense(5, "tanh")(inputs)
h = keras.layers.BatchNormalization()(h)
model = keras.Model(inputs, keras.layers.Dense(3)(h))
model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
history = model.fit(x, y, batch_size=5, epochs=2, shuffle=False, verbose=0)
numbers = [*history.history["loss"], *history.history["mae"]]
numbers += [float(np.abs(w).sum()) for w in model.get_weights()]
overlay = "keras_torch_distribution" in sys.modules
if os.environ.get("RANK", "0") == "0":
    with open(sys.argv[2], "w") as file:
        json.dump([keras.__file__, overlay, numbers], file)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    source_tree.build(folder)
    return folder


def run(arguments, backend, tree=None):
    """Runs Python without the overlay, on a tree or on released Keras."""
    variables = {"KERAS_BACKEND": backend, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    if tree is not None:
        variables["PYTHONPATH"] = str(tree)
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_another_backend(backend, tree):
    pytest.importorskip("jax", reason="Keras takes it for both backends")
    found, expected = (
        json.loads(run(["-c", PROGRAM], backend, where).splitlines()[-1])
        for where in (tree, None)
    )
    assert str(tree) in found[0] and str(tree) not in expected[0]
    assert not found[1]
    assert found[2] == expected[2]


def test_torch(tree, tmp_path):
    program = tmp_path / "training.py"
    program.write_text(TRAINING)
    run([program, "alone", tmp_path / "alone"], "torch")
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    run(
        [*launcher.split(), program, "distributed", tmp_path / "two"],
        "torch",
        tree,
    )
    expected, found = (
        json.loads((tmp_path / name).read_text()) for name in ("alone", "two")
    )
    assert str(tree) in found[0] and str(tree) not in expected[0]
    assert not found[1] and not expected[1]
    assert found[2] == pytest.approx(expected[2], rel=1e-5, abs=1e-5)


def test_a_name_of_keras_own_is_not_taken():
    released = "import os\nLIMIT = 3\ndef f():\n    return LIMIT\n"
    amending = '__all__ = ["f"]\nimport os\nLIMIT = 4\ndef f():\n    pass\n'
    with pytest.raises(ValueError, match="LIMIT"):
        source_tree.merged(released, amending)
    amending = amending.replace("LIMIT = 4\n", "")
    text = source_tree.merged(released, amending)
    assert text.count("def f()") == 2
    with pytest.raises(ValueError, match="map"):
        source_tree.merged(
            released + "def map():\n    pass\n", amending + "x = map(f, [])\n"
        )
