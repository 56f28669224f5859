"""Overlay: `repeat` runs on meta tensors, which trials are made of.

Released Keras 3.15.1 hands itself a symbolic tensor there, and raises.
"""

import torch

from keras.src.backend.torch import numpy as upstream

__all__ = ["repeat"]

released_repeat = upstream.repeat


def repeat(x, repeats, axis=None):
    x = upstream.convert_to_tensor(x)
    if x.is_meta and isinstance(repeats, int):
        return torch.repeat_interleave(x, repeats, dim=axis)
    return released_repeat(x, repeats, axis)
