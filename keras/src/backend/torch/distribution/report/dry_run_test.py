import numpy as np
import pytest
import torch
import torch.distributed as dist

import keras
from keras import layers
from keras.src.backend.torch.distribution.report.memory import Memory


@pytest.fixture(autouse=True)
def new_session(no_world):
    keras.utils.clear_session(free_memory=False)


def distribution(shape=(2, 2), **layouts):
    devices = [f"cpu:{i}" for i in range(shape[0] * shape[1])]
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    for name, axes in layouts.items():
        layout_map[f".*{name}/kernel"] = axes
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def make():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, "relu", name="up"),
            layers.Dropout(0.5),
            layers.Dense(4, name="down"),
        ]
    )
    model.compile("adam", "mse", metrics=["mae"])
    return model


def listed(report):
    return [
        (c["op"], c["axes"], c["for"], c["layer"], c["direction"])
        for c in report.facts["collectives"]
    ]


COLUMN_ROW = {"up": (None, "model"), "down": ("model", None)}


def test_what_a_step_communicates():
    report = keras.distribution.report(
        make, 6, distribution=distribution(**COLUMN_ROW)
    )
    row = ("all_reduce", "model", "activations", "sequential/down", "forward")
    assert listed(report).count(row) == 1
    # Each data shard has three of six rows.
    found = report.facts["collectives"][listed(report).index(row)]
    assert found["shapes"] == [[3, 4]] and found["bytes"] == 48
    assert [c for c in report.facts["collectives"] if c["axes"] == "all"]
    gradients = [c for c in report.facts["collectives"] if c["axes"] == "batch"]
    assert {c["for"] for c in gradients} == {"gradients"}
    assert report.facts["rows"] == 6 and report.facts["steady"]
    assert report.facts["peak"] > 0
    assert report.facts["slots"]["optimizer"] == "Adam"


def test_nothing_is_left_behind():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    keras.distribution.report(make, 6, distribution=distribution(**COLUMN_ROW))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert keras.distribution.distribution() is None
    assert not dist.is_initialized()
    assert make().name == "sequential"


def test_models():
    one = keras.distribution.report(make, 6, distribution=distribution())
    other = keras.distribution.report(make(), 6, distribution=distribution())
    assert [c["bytes"] for c in one.facts["collectives"]] == [
        c["bytes"] for c in other.facts["collectives"]
    ]

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3, name="up")

        def call(self, x):
            return self.dense(x)

    def make_own():
        return Own()

    cut = distribution(up=(None, "model"))
    with pytest.raises(ValueError, match="Pass `x`"):
        keras.distribution.report(make_own, 6, distribution=cut)
    x = np.ones((6, 5), "float32")
    report = keras.distribution.report(make_own, x=x, distribution=cut)
    assert report.facts["compiled"] is False and report.facts["rows"] == 6
    with pytest.raises(ValueError, match="Pass `distribution`"):
        keras.distribution.report(make, 6)


def test_accumulated_steps_count_together():
    def accumulating():
        model = make()
        model.compile(
            keras.optimizers.SGD(gradient_accumulation_steps=3), "mse"
        )
        return model

    report = keras.distribution.report(
        accumulating, 6, distribution=distribution(**COLUMN_ROW)
    )
    assert report.facts["steady"]
    directions = [c["direction"] for c in report.facts["collectives"]]
    names = [c["layer"] for c in report.facts["collectives"]]
    assert names.count("sequential/down") == 3 and "backward" in directions


def test_memory():
    memory = Memory()
    kept = torch.ones(256)

    def made(x, *args):
        memory.before()
        memory.see(x, args, {})
        return x

    x = made(torch.ones(1024))
    made(x.view(32, 32), x)
    made(kept.add_(1), kept)
    assert memory.live == 4096
    y = made(x.requires_grad_().exp(), x)
    z = made(y.sum(), y)
    del y
    memory.before()
    assert memory.live == 2 * 4096 + 4  # autograd has it
    del z
    assert memory.live == 4096 and memory.peak == 2 * 4096 + 4
    x = None
    empty = made(torch.empty(64))
    empty.untyped_storage().resize_(0)
    memory.before()
    assert memory.live == 0
