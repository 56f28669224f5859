"""Overlay: a number that each data shard reports counts with its rows.

Weighted with our share of the rows, the sum over data shards is that of the
global batch, and counts once.
"""

from keras.src.distribution import processes
from keras.src.metrics import reduction_metrics as upstream

__all__ = ["reduce_to_samplewise_values"]

released_reduce_to_samplewise_values = upstream.reduce_to_samplewise_values


def reduce_to_samplewise_values(values, sample_weight, reduce_fn, dtype):
    """As Keras's; a number of a data shard weighs its share of the rows."""
    share = processes.share_of_rows()
    is_number = not len(getattr(values, "shape", ()))
    if share is not None and is_number and sample_weight is None:
        sample_weight = share
    return released_reduce_to_samplewise_values(
        values, sample_weight, reduce_fn, dtype
    )
