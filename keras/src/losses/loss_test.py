"""What the overlay makes of losses: on threads that play data shards.

Released Keras's own values are those of one device.
"""

import itertools
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist

from keras.src import losses
from keras.src.backend.common import global_state
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.losses import loss as loss_module
from keras_torch_distribution.src.losses import loss as overlay

SHARDS = 3
REDUCTIONS = (
    "sum_over_batch_size",
    "mean",
    "mean_with_sample_weight",
    "sum",
    "none",
    None,
)


def test_overlay_is_in_place():
    assert loss_module.reduce_values is overlay.reduce_values
    assert loss_module.apply_mask is overlay.apply_mask


def batch(total, has_weights, has_mask, time=None):
    generator = np.random.default_rng(total)
    shape = (total,) if time is None else (total, time)
    y, y_pred = generator.normal(size=(2, *shape, 2)).astype("float32")
    weights = mask = None
    if has_weights:
        weights = generator.uniform(size=shape).astype("float32")
    if has_mask:
        mask = generator.uniform(size=shape) > 0.4
        mask[0] = True
    return y, y_pred, weights, mask


def call(loss, y, y_pred, weights, mask):
    """The loss, and the gradient of the predictions."""
    y_pred = torch.tensor(y_pred, requires_grad=True)
    values = y_pred * 1.0
    if mask is not None:
        values._keras_mask = torch.tensor(mask)
    value = loss(torch.tensor(y), values, sample_weight=weights)
    value.sum().backward()
    return value.detach(), y_pred.grad


CASES = list(
    itertools.product(REDUCTIONS, (False, True), (False, True), (None, 4))
)


@pytest.mark.parametrize("reduction, has_weights, has_mask, time", CASES)
def test_without_a_distribution(
    no_world, monkeypatch, reduction, has_weights, has_mask, time
):
    inputs = batch(5, has_weights, has_mask, time)
    loss = losses.MeanSquaredError(reduction=reduction)
    value, grad = call(loss, *inputs)
    for name in ("reduce_values", "apply_mask"):
        released = getattr(overlay, f"released_{name}")
        monkeypatch.setattr(loss_module, name, released)
    expected_value, expected_grad = call(loss, *inputs)
    assert torch.equal(value, expected_value)
    assert torch.equal(grad, expected_grad)


def on_shards(on_threads, total, function):
    """Results of `function(start, stop)` in a step, by data shard."""

    def run(rank):
        context = types.SimpleNamespace(
            data_size=SHARDS, data_index=rank, data_group=dist.group.WORLD
        )
        # As `set_distribution` does, for this thread.
        global_state.set_global_attribute(
            "distribution",
            types.SimpleNamespace(**{marks.CONTEXT: context}),
        )
        start, stop = rows.split(total, SHARDS, rank)
        ours = rows.split_evenly(total, SHARDS, rank)
        with rows.current_rows(ours):
            return ours.weight, function(start, stop)

    return on_threads(SHARDS, run)


# Even shards, an uneven one, and one without rows.
@pytest.mark.parametrize("total", [6, 5, 2])
@pytest.mark.parametrize("reduction, has_weights, has_mask, time", CASES)
def test_weighted_mean_over_shards_is_the_loss_of_the_batch(
    on_threads, total, reduction, has_weights, has_mask, time
):
    inputs = batch(total, has_weights, has_mask, time)
    loss = losses.MeanSquaredError(reduction=reduction)
    expected_value, expected_grad = call(loss, *inputs)

    def ours(start, stop):
        pieces = [None if x is None else x[start:stop] for x in inputs]
        return call(loss, *pieces)

    results = on_shards(on_threads, total, ours)
    grads = torch.cat([weight * grad for weight, (_, grad) in results])
    if reduction in (None, "none"):
        # Nothing is reduced, and a mask counts as in a sum.
        value = torch.cat([value for _, (value, _) in results])
        grads = torch.cat([grad for _, (_, grad) in results])
    else:
        value = sum(weight * value for weight, (value, _) in results)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(grads, expected_grad)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean"])
def test_all_entries_masked(on_threads, reduction):
    y, y_pred, _, mask = batch(6, False, True, 4)
    mask[:] = False
    loss = losses.MeanSquaredError(reduction=reduction)

    def ours(start, stop):
        return call(
            loss, y[start:stop], y_pred[start:stop], None, mask[start:stop]
        )

    for _, (value, grad) in on_shards(on_threads, 6, ours):
        assert value == 0.0
        assert not grad.any()


def test_outside_of_a_step_a_loss_is_local(on_threads):
    y, y_pred, weights, mask = batch(6, True, True)
    loss = losses.MeanSquaredError(reduction="sum")
    expected, _ = call(loss, y, y_pred, weights, mask)

    def ours(start, stop):
        with rows.current_rows(None):
            return call(loss, y, y_pred, weights, mask)[0]

    for _, value in on_shards(on_threads, 6, ours):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "int32"]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (0, 3)])
def test_a_loss_is_reduced_as_by_keras(shape, reduction, dtype):
    values = torch.arange(float(np.prod(shape))).reshape(shape) / 3
    values = values.to(getattr(torch, dtype))
    found = [
        function(values, None, reduction)
        for function in (overlay.reduce_values, overlay.released_reduce_values)
    ]
    assert found[0].dtype == found[1].dtype
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
