"""Overlay: Orbax knows JAX's processes alone, and says so."""

from keras.src.api_export import keras_export
from keras.src.callbacks import orbax_checkpoint as upstream
from keras.src.distribution import processes

__all__ = ["OrbaxCheckpoint"]


@keras_export("keras.callbacks.OrbaxCheckpoint")
class OrbaxCheckpoint(upstream.OrbaxCheckpoint):
    __doc__ = upstream.OrbaxCheckpoint.__doc__

    def __init__(self, directory, *args, **kwargs):
        _check_alone(directory)
        super().__init__(directory, *args, **kwargs)

    def set_model(self, model):
        _check_alone(self.directory)
        super().set_model(model)


def _check_alone(directory):
    # Every process would write the same folder as if it were alone.
    if processes.is_distributed():
        raise NotImplementedError(
            "`OrbaxCheckpoint` does not work with several processes on the "
            "torch backend. Use `keras.callbacks.ShardedCheckpoint`, which "
            "takes the same arguments, or `keras.callbacks.ModelCheckpoint` "
            "for a file that one device loads. Received: "
            f"directory={directory}"
        )
