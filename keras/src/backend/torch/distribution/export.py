"""Models leave Keras as one device has them."""

import contextlib
import functools

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import files
from keras.src.backend.torch.distribution import process_group
from keras.src.backend.torch.distribution import storage
from keras.src.backend.torch.distribution.context import current
from keras.src.distribution import distribution_lib


def by_one_device(export):
    """Wraps a function that traces a model and writes what it does to a file.

    Process 0 alone traces it, with whole weights and without a distribution.
    If it fails there, all raise; when it returns, the file is there.

    Collective under a distribution: every process calls it.
    """

    @functools.wraps(export)
    def export_once(model, filepath, *args, **kwargs):
        if current() is None:
            return export(model, filepath, *args, **kwargs)
        is_first = process_group.is_first()
        with _whole_weights(model, is_first):
            files.on_all(
                lambda: is_first and export(model, filepath, *args, **kwargs),
                filepath,
                errors=Exception,
            )
        return filepath

    return export_once


@contextlib.contextmanager
def _whole_weights(model, keeps):
    """Within it, there is no distribution, and variables hold whole values.

    Collective: every process enters it.

    Args:
        model: the model.
        keeps: bool, whether this process needs the values.
    """
    stored, tracked = [], []
    distribution = distribution_lib.distribution()
    try:
        for variable in model.variables:
            if isinstance(variable._value, DTensor):
                value, sharded = storage.whole(variable._value), variable._value
                if keeps:
                    stored.append((variable, sharded))
                    variable._value = torch.nn.Parameter(
                        value, requires_grad=sharded.requires_grad
                    )
        for layer in model._flatten_layers() if keeps else ():
            # The parameters that torch finds.
            if hasattr(layer, "_torch_params"):
                tracked.append((layer, layer._torch_params))
                layer._track_variables()
        if keeps:
            distribution_lib.set_distribution(None)
        yield
    finally:
        for variable, value in stored:
            variable._value = value
        for layer, parameters in tracked:
            layer._torch_params = parameters
        distribution_lib.set_distribution(distribution)
