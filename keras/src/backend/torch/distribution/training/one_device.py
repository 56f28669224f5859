"""A model as one device has it, for what leaves Keras."""

import contextlib

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.variables import streams
from keras.src.distribution import distribution_lib


@contextlib.contextmanager
def as_one_device(model):
    """Within it, process 0 has no distribution, and the model's variables hold
    whole values there.

    Collective: every process enters it.

    Args:
        model: the model.
    """
    keeps = process_group.is_first()
    whole = []
    for variable in model.variables:
        stored = variable._value
        if isinstance(stored, DTensor):
            value = streams.gathered_by_writer(stored)
            if keeps:
                value = torch.nn.Parameter(value, stored.requires_grad)
                whole.append((variable, "_value", value))
    if not keeps:
        yield
        return
    # The parameters that torch finds: of a `Sequential` by the functional
    # model in it too, which is no layer of its.
    tracked = [
        (layer, "_torch_params", layer._torch_params)
        for layer in {*model._flatten_layers(), *model.modules()}
        if hasattr(layer, "_torch_params")
    ]
    distribution = distribution_lib.distribution()
    with modes.swapped(whole + tracked):
        try:
            for layer, *_ in tracked:
                layer._track_variables()
            distribution_lib.set_distribution(None)
            yield
        finally:
            distribution_lib.set_distribution(distribution)
