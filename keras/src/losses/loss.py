"""Overlay: losses of local rows whose weighted mean is the global loss.

In a step, the loss of a data shard is such that the mean over shards, weighted
with their rows, is the loss of the global batch (see `mesh/rows.py` there). A
mean over rows is that already. A divisor that is not the number of rows must be
our share of the global one, and a sum must be extrapolated to all rows.
Losses of the user's own are computed on the global batch (see
`distribution/global_rows`).
"""

import math

from keras.src import backend
from keras.src import ops
from keras.src.api_export import keras_export
from keras.src.distribution import processes
from keras.src.losses import loss as upstream

__all__ = ["Loss", "apply_mask", "reduce_values"]

ReleasedLoss = upstream.Loss
released_apply_mask = upstream.apply_mask
released_reduce_values = upstream.reduce_values

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


@keras_export(["keras.Loss", "keras.losses.Loss"])
class Loss(upstream.Loss):
    __doc__ = upstream.Loss.__doc__

    def __call__(self, y_true, y_pred, sample_weight=None):
        return processes.call_loss(
            self, super().__call__, y_true, y_pred, sample_weight
        )


def reduce_values(values, sample_weight=None, reduction="sum_over_batch_size"):
    """As Keras's.

    Collective in a step with `"mean_with_sample_weight"` and sample weights:
    every process of the data axis calls it.
    """
    share = processes.share_of_rows()
    if share is None or tuple(values.shape) == ():
        return _reduce(values, sample_weight, reduction)
    if reduction == "sum":
        return ops.sum(values) / share if share else ops.sum(values) * 0
    if reduction == "mean_with_sample_weight" and sample_weight is not None:
        return ops.divide_no_nan(
            ops.sum(values),
            processes.share_of_sum(ops.sum(sample_weight), values.dtype),
        )
    if reduction in MEANS and not values.shape[0]:
        return ops.sum(values)  # No local row: zero, that has a gradient.
    return _reduce(values, sample_weight, reduction)


def _reduce(values, sample_weight, reduction):
    """As Keras's, which makes a tensor of the number of values, and asks it
    whether it is zero: on a GPU the host waits for that."""
    has_weights = reduction == MEANS[2] and sample_weight is not None
    is_mean = reduction in MEANS and not has_weights
    if is_mean and backend.backend() != "tensorflow":
        sizes = tuple(values.shape)
        if (
            sizes
            and all(type(size) is int and size > 0 for size in sizes)
            # Others Keras promotes.
            and str(values.dtype).endswith("float32")
        ):
            return ops.sum(values) / math.prod(sizes)
    return released_reduce_values(values, sample_weight, reduction)


def apply_mask(sample_weight, mask, dtype, reduction):
    """As Keras's.

    Collective in a step with a mask and a mean: every process of the data axis
    calls it.
    """
    share = processes.share_of_rows()
    if share is None or mask is None or reduction not in MEANS[:2]:
        return released_apply_mask(sample_weight, mask, dtype, reduction)
    # Valid entries weigh `total / valid`, as released Keras has it.
    mask = ops.cast(mask, dtype)
    total = ops.cast(ops.size(mask), dtype)
    valid = processes.share_of_sum(ops.sum(mask), mask.dtype)
    weights = mask * ops.divide_no_nan(total, valid)
    if sample_weight is None:
        return weights
    weights, sample_weight = upstream.squeeze_or_expand_to_same_rank(
        weights, ops.cast(sample_weight, dtype)
    )
    # In place, as released Keras has it: the metrics of the step see it.
    sample_weight *= weights
    return sample_weight
