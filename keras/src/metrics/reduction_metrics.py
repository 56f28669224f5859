"""Overlay: a number that each data shard reports counts with its rows.

A train step of one's own tells a metric its loss, `tracker.update_state(loss)`:
that of local rows. Weighted with our share of the rows, the sum over data
shards is the loss of the global batch, and counts once.
"""

from keras.src.backend.torch.distribution import rows
from keras.src.backend.torch.distribution.context import current
from keras.src.metrics import reduction_metrics as upstream

__all__ = ["reduce_to_samplewise_values"]

released_reduce_to_samplewise_values = upstream.reduce_to_samplewise_values


def reduce_to_samplewise_values(values, sample_weight, reduce_fn, dtype):
    context = current()
    in_step = context is not None and rows.get_current_rows() is not None
    is_number = not len(getattr(values, "shape", ()))
    if in_step and is_number and sample_weight is None:
        sample_weight = rows.weight(context)
    return released_reduce_to_samplewise_values(
        values, sample_weight, reduce_fn, dtype
    )
