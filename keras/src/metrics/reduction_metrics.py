"""Overlay: a number that each data shard reports counts with its rows, and
what a function of the user's own reduces goes over all rows.

A train step of one's own tells a metric its loss, `tracker.update_state(loss)`:
that of local rows. Weighted with our share of the rows, the sum over data
shards is the loss of the global batch, and counts once.
"""

import functools

from keras.src.api_export import keras_export
from keras.src.backend.torch.distribution import own_code
from keras.src.backend.torch.distribution import rows
from keras.src.backend.torch.distribution.context import current
from keras.src.metrics import reduction_metrics as upstream

__all__ = ["MeanMetricWrapper", "reduce_to_samplewise_values"]

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


@keras_export("keras.metrics.MeanMetricWrapper")
class MeanMetricWrapper(upstream.MeanMetricWrapper):
    __doc__ = upstream.MeanMetricWrapper.__doc__

    def update_state(self, y_true, y_pred, sample_weight=None):
        function = self._fn
        module = getattr(function, "__module__", None) or ""
        if module.startswith("keras.src."):
            return super().update_state(y_true, y_pred, sample_weight)

        def over_all_rows(*args, **kwargs):
            call = functools.partial(function, **kwargs)
            return own_code.run(self, call, *args)[0]

        self._fn = over_all_rows
        try:
            return super().update_state(y_true, y_pred, sample_weight)
        finally:
            self._fn = function
