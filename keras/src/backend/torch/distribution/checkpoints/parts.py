"""Which part of a tensor this process stores, and which part it writes.

What several processes store alike is written once. Each of them writes a part
of what is large, and they take turns with what is small: every process finds
out for itself, nothing is exchanged.
"""

import typing

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import laid_out

# Below so many bytes one process writes what several have.
SMALL = 1 << 16


class Part(typing.NamedTuple):
    """A part of a tensor.

    Attributes:
        shape: tuple, of the whole tensor.
        offsets: tuple, where the part begins in each dim.
        local: plain tensor, a view of what is stored.
    """

    shape: tuple
    offsets: tuple
    local: torch.Tensor


def stored(value):
    """The `Part` that this process stores, and who else stores the same.

    Collective if `value` is partial, or on the mesh of a part of the
    processes: every process of its mesh calls it.

    Args:
        value: tensor, plain or a DTensor.

    Returns:
        Tuple of the part, the number of processes that store it, and which of
        them this one is.
    """
    world, rank = _world()
    if isinstance(value, DTensor) and (
        value._spec.mesh.size() != world
        or any(p.is_partial() for p in value._spec.placements)
    ):
        value = laid_out.gathered(value)
    if not isinstance(value, DTensor):
        shape = tuple(value.shape)
        return Part(shape, (0,) * len(shape), value.detach()), world, rank
    layout = laid_out.layout_of(value)
    mesh = layout.mesh
    offsets = tuple(start for start, _ in laid_out.ranges(layout))
    copies, index = 1, 0
    for axis, placement in enumerate(layout.placements):
        if not cuts.is_cut(placement):
            index = index * mesh.size(axis) + mesh.get_local_rank(axis)
            copies *= mesh.size(axis)
    local = value._local_tensor.detach()
    part = Part(layout.shape, offsets, local)
    return part, copies, index


def written(value, number):
    """The `Part` that this process writes, None if others write all of it.

    Collective where `stored` is.

    Args:
        value: tensor, plain or a DTensor.
        number: int, which of the tensors of a checkpoint it is.
    """
    part, copies, index = stored(value)
    local = part.local
    if not local.numel():
        return None
    if copies == 1:
        return part
    dim = next((d for d, n in enumerate(local.shape) if n >= copies), None)
    if dim is None or local.numel() * local.element_size() < SMALL:
        return part if number % copies == index else None
    start, stop = collectives.shard_range(local.shape[dim], copies, index)
    if start == stop:
        return None
    offsets = list(part.offsets)
    offsets[dim] += start
    local = local.narrow(dim, start, stop - start)
    return Part(part.shape, tuple(offsets), local)


def _world():
    if current() is None:
        return 1, 0
    return dist.get_world_size(), dist.get_rank()


def on_host(parts):
    """Copies of parts in the memory of the host, which nothing changes.

    Waits for the GPU once, for all of them.

    Args:
        parts: list of `Part`.
    """
    copies, is_on_gpu = [], False
    for part in parts:
        local = part.local
        copy = torch.empty(
            local.shape,
            dtype=local.dtype,
            pin_memory=local.device.type == "cuda",
        )
        copy.copy_(local, non_blocking=True)
        is_on_gpu |= local.device.type == "cuda"
        copies.append(part._replace(local=copy))
    if is_on_gpu:
        torch.cuda.synchronize()
    return copies
