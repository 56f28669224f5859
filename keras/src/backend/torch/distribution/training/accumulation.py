"""Gradients that an optimizer adds up over several steps, reduced once.

With `gradient_accumulation_steps=k`, an optimizer uses no gradient in k - 1 of
k steps. There gradients stay local, and each data shard adds up those of its
own rows, weighted. The sum over data shards is taken in the k-th step, by its
backward pass, which reduces (what was added up + its own gradient).

What is added up here, but not yet over data shards, is a partial sum. Between
steps that is what an accumulator is: a DTensor whose placement on the data
axis is `Partial`. So whoever reads it (a file that is saved, `numpy()`) gets
the sum, and what is assigned to it counts once. Within a step it is the plain
accumulator of one device, with the same memory, for Keras to add to.

A variable that the data axis shards is reduced in each backward pass, whose
result alone is as small as its shard; its accumulator is never partial.
"""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Partial

from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import weights


@contextlib.contextmanager
def accumulating(optimizer, context):
    """Within it, gradients that the optimizer only adds up stay local.

    Args:
        optimizer: the optimizer, or None, of a train step that is Keras's own:
            whoever writes one may use gradients for more.
        context: the `Context`.
    """
    accumulators = _accumulators(optimizer, context)
    if not accumulators:
        yield
        return
    # Reads a number of the device, as Keras does in each such step.
    step = int(optimizer._iterations.value) + 1
    is_update = step % optimizer.gradient_accumulation_steps == 0
    owed = {n: _open(a, context) for n, a in accumulators.items()}
    try:
        with context.reducer.accumulating(owed, defers=not is_update):
            yield
    finally:
        # What has been reduced is no longer owed.
        for number in owed:
            _close(accumulators[number], context)


def _accumulators(optimizer, context):
    """Accumulators that may be partial, by the number of their parameter."""
    adds_up = getattr(optimizer, "_only_adds_up", None)
    if context.reducer is None or adds_up is None or not adds_up():
        return {}
    pairs = list(
        zip(optimizer._trainable_variables, optimizer._accumulated_gradients)
    )
    for variable, accumulator in pairs:
        # Another distribution's, or on a torch module's own mesh.
        if getattr(variable, "_context", None) is not context:
            return {}
        value = accumulator._value
        if isinstance(value, DTensor) and value.device_mesh != context.mesh:
            return {}
    return {
        variable._gradient_number: accumulator
        for variable, accumulator in pairs
        if variable._gradient_number is not None
    }


def settle(optimizer):
    """Sums up over data shards what accumulators hold.

    Collective where an accumulator is partial: every process calls it.
    """
    for accumulator in optimizer._accumulated_gradients:
        if _is_partial(accumulator._value):
            local = sharded.local_of(accumulator._value)
            dist.all_reduce(local, group=accumulator._context.data_group)
            accumulator._value = _settled(accumulator)


def _is_partial(value):
    return isinstance(value, DTensor) and any(
        p.is_partial() for p in value.placements
    )


def _open(accumulator, context):
    """Gives Keras the accumulator as it is on one device.

    Returns:
        Its local tensor, in which this process's share of the sum is.
    """
    if _is_partial(accumulator._value):
        accumulator._value = _settled(accumulator)
        return _local(accumulator._value)
    local = _local(accumulator._value)
    # A sum that all data shards hold counts once.
    if context.data_index:
        local.zero_()
    return local


def _close(accumulator, context):
    """Says that the accumulator holds our share of a sum."""
    settled = accumulator._value
    forms = getattr(accumulator, "_forms", None)
    if forms is None or forms[0] is not settled:
        placements = list(sharded.replicate(context.mesh))
        if isinstance(settled, DTensor):
            placements = list(settled.placements)
        for axis in context.data_axes:
            placements[axis] = Partial()
        partial = sharded.wrap(
            _local(settled), context.mesh, placements, tuple(settled.shape)
        )
        partial = weights.stored(partial, context)
        # Kept, to be exchanged in each step.
        accumulator._forms = (
            settled,
            torch.nn.Parameter(partial, requires_grad=False),
        )
    accumulator._value = accumulator._forms[1]


def _settled(accumulator):
    settled, partial = accumulator._forms
    assert accumulator._value is partial
    return settled


def _local(value):
    if isinstance(value, DTensor):
        return sharded.local_of(value)
    return value.detach()
