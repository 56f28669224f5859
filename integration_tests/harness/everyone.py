"""What all processes of a case have: to compare it, and to wait for it."""

import torch.distributed as dist


def gather(value):
    """The value of each process, by rank.

    Collective: every process calls it.
    """
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def outcomes(function):
    """How a call ended on each process, by rank: the error, or `"done"`.

    Collective: every process calls it, and waits for the others there.
    """
    try:
        function()
    except Exception as error:
        return gather(f"{type(error).__name__}: {error}")
    return gather("done")
