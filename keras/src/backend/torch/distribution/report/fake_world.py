"""One process that is one of many, without the others.

Torch's fake process group answers at once, and leaves sums alone. Here it is a
mirror: what is added up over n processes is n times our own, as if each of the
others had the same. So what processes compare is equal, statistics are of the
right size, and no number comes from memory that nobody has written.
"""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.report import collectives


class Mirror(private.DispatchMode):
    """Within it, what a fake group reduces is what the others being like this
    process would give."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        call = collectives.call_of(func, args, kwargs)
        if call is not None and call.reduction is not None:
            _reduce(call, result)
        return result


def _reduce(call, result):
    group = private.group_of(call.group)
    size, rank = group.size(), group.rank()
    factor = {"SUM": size, "PREMUL_SUM": size}.get(call.reduction, 1)
    outputs = call.outputs
    if not outputs and _are_tensors(result):
        outputs = collectives.flatten(result)
    for i, x in enumerate(call.inputs):
        if call.op == "reduce_scatter":
            y = outputs[i] if len(outputs) == len(call.inputs) else outputs[0]
            y.view(-1).copy_(x.reshape(-1).chunk(size)[rank]).mul_(factor)
        elif factor != 1:
            (outputs[i] if outputs else x).mul_(factor)


def is_inside():
    """Whether this process plays one of several."""
    return dist.is_initialized() and dist.get_backend() == "fake"


def _are_tensors(result):
    """Whether an operator returns tensors, and no `Work` beside them."""
    values = result if isinstance(result, (list, tuple)) else [result]
    return all(isinstance(x, torch.Tensor) for x in values)


@contextlib.contextmanager
def of(world_size, rank=0):
    """Within it, this process is one of `world_size`.

    It must not belong to a process group of several, and no distribution may
    be set. A world of one that it belongs to is left, and another one joined
    when it is asked for.

    Args:
        world_size: int.
        rank: int.

    Raises:
        RuntimeError: in a process of several.
    """
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            raise RuntimeError(
                "A dry run is made by one process alone. Received: a call in "
                f"a job of {dist.get_world_size()} processes."
            )
        dist.destroy_process_group()
    private.join_fake_group(world_size, rank)
    try:
        with Mirror():
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
