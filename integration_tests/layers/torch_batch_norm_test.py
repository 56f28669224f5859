"""Batch norms of torch modules are of the global batch, as on one device."""

import numpy as np
import pytest
import torch
from torch import nn

import keras
from integration_tests import simulated_gpu
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops

pytestmark = [pytest.mark.world(4), pytest.mark.limit(90)]

BATCH, CHANNELS = 5, 3


class Twice(nn.Module):
    """Calls one norm twice, and by torch's own function."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(CHANNELS)
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("variance", torch.ones(CHANNELS))

    def forward(self, x):
        x = torch.tanh(self.norm(self.norm(x)))
        return torch.batch_norm(
            x, None, None, self.mean, self.variance, True, 0.2, 1e-4, False
        )


# A module of `CHANNELS` channels, and the shape of a row that it is handed.
CASES = {
    "rows": (lambda: nn.BatchNorm1d(CHANNELS), ()),
    "cumulative": (lambda: nn.BatchNorm1d(CHANNELS, momentum=None), (4,)),
    "not tracked": (
        lambda: nn.BatchNorm1d(CHANNELS, track_running_stats=False),
        (2,),
    ),
    "not affine": (lambda: nn.BatchNorm1d(CHANNELS, affine=False), (2,)),
    "in a stack": (
        lambda: nn.Sequential(
            nn.Conv2d(CHANNELS, 4, 2, bias=False),
            nn.BatchNorm2d(4, momentum=0.4),
            nn.ReLU(),
            nn.Conv2d(4, CHANNELS, 1, bias=False),
            nn.BatchNorm2d(CHANNELS),
        ),
        (4, 3),
    ),
    "volume": (lambda: nn.BatchNorm3d(CHANNELS, eps=1e-2), (2, 1, 3)),
    "twice": (Twice, (2,)),
    "instances": (
        lambda: nn.InstanceNorm1d(
            CHANNELS, affine=True, track_running_stats=True
        ),
        (4,),
    ),
}


def data(shape):
    # Of the last batch, data shards have no row. torch wants two values of a
    # channel; and its own gradient is wrong (2.13, CPU) for one row of volumes
    # with channels last in memory, as `EinsumDense` gives them.
    rows = 11 if len(shape) in (1, 2) else 12
    rng = np.random.default_rng(3)
    x = rng.standard_normal((rows, CHANNELS, *shape)) + 3.0
    return x.astype("float32"), rng.standard_normal((rows, 2)).astype("float32")


def make_model(make_module, shape):
    torch.manual_seed(5)
    model = keras.Sequential(
        [
            keras.Input((CHANNELS, *shape)),
            # Its gradient comes from all rows.
            layers.EinsumDense(
                "bc...,cd->bd...", (CHANNELS, *shape), name="up"
            ),
            layers.TorchModuleWrapper(make_module(), name="torch"),
            layers.Flatten(),
            layers.Dense(2, name="out"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.01), "mse", metrics=["mae"])
    return model


def state_of(model):
    return {
        name: ops.convert_to_numpy(value)
        for name, value in model.get_layer("torch").module.state_dict().items()
    }


def distributions():
    yield "data", keras.distribution.DataParallel()
    layouts = {".*up/kernel": (None, "model"), ".*out/kernel": ("model", None)}
    yield "both", parity.model_parallel((2, 2), layouts)


def check(make_module, shape, make_alone=None):
    x, y = data(shape)

    def program(model):
        arguments = {"batch_size": BATCH, "verbose": 0}
        history = model.fit(x, y, epochs=2, shuffle=False, **arguments)
        trained = state_of(model)
        loss = model.evaluate(x, y, **arguments)
        predictions = model.predict(x, **arguments)
        return history.history, trained, loss, predictions, state_of(model)

    expected = parity.run(
        program, lambda: make_model(make_alone or make_module, shape)
    )
    for name, distribution in distributions():
        actual = parity.run(
            program, lambda: make_model(make_module, shape), distribution
        )
        parity.assert_equal_on_all(name, actual, expected)


@pytest.mark.parametrize("case", CASES)
def test_training(case):
    check(*CASES[case])


def test_gradients():
    make_module, shape = CASES["in a stack"]
    x, y = data(shape)
    for _, distribution in distributions():
        parity.assert_parity(
            lambda: make_model(make_module, shape), x[:7], y[:7], distribution
        )


def test_synchronized():
    """torch runs it on GPUs only, where it counts uneven rows alike."""

    def make_module():
        return nn.SyncBatchNorm(CHANNELS)

    check(make_module, (2,), lambda: nn.BatchNorm1d(CHANNELS))


def test_half_precision():
    """Statistics and sums of half precision are of single precision."""
    x, y = data((2,))

    def program(model):
        return model.fit(x, y, batch_size=BATCH, verbose=0).history, state_of(
            model
        )

    def make():
        keras.config.set_dtype_policy("mixed_bfloat16")
        return make_model(lambda: nn.BatchNorm1d(CHANNELS), (2,))

    try:
        expected = parity.run(program, make)
        distribution = keras.distribution.DataParallel()
        actual = parity.run(program, make, distribution)
        parity.assert_same(actual, expected, tolerance=2e-2)
    finally:
        keras.config.set_dtype_policy("float32")


def test_one_value():
    """What torch refuses is what the global batch has too little of."""
    make_module, shape = CASES["rows"]
    x, y = data(shape)
    with keras.distribution.DataParallel().scope():
        model = make_model(make_module, shape)
        outcomes = everyone.outcomes(lambda: model.train_on_batch(x[:1], y[:1]))
        assert all("more than 1 value" in outcome for outcome in outcomes)


@simulated_gpu.needs_storages
def test_files(tmp_path):
    """Running statistics are kept with the weights."""
    make_module, shape = CASES["in a stack"]
    x, y = data(shape)

    def make():
        return make_model(make_module, shape)

    for name, distribution in distributions():
        with distribution.scope():
            model = make()
            model.fit(x, y, batch_size=BATCH, verbose=0)
            expected = model.predict(x, verbose=0)
            model.save_weights(tmp_path / f"{name}.weights.h5")
            model.save(tmp_path / f"{name}.keras")
            other = make()
            again = keras.models.load_model(
                tmp_path / f"{name}.keras", safe_mode=False
            )
            other.predict(x, verbose=0)
            other.load_weights(tmp_path / f"{name}.weights.h5")
            for each in (other, again):
                parity.assert_same(each.predict(x, verbose=0), expected)
                parity.assert_same(state_of(each), state_of(model))


def test_unlike_buffers(rank):
    """Running statistics that differ at the start would go on differing."""

    def make_module():
        module = nn.BatchNorm1d(CHANNELS)
        module.running_mean += rank
        return module

    x, y = data(())
    with keras.distribution.DataParallel().scope():
        model = make_model(make_module, ())
        outcomes = everyone.outcomes(lambda: model.fit(x, y, verbose=0))
        for outcome in outcomes:
            assert "running_mean" in outcome
