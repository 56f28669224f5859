"""Overlay: process 0 alone writes for TensorBoard."""

from keras.src import ops
from keras.src.callbacks import tensorboard as upstream
from keras.src.distribution import files as file_utils
from keras.src.distribution import processes

__all__ = ["TensorBoard", "file_utils"]


class TensorBoard(upstream.TensorBoard):
    __doc__ = upstream.TensorBoard.__doc__

    # With `histogram_freq` or `embeddings_freq` collective at the end of an
    # epoch: every process has the callback. Without, process 0 alone may.

    @property
    def summary(self):
        if self._summary_module is None:
            # Imported by all: where it is missing, none goes on alone.
            module = super().summary
            if processes.is_distributed():
                if not processes.is_writer():
                    module = _Silence()
                self._summary_module = _OfWholeWeights(module)
        return self._summary_module

    def _write_keras_model_summary(self):
        if not file_utils.is_other():
            super()._write_keras_model_summary()

    def _log_weight_as_image(self, weight, weight_name, epoch):
        if processes.is_distributed():
            weight = ops.convert_to_tensor(ops.convert_to_numpy(weight))
        super()._log_weight_as_image(weight, weight_name, epoch)


class _OfWholeWeights:
    """TensorFlow's module of summaries, handed whole weights."""

    def __init__(self, module):
        self._module = module

    def histogram(self, name, data, **kwargs):
        """Collective if `data` is sharded: every process calls it."""
        return self._module.histogram(
            name, ops.convert_to_numpy(data), **kwargs
        )

    def __getattr__(self, name):
        return getattr(self._module, name)


class _Silence:
    """Stands for a module, its functions and writers; does nothing."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None
