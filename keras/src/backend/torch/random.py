"""Overlay: random numbers that differ where rows differ, and only there.

Every process holds the same random state. What a layer draws for its rows must
differ between data shards, and be the same on the processes of one; what is
drawn for weights must be the same everywhere.
"""

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch import random as upstream
from keras.src.backend.torch.distribution import sharded
from keras.src.backend.torch.distribution import storage
from keras.src.backend.torch.distribution.context import current
from keras.src.backend.torch.distribution.modes import modes
from keras.src.random.seed_generator import SeedGenerator
from keras.src.random.seed_generator import draw_seed

__all__ = ["dropout", "torch_seed_generator"]

released_dropout = upstream.dropout
released_torch_seed_generator = upstream.torch_seed_generator

# Far apart, since Keras adds a counter to its seeds.
STRIDE = 0x9E3779B1


def _shard_index():
    context = current()
    if context is None or not modes.calls or modes.drawing:
        return 0
    return context.data_index


def torch_seed_generator(seed):
    index = _shard_index()
    if not index or upstream.get_device() == "meta":
        return released_torch_seed_generator(seed)
    generator = torch.Generator(device=upstream.get_device())
    first, second = draw_seed(seed)
    generator.manual_seed(int(first + second + index * STRIDE) & 0xFFFFFFFF)
    return generator


def dropout(inputs, rate, noise_shape=None, seed=None):
    context = current()
    if context is None or rate in (0.0, 1.0) or not modes.calls:
        return released_dropout(inputs, rate, noise_shape, seed)
    if context.data_size > 1 and _is_unseeded(seed) and noise_shape is None:
        # Torch's global generator must stay the same on all processes, also
        # where shards have different numbers of rows.
        seed = int(torch.randint(1 << 31, ()).item())
    if not isinstance(inputs, DTensor):
        return released_dropout(inputs, rate, noise_shape, seed)
    # One mask for the whole activation, of which each process takes its part.
    ones = torch.ones(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    mask = released_dropout(ones, rate, noise_shape, seed)
    mask = storage.shard(mask, inputs.device_mesh, inputs.placements)
    return sharded.reduced(inputs) * mask


def _is_unseeded(seed):
    return seed is None or (
        isinstance(seed, SeedGenerator) and seed._initial_seed is None
    )
