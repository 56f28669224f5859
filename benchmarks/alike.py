"""One process of a world of thousands, alone: a simulation.

torch's `fake` process group moves nothing. Here every other process is taken
to hold what this one holds: a sum is what this process gave, times the size of
the group, and what is gathered is this process's part again and again. So a
program goes the way it goes where all is well, and what it costs this process
in Python, memory and collectives is what it costs one of them. (A report's fake
world does so for every collective, by a mode that would be timed here.)
"""

import contextlib

import torch
import torch.distributed as dist


@contextlib.contextmanager
def world(size, rank=0):
    """Within it, this process is one of `size` that are all alike."""
    # When Keras has a backend.
    from keras.src.backend.torch.distribution import private

    private.join_fake_group(size, rank)
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


def traffic():
    """A `CollectiveCounter` with the bytes that collectives bring, too.

    Returns:
        A context manager. Its `log` is a list of tuples of a kind, the size of
        the group, the bytes that this process hands in, and those that it is
        given.
    """
    # When Keras has a backend.
    from keras.src.backend.torch.distribution import private
    from keras.src.backend.torch.distribution.report import collectives

    class Traffic(collectives.CollectiveCounter):
        def __init__(self):
            super().__init__()
            self.log = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            call = None
            if result is not NotImplemented:
                call = collectives.call_of(func, args, kwargs)
            if call is not None:
                size = private.group_of(call.group).size()
                brought = {
                    "all_gather": call.bytes * size,
                    "reduce_scatter": call.bytes // size,
                }.get(call.op, call.bytes)
                self.log.append((call.op, size, call.bytes, brought))
            return result

    return Traffic()
