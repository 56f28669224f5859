"""Layout maps that are found send no more than those that experts write."""

import os

import pytest
import torch.distributed as dist

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


@pytest.mark.world(4)
def test_numbers_are_those_of_one_device():
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    x, y = programs.text()

    def make():
        return programs.gpt()

    layout_map = keras.distribution.LayoutMap.auto(make, mesh, len(x))
    assert not dist.get_rank() or layout_map.code
    assert "block_\\d+_attention" in layout_map.code
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )
    arguments = {"loss": programs.LOSS, "steps": 2}
    expected = parity.train(make, x, y, **arguments)
    actual = parity.train(make, x, y, distribution=distribution, **arguments)
    parity.assert_same(actual, expected)
