"""What gloo lacks for tensors that lie on a GPU."""

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution import private

_kernels = []


def install():
    """Lets DTensor gather tensors of a GPU by gloo.

    torch's functional all-gather ends in `allgather_into_tensor_coalesced`,
    where gloo reads the memory of a GPU as if it were the host's: the process
    dies by SIGSEGV (torch 2.11 to 2.13, pytorch/pytorch#152645). Gathering one
    tensor is right.

    To be called where gloo serves GPUs; `remove` takes it back.
    """
    if not _kernels:
        library = torch.library.Library("_c10d_functional", "IMPL")
        library.impl("all_gather_into_tensor", all_gather_into_tensor, "CUDA")
        _kernels.append(library)


def remove():
    """Takes back what `install` did."""
    _kernels.clear()  # A kernel goes with its library.


def all_gather_into_tensor(x, size, group):
    """The tensors of all processes of a group, along the first dim.

    Collective: every process of the group calls it.

    Args:
        x: tensor of shape `(rows, ...)`, the same on all processes.
        size: int, number of processes.
        group: the process group, or its name.

    Returns:
        Tensor of shape `(size * rows, ...)`, for which nothing need be waited.
    """
    if isinstance(group, str):
        group = private.group_of(group)
    result = x.new_empty((size * x.shape[0], *x.shape[1:]))
    dist.all_gather_single(result, x.contiguous(), group=group)
    return result
