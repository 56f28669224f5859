import types
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist

from keras.src import backend
from keras.src import initializers
from keras.src import layers
from keras.src import models
from keras.src.backend.torch.distribution.mesh import configuration
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.mesh import together
from keras.src.backend.torch.distribution.training import checks
from keras.src.distribution.distribution_lib import DataParallel
from keras.src.distribution.distribution_lib import DeviceMesh
from keras.src.distribution.distribution_lib import LayoutMap
from keras.src.distribution.distribution_lib import ModelParallel

WORLD = 2
DEVICES = ["cpu:0", "cpu:1"]


def data_parallel():
    return DataParallel(device_mesh=DeviceMesh((2,), ["batch"], DEVICES))


def make_model():
    return models.Sequential(
        [layers.Input((3,)), layers.Dense(2, name="dense")], name="model"
    )


def test_variables_made_before_the_distribution(fake_world):
    fake_world(WORLD)
    model = make_model()
    with data_parallel().scope():
        with pytest.raises(
            ValueError,
            match="built before the distribution was set.*dense/kernel.*"
            "set_distribution",
        ):
            checks.check_once(model, context_lib.current())


def test_variables_made_under_another_distribution(fake_world):
    fake_world(WORLD)
    with data_parallel().scope():
        model = make_model()
    mesh = DeviceMesh((1, 2), ["batch", "model"], DEVICES)
    with ModelParallel(layout_map=LayoutMap(mesh)).scope():
        with pytest.raises(ValueError, match="or under another one"):
            checks.check_made_under(model.weights, context_lib.current())


def test_distributions_of_one_mesh_share_variables(fake_world):
    fake_world(WORLD)
    with data_parallel().scope():
        model = make_model()
    with data_parallel().scope():
        checks.check_made_under(model.weights, context_lib.current())


def test_many_strangers_are_counted():
    variables = [types.SimpleNamespace(path=f"v{i}") for i in range(8)]
    with pytest.raises(ValueError, match="'v4'] and 3 more") as error:
        checks.check_made_under(variables, types.SimpleNamespace(mesh=1))
    assert "v5" not in str(error.value)


def with_process_1(monkeypatch, change):
    """Lets process 1 have what `change` makes of what this process has."""

    def all_gather_object(everyone, mine):
        everyone[:] = [mine, change(list(mine))]

    def is_same(digest, what):
        digests.append(digest)
        return False

    digests = []
    monkeypatch.setattr(together, "is_same", is_same)
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    return digests


def variables():
    return [
        backend.Variable(np.ones((2, 2), "float32"), name="kernel"),
        backend.Variable(np.zeros(2, "float32"), name="bias"),
    ]


def check_equal(variables, buffers=None):
    names = configuration.Names(models.Sequential())
    checks.check_equal(variables, buffers or {}, names)


def test_equal_variables(fake_world, monkeypatch):
    fake_world(WORLD)
    with_process_1(monkeypatch, lambda mine: mine)
    check_equal(variables())
    # None and no number are what they are everywhere.
    check_equal([backend.Variable(np.array([np.nan]), name="nan")])


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda mine: mine[:1], "2 variables against 1"),
        (
            lambda mine: [mine[0], ("beta", *mine[1][1:])],
            r"bias \(2,\) float32 with sum 0.0 against beta",
        ),
        (
            lambda mine: [(*mine[0][:3], 5.0, *mine[0][4:]), mine[1]],
            "kernel .* with sum 4.0 against kernel .* with sum 5.0",
        ),
    ],
)
def test_different_variables(fake_world, monkeypatch, change, what):
    fake_world(WORLD)
    with_process_1(monkeypatch, change)
    with pytest.raises(
        ValueError, match=f"0 differs from process 1: {what}.*set_random_seed"
    ):
        check_equal(variables())


def test_what_was_drawn_as_shards(fake_world, monkeypatch):
    """It is compared by how it was drawn: no process has the whole."""
    fake_world(WORLD)
    mesh = DeviceMesh((1, 2), ["batch", "model"], DEVICES)
    layout_map = LayoutMap(mesh)
    layout_map[".*kernel"] = ("model", None)
    with ModelParallel(layout_map=layout_map).scope():
        layer = layers.Dense(
            200, kernel_initializer=initializers.RandomNormal(seed=3)
        )
        layer.build((None, 300))
        with_process_1(
            monkeypatch,
            lambda mine: [
                (
                    *mine[0][:3],
                    mine[0][3].replace("seed 3", "seed 4"),
                    *mine[0][4:],
                ),
                mine[1],
            ],
        )
        with pytest.raises(
            ValueError, match="RandomNormal.* of seed 3 against .*seed 4"
        ):
            check_equal(layer.variables)


def test_different_buffers(fake_world, monkeypatch):
    fake_world(WORLD)
    buffers = {"norm/mean": torch.tensor([1.0, 2.0])}
    with_process_1(
        monkeypatch, lambda mine: [*mine[:2], (*mine[2][:3], 4.0, *mine[2][4:])]
    )
    with pytest.raises(ValueError, match="norm/mean .* 3.0 against .* 4.0"):
        check_equal(variables(), buffers)


def test_checks_a_model_once_for_a_distribution(fake_world, monkeypatch):
    fake_world(WORLD)
    checked = []
    monkeypatch.setattr(
        checks,
        "check_equal",
        lambda variables, *others: checked.append(len(variables)),
    )
    with data_parallel().scope():
        model = make_model()
        checks.check_once(model, context_lib.current())
        checks.check_once(model, context_lib.current())
    assert checked == [2]
    with data_parallel().scope():
        checks.check_once(model, context_lib.current())
    assert checked == [2, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_unmatched_keys_warn_on_process_0(fake_world, monkeypatch, rank):
    fake_world(WORLD, rank)
    monkeypatch.setattr(checks, "check_equal", lambda *_: None)
    layout_map = LayoutMap(DeviceMesh((1, 2), ["batch", "model"], DEVICES))
    layout_map["kernel"] = (None, "model")
    with ModelParallel(layout_map=layout_map).scope():
        model = make_model()
        with pytest.warns(UserWarning) as record:
            checks.check_once(model, context_lib.current())
            # `pytest.warns` asks for one.
            warnings.warn("another", stacklevel=1)
    texts = [str(w.message) for w in record]
    assert sum("'kernel' of the layout map" in t for t in texts) == (not rank)
