"""Overlay: masked batch statistics too are those of the global batch."""

from keras.src import backend
from keras.src import ops
from keras.src.api_export import keras_export
from keras.src.distribution import processes
from keras.src.layers.normalization import batch_normalization as upstream

__all__ = ["BatchNormalization"]


@keras_export("keras.layers.BatchNormalization")
class BatchNormalization(upstream.BatchNormalization):
    __doc__ = upstream.BatchNormalization.__doc__

    def __init__(self, *args, synchronized=False, **kwargs):
        # Released Keras refuses it here; statistics are global without it.
        super().__init__(*args, **kwargs)
        self.synchronized = synchronized

    def _moments(self, inputs, mask):
        axes = self._reduction_axes
        if mask is None or not processes.spans_rows(
            inputs, axes, self.synchronized
        ):
            return super()._moments(inputs, mask)
        valid = ops.cast(ops.expand_dims(mask, axis=-1), "bool")
        valid = ops.broadcast_to(valid, ops.shape(inputs))
        # Of x minus a shift that all shards share, which keeps the squares
        # small: released Keras subtracts the mean itself.
        shift = ops.copy(ops.cast(self.moving_mean, inputs.dtype))
        shape = [1] * len(inputs.shape)
        shape[self.axis] = inputs.shape[self.axis]
        shift = ops.reshape(shift, shape)
        shifted = ops.where(valid, inputs - shift, 0)
        sums = ops.stack(
            [
                ops.sum(x, axes, keepdims=True)
                for x in (
                    shifted,
                    ops.square(shifted),
                    ops.cast(valid, inputs.dtype),
                )
            ]
        )
        total, squares, count = processes.sum_over_rows(sums)
        weight = count + backend.epsilon()
        # As released Keras has it: sum(x) / weight, and with that mean
        # sum((x - mean)^2) / weight.
        mean = (total + shift * count) / weight
        off = mean - shift
        variance = (
            squares - 2 * off * total + ops.square(off) * count
        ) / weight
        return ops.squeeze(mean), ops.squeeze(variance)
