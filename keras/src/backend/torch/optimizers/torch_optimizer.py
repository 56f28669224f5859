"""Overlay: weight decay on local shards, updates on sharded variables."""

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution import sharded
from keras.src.backend.torch.distribution import storage
from keras.src.backend.torch.distribution.context import current
from keras.src.backend.torch.optimizers import torch_optimizer as upstream
from keras.src.utils import torch_utils

__all__ = ["TorchOptimizer"]


class TorchOptimizer(upstream.TorchOptimizer):
    def apply(self, grads, trainable_variables=None):
        if current() is None:
            super().apply(grads, trainable_variables)
            return
        # Gradients, slots and weights are equal on all data shards, so they
        # may meet sharded ones on any mesh, also on one without model axes.
        with sharded.implicit_replication():
            super().apply(grads, trainable_variables)

    @torch_utils.no_grad
    def _apply_weight_decay(self, variables):
        with modes.local_shards():
            super()._apply_weight_decay(variables)

    def add_variable_from_reference(self, reference_variable, *args, **kwargs):
        variable = super().add_variable_from_reference(
            reference_variable, *args, **kwargs
        )
        reference = getattr(reference_variable, "_value", None)
        if isinstance(reference, DTensor) and not isinstance(
            variable._value, DTensor
        ):
            # A torch module's own DTensor, which no layout describes.
            variable._value = torch.nn.Parameter(
                storage.shard(
                    variable._value.detach(),
                    reference.device_mesh,
                    reference.placements,
                ),
                requires_grad=False,
            )
        return variable
