"""Overlay: elementwise optimizers run on local shards.

Slots are laid out like their variable, so a shard of the update needs nothing
of the other shards.
"""

from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.variables import storage
from keras.src.backend.torch.optimizers import (
    torch_parallel_optimizer as upstream,
)
from keras.src.utils import torch_utils

__all__ = ["TorchParallelOptimizer"]


class TorchParallelOptimizer(upstream.TorchParallelOptimizer):
    @torch_utils.no_grad
    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        grads = storage.local_gradients(grads, trainable_variables)
        with modes.local_shards():
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )

    @torch_utils.no_grad
    def _backend_reset_gradient_accumulators(self):
        with modes.local_shards():
            super()._backend_reset_gradient_accumulators()

    @torch_utils.no_grad
    def _backend_increment_gradient_accumulators(self, grads, acc_grads):
        grads = storage.local_gradients(grads, acc_grads)
        with modes.local_shards():
            super()._backend_increment_gradient_accumulators(grads, acc_grads)
