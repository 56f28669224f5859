"""Overlay: metrics of Keras's own count local rows.

In a step in which code sees the global batch (see `distribution/global_rows`),
an update of a metric of Keras's own runs on local rows, and its result is put
off until the states of all data shards are known. A metric of the user's own is
handed the global batch.
"""

import functools

from keras.src.api_export import keras_export
from keras.src.distribution import processes
from keras.src.metrics import metric as upstream

__all__ = ["Metric"]


@keras_export(["keras.Metric", "keras.metrics.Metric"])
class Metric(upstream.Metric):
    __doc__ = upstream.Metric.__doc__

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "update_state" in vars(cls):
            cls.update_state = _on_local_rows(cls.update_state)
        if "result" in vars(cls):
            cls.result = _put_off(cls.result)


def _on_local_rows(update_state):
    @functools.wraps(update_state)
    def update(self, *args, **kwargs):
        function = functools.partial(update_state, self)
        return processes.call_metric(self, function, args, kwargs)

    return update


def _put_off(result):
    @functools.wraps(result)
    def put_off_result(self):
        return processes.metric_result(self, functools.partial(result, self))

    return put_off_result
