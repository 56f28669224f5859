"""One process of a world of thousands, alone: a simulation.

torch's `fake` process group moves nothing. Here every other process is taken
to hold what this one holds: a sum is what this process gave, times the size of
the group, and what is gathered is this process's part again and again. So a
program goes the way it goes where all is well, and what it costs this process
in Python, memory and collectives is what it costs one of them.
"""

import contextlib

import collectives
import torch
import torch.distributed as dist


@contextlib.contextmanager
def world(size, rank=0):
    """Within it, this process is one of `size` that are all alike."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=size
    )
    released = dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if op == dist.ReduceOp.SUM:
            with torch.no_grad():
                tensor.mul_(dist.get_world_size(group))
        return released(tensor, op, group, async_op)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = released
        dist.destroy_process_group()


class Traffic(collectives.CollectiveCounter):
    """Counts collectives with the size of their groups, and what they bring.

    Attributes:
        log: list of tuples of a kind, the size of the group, the bytes that
            this process hands in, and those that it is given.
    """

    def __init__(self):
        super().__init__()
        self.log = []

    def _count(self, func, args, kwargs):
        before = sum(self.calls.values())
        super()._count(func, args, kwargs)
        if sum(self.calls.values()) == before:
            return
        name = func._schema.name.split("::")[1].rstrip("_")
        kind = collectives.NAMES.get(name, name)
        given = collectives.input_bytes(func._schema, args, kwargs)
        size = group_size(args, kwargs)
        self.log.append((kind, size, given, self._brought(kind, size, given)))

    def _brought(self, kind, size, given):
        if kind == "all_gather":
            return given * size
        return given // size if kind == "reduce_scatter" else given


def group_size(args, kwargs):
    """The number of processes of the group that a collective is called in."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.ScriptObject):
            # The operation of a reduction is such an object too.
            with contextlib.suppress(RuntimeError):
                return dist.ProcessGroup.unbox(value).size()
    names = [v for v in (*args, *kwargs.values()) if isinstance(v, str)]
    for name in reversed(names):  # Of functional ones the group's comes last.
        with contextlib.suppress(RuntimeError, ValueError, KeyError):
            return dist.distributed_c10d._resolve_process_group(name).size()
    return dist.get_world_size()
