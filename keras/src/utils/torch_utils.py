"""Overlay: torch modules look at the rows of the global batch."""

from keras.src.api_export import keras_export
from keras.src.backend.torch.distribution import batch_norm
from keras.src.backend.torch.distribution import trials
from keras.src.utils import torch_utils as upstream

__all__ = ["TorchModuleWrapper"]


@keras_export("keras.layers.TorchModuleWrapper")
class TorchModuleWrapper(upstream.TorchModuleWrapper):
    __doc__ = upstream.TorchModuleWrapper.__doc__

    def call(self, *args, training=None, **kwargs):
        scope = batch_norm.over_global_rows
        if trials.is_trial():
            scope = batch_norm.in_trial
        with scope(self.module):
            return super().call(*args, training=training, **kwargs)
