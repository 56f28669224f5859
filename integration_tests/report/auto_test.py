"""Layout maps that are found send no more than those that experts write."""

import os

import numpy as np
import pytest

import keras
from integration_tests.harness import parity
from integration_tests.report import auto_programs
from integration_tests.report import programs

# The others take a minute more: REPORT_ALL=1.
ALL = bool(os.environ.get("REPORT_ALL"))
CASES = [("gpt", (2, 2)), ("mlp", (1, 4)), ("llama", (1, 4))]
if ALL:
    CASES = [
        (name, shape)
        for name in auto_programs.PROGRAMS
        for shape in auto_programs.MESHES
    ]


@pytest.mark.parametrize("name, shape", CASES, ids=str)
def test_traffic(name, shape, no_world):
    if name not in ("gpt", "mlp"):
        pytest.importorskip("keras_hub", reason="see requirements-hub.txt")
    costs, found, _ = auto_programs.compare(name, shape)
    sent, held = costs.pop("found")
    for other, (theirs, their_held) in costs.items():
        assert sent <= theirs, (other, found.code)
        if other == "written":
            assert held <= 1.01 * their_held, (other, found.code)
    assert list(found) or shape[1] == 1


def uneven():
    """Two model axes divide its dims, and one of four does not."""
    model = keras.Sequential([keras.Input((16,))])
    for i, units in enumerate((10, 6, 10)):
        model.add(keras.layers.Dense(units, "tanh", name=f"dense_{i}"))
    return model


def numbers():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 16)), rng.normal(size=(7, 10))


@pytest.mark.world(4)
@pytest.mark.parametrize(
    "make, data, loss, shape, axes",
    [
        (programs.gpt, programs.text, programs.LOSS, (2, 2), ["model"]),
        (programs.gpt, programs.text, programs.LOSS, (1, 2, 2), ["model_two"]),
        (uneven, numbers, "mse", (1, 2, 2), ["model", "two"]),
    ],
)
def test_numbers_are_those_of_one_device(make, data, loss, shape, axes):
    devices = keras.distribution.list_devices()
    names = ("batch", "model", "two")[: len(shape)]
    mesh = keras.distribution.DeviceMesh(shape, names, devices)
    x, y = data()
    layout_map = keras.distribution.LayoutMap.auto(make, mesh, len(x))
    used = {n for key in layout_map for n in layout_map[key].axes if n}
    assert sorted(used) == axes
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )
    arguments = {"loss": loss, "steps": 2}
    expected = parity.train(make, x, y, **arguments)
    actual = parity.train(make, x, y, distribution=distribution, **arguments)
    parity.assert_same(actual, expected)
