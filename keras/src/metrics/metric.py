"""Overlay: what a metric is told inside a layer's call stays local.

States are reduced after each step, by what they are: what a layer's own code
reduces goes over all rows (see `distribution/own_code.py`), and a metric's
must not.
"""

from keras.src.api_export import keras_export
from keras.src.backend.torch.distribution import trials
from keras.src.metrics import metric as upstream

__all__ = ["Metric"]


@keras_export(["keras.Metric", "keras.metrics.Metric"])
class Metric(upstream.Metric):
    __doc__ = upstream.Metric.__doc__

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "update_state" in vars(cls):
            cls.update_state = trials.known(cls.update_state)
