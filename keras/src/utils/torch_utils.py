"""Overlay: torch modules look at the rows of the global batch."""

from keras.src.api_export import keras_export
from keras.src.utils import torch_utils as upstream

__all__ = ["TorchModuleWrapper"]


@keras_export("keras.layers.TorchModuleWrapper")
class TorchModuleWrapper(upstream.TorchModuleWrapper):
    __doc__ = upstream.TorchModuleWrapper.__doc__

    def call(self, *args, training=None, **kwargs):
        # Here, as Keras imports this file on each backend.
        from keras.src.backend.torch.distribution.batch import batch_norm

        with batch_norm.without_own_synchronization(self.module):
            return super().call(*args, training=training, **kwargs)
