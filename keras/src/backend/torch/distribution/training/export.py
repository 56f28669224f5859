"""Models leave Keras as one device has them."""

import contextlib
import functools

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.mesh.context import own_distribution
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.training import files
from keras.src.distribution import distribution_lib


def by_one_device(export):
    """Wraps a function that traces a model and writes what it does to a file.

    Process 0 alone traces it, with whole weights and without a distribution.
    If it fails there, all raise; when it returns, the file is there.

    Collective under a distribution: every process calls it.
    """

    @functools.wraps(export)
    def export_once(model, filepath, *args, **kwargs):
        with own_distribution(model):
            if current() is None:
                return export(model, filepath, *args, **kwargs)
            is_first = process_group.is_first()
            with _whole_weights(model, is_first):
                files.on_all(
                    lambda: (
                        is_first and export(model, filepath, *args, **kwargs)
                    ),
                    filepath,
                )
            return filepath

    return export_once


@contextlib.contextmanager
def _whole_weights(model, keeps):
    """Within it, a process that keeps them has no distribution, and its
    variables hold whole values.

    Collective: every process enters it.

    Args:
        model: the model.
        keeps: bool, whether this process needs the values.
    """
    whole = []
    for variable in model.variables:
        stored = variable._value
        if isinstance(stored, DTensor):
            value = laid_out.gathered(stored)
            if keeps:
                value = torch.nn.Parameter(value, stored.requires_grad)
                whole.append((variable, stored, value))
    if not keeps:
        yield
        return
    # The parameters that torch finds.
    tracked = [
        (layer, layer._torch_params)
        for layer in model._flatten_layers()
        if hasattr(layer, "_torch_params")
    ]
    distribution = distribution_lib.distribution()
    try:
        for variable, _, value in whole:
            variable._value = value
        for layer, _ in tracked:
            layer._track_variables()
        distribution_lib.set_distribution(None)
        yield
    finally:
        for variable, stored, _ in whole:
            variable._value = stored
        for layer, parameters in tracked:
            layer._torch_params = parameters
        distribution_lib.set_distribution(distribution)
