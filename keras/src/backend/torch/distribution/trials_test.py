"""What a trial finds in functions: on one process, of no distribution."""

import pytest
import torch

import keras
from keras import ops
from keras.src.backend.torch.distribution import rows
from keras.src.backend.torch.distribution import trials
from keras.src.backend.torch.distribution.trials import ALONG_ROWS
from keras.src.backend.torch.distribution.trials import COUNT
from keras.src.backend.torch.distribution.trials import GATHER
from keras.src.backend.torch.distribution.trials import MEAN
from keras.src.backend.torch.distribution.trials import SUM

LOCAL = 4


def kinds(trial):
    """`{name of a function: kinds of its calls that have to do with rows}`."""
    return {
        name: [found[i].kind for i in sorted(found)]
        for (_, name), found in trial.found.items()
    }


def run(function, *args):
    with rows.current_rows(rows.Rows(LOCAL, 7, 0)):
        return trials.run(function, args, {})


def tensor(*shape):
    return torch.zeros(LOCAL, *shape)


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda x: x.sum(), {"sum": [SUM]}),
        (lambda x: ops.mean(x, axis=0), {"mean": [MEAN]}),
        (lambda x: ops.mean(x, axis=(1, 2)), {}),
        (lambda x: ops.sum(ops.mean(x, axis=0)), {"mean": [MEAN]}),
        # As many steps as rows: what is reduced is not the rows.
        (lambda x: ops.transpose(x, (1, 0, 2)).mean(0), {}),
        (lambda x: x.transpose(0, 1).mean(1), {"mean": [MEAN]}),
        (lambda x: x.reshape(-1, 3).sum(0), {"sum": [SUM]}),
        (lambda x: x.sum(-1).sum(-1), {}),
        (lambda x: torch.amax(x, 0), {"amax": [GATHER]}),
        (lambda x: x.softmax(0), {"softmax": [ALONG_ROWS]}),
        (lambda x: x.softmax(-3), {"softmax": [ALONG_ROWS]}),
        (lambda x: x.softmax(-1), {}),
        (lambda x: x.cumsum(dim=0), {"cumsum": [ALONG_ROWS]}),
        (lambda x: torch.einsum("bti,btj->ij", x, x), {"einsum": [SUM]}),
        (lambda x: x / len(x), {"div": [COUNT]}),
        (lambda x: x / x.numel(), {"div": [COUNT]}),
        (lambda x: x * (1 / x.shape[0]), {"mul": [COUNT]}),
        (lambda x: x / x.shape[1], {}),
        (lambda x: x * 1009.5 - 1e9, {}),
        (lambda x: torch.zeros(LOCAL, 3).sum(), {}),
        # Tensors of the CPU, which meta ones do not meet.
        (lambda x: (x[:, 0] * torch.arange(3)).sum(), {"sum": [SUM]}),
        (lambda x: torch.nn.functional.mse_loss(x, x), {"mse_loss": [MEAN]}),
        (
            lambda x: torch.nn.functional.mse_loss(x, x, reduction="sum"),
            {"mse_loss": [SUM]},
        ),
    ],
)
def test_what_is_found(function, expected):
    trial = run(function, tensor(LOCAL, 3))
    assert not trial.failed
    assert kinds(trial) == expected


def test_calls_are_numbered_by_name():
    def function(x):
        return x.sum(-1), x.sum(), x.sum(1), x.sum()

    found = run(function, tensor(3)).found[None, "sum"]
    assert sorted(found) == [1, 3]


def test_what_is_returned():
    assert run(lambda x: x * 2, tensor(3)).returns_rows
    assert not run(lambda x: x.sum(), tensor(3)).returns_rows


def test_rows_that_meet_rows():
    assert run(lambda x: x @ x.T, tensor(3)).mixes
    assert not run(lambda x: x.T @ x, tensor(3)).mixes


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[x > 0].sum(),
        lambda x: x * float(x[0, 0]),
        lambda x: 1 / 0,
    ],
)
def test_failures_are_told(function):
    trial = run(function, tensor(3))
    assert "Error" in trial.failed or "Exception" in trial.failed


def test_known_code_is_left_alone():
    known = trials.known(lambda x: x.sum())

    def function(x):
        return known(x) + x.mean()

    trial = run(function, tensor(3))
    assert kinds(trial) == {"mean": [MEAN]}
    assert trial.uses_losses
    assert known(tensor(3)) == 0.0


def test_nothing_stays_behind():
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.layers.Dropout(0.5)])
    layer = model.layers[0]
    seed = layer.seed_generator.state.numpy().copy()
    state = torch.get_rng_state()

    def function(x):
        torch.rand(3)
        return model(x, training=True).sum()

    trial = run(function, tensor(3))
    assert kinds(trial) == {"sum": [SUM]}
    assert torch.equal(torch.get_rng_state(), state)
    assert (layer.seed_generator.state.numpy() == seed).all()
    assert not trials.is_watched()
    assert keras.src.backend.torch.core.get_device() != "meta"


def test_a_prime_that_no_size_is_a_multiple_of():
    trial = run(lambda x: x.sum(-1), tensor(1009))
    assert not trial.found
    with rows.current_rows(rows.Rows(LOCAL, 7, 0)):
        trial = trials.run(lambda x: x.sum(), (tensor(3),), {}, {1009, 7919})
    assert kinds(trial) == {"sum": [SUM]}
