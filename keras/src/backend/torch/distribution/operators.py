"""Sharding rules for operators that torch has none for."""

import functools

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard
from torch.distributed.tensor.experimental import register_sharding

# torch 2.13 knows these activations, but not their gradients.
ELEMENTWISE = (
    "hardshrink_backward",
    "hardsigmoid_backward",
    "hardswish_backward",
    "hardtanh_backward",
    "log_sigmoid_backward",
    "softshrink_backward",
)


@functools.cache
def register():
    """Adds the rules to DTensor's, once for each process."""
    operators = [getattr(torch.ops.aten, name).default for name in ELEMENTWISE]
    register_sharding(operators)(_elementwise)


def _elementwise(*args):
    """All tensors cut along the same dim, or all whole."""
    ndim = args[0].ndim

    def alike(placement):
        inputs = [
            # On a GPU `log_sigmoid` keeps no buffer, but hands in one.
            (placement if x.ndim == ndim else Replicate())
            if hasattr(x, "ndim")
            else None
            for x in args
        ]
        return [placement], inputs

    return [alike(Replicate()), *(alike(Shard(dim)) for dim in range(ndim))]
