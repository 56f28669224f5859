"""Overlay: updates of sharded variables, on local shards where they can be.

Optimizers that Keras has a parallel version of: `torch_parallel_optimizer`.
"""

import torch
from torch.distributed.tensor import DTensor

from keras.src import ops
from keras.src import optimizers
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.training import accumulation
from keras.src.backend.torch.distribution.variables import storage
from keras.src.backend.torch.distribution.variables import weight_sums
from keras.src.backend.torch.optimizers import by_norms
from keras.src.backend.torch.optimizers import torch_optimizer as upstream
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.utils import torch_utils

__all__ = ["TorchOptimizer"]


class TorchOptimizer(upstream.TorchOptimizer):
    def _only_adds_up(self):
        """Whether `apply` only adds gradients to accumulators, in a step
        without an update."""
        return bool(
            self.built
            and self.gradient_accumulation_steps
            and self.loss_scale_factor is None
            and self.apply.__func__ is TorchOptimizer.apply
            and type(self)._backend_apply_gradients
            is BaseOptimizer._backend_apply_gradients
            and not any(
                self._overwrite_variable_with_gradient(v)
                for v in self._trainable_variables
            )
        )

    def apply(self, grads, trainable_variables=None):
        if self.gradient_accumulation_steps and self.built:
            if not in_stateless_scope():
                accumulation.settle(self)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        variables = trainable_variables or self._trainable_variables
        if current() is None or not any(
            isinstance(getattr(v, "_value", None), DTensor) for v in variables
        ):
            super().apply(grads, trainable_variables)
            return
        # Gradients, slots and weights are equal on all data shards, so they
        # may meet sharded ones on any mesh, also on one without model axes.
        with sharded.implicit_replication(), modes.updating():
            super().apply(grads, trainable_variables)

    @torch_utils.no_grad
    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        update = None
        if current() is not None and not in_stateless_scope():
            update = by_norms.update_of(self, trainable_variables)
        if update is not None:
            by_norms.update(
                update, self, grads, trainable_variables, learning_rate
            )
            return
        if type(self) not in _elementwise() or in_stateless_scope():
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
            return
        grads = storage.local_gradients(grads, trainable_variables)
        with modes.local_shards():
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )

    def save_own_variables(self, store):
        if not getattr(store, "takes_variables", False):
            super().save_own_variables(store)
            return
        # Released Keras hands over numpy arrays, each of the whole.
        for i, variable in enumerate(self.variables):
            store[str(i)] = variable

    def _clip_gradients(self, grads):
        """As Keras's; norms of sharded gradients in one small all-reduce.

        Collective if a gradient is sharded: every process calls it.
        """
        present = [g for g in grads if g is not None]
        if not (
            self.clipnorm or self.global_clipnorm
        ) or not weight_sums.are_on_one_mesh(present):
            return super()._clip_gradients(grads)
        squares = weight_sums.squared_norms(present)
        if self.clipnorm and self.clipnorm > 0:
            present = [
                g * self.clipnorm / torch.sqrt(square).clamp(self.clipnorm)
                for g, square in zip(present, squares)
            ]
        elif self.global_clipnorm and self.global_clipnorm > 0:
            limit = self.global_clipnorm
            norm = torch.sqrt(ops.sum(ops.stack(squares)))
            scale = limit * torch.clamp(1.0 / norm, max=1.0 / limit)
            # NaN for a norm that is not finite, as in Keras.
            scale = scale + (norm - norm)
            present = [g * scale for g in present]
        clipped = iter(present)
        return [None if g is None else next(clipped) for g in grads]

    def assign(self, variable, value):
        if modes.is_local():
            variable.value.copy_(value)
        else:
            super().assign(variable, value)

    def assign_add(self, variable, value):
        if modes.is_local():
            variable.value.add_(value)
        else:
            super().assign_add(variable, value)

    def assign_sub(self, variable, value):
        if modes.is_local():
            variable.value.sub_(value)
        else:
            super().assign_sub(variable, value)

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


def _elementwise():
    """Keras's own optimizers whose update of an entry needs no other entry."""
    return optimizers.Ftrl, optimizers.ScheduleFreeAdamW
