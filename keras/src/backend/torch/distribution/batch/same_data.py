"""Whether all processes read the same data."""

import torch
import torch.distributed as dist
from torch.utils.data.distributed import DistributedSampler

from keras.src.backend.torch.distribution.mesh import agreement
from keras.src.trainers.data_adapters.torch_data_loader_adapter import (
    TorchDataLoaderAdapter,
)

# What a process says instead of the size of a batch.
FAILED, NONE = -2, -1

# Of arrays, which are looked at once, more is looked at than of a batch.
ROWS_OF_ARRAYS = 64


def exchange(number, facts, context):
    """A number and a digest of facts of each process, by rank.

    Where all give the same, as they do in nearly each step, the largest and the
    smallest tell it: no process hears of each other one.

    Collective: every process calls it.

    Args:
        number: int.
        facts: dict, of what the process has read.
        context: the `Context`.

    Returns:
        Tuple of two lists of ints; None if all have given what this one has.
    """
    if _has_own_rows(context):
        facts = {}  # Nobody has the same.
    mine = torch.tensor([number, agreement.digest(facts)])
    ends = torch.cat([mine, -mine])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    most, least = ends.view(2, 2)
    if torch.equal(most, -least):
        return None
    everyone = mine.new_empty((dist.get_world_size(), 2))
    dist.all_gather_single(everyone.view(-1), mine)
    return everyone[:, 0].tolist(), everyone[:, 1].tolist()


def _has_own_rows(context):
    """Whether no two processes are to read the same rows."""
    return not context.auto_shard and context.model_size == 1


def check_rows(facts, digests, context, what="in a batch"):
    """Raises on all processes if those of a data shard, or all of them if each
    cuts its rows of the global ones, read different rows.

    Collective if they do: every process calls it.

    Args:
        facts: dict, of what this process has read.
        digests: list of ints, those of the facts of each process.
        context: the `Context`.
        what: string, for the error.
    """
    shards = None if context.auto_shard else context.shards
    kinds = set(zip(shards or [0] * len(digests), digests))
    if len(kinds) > len(set(shards or [0])):
        agreement.check(facts, what, shards)


def check_all_ended(sizes, context):
    """Raises if some processes ran out of batches, and others did not.

    Args:
        sizes: list of ints, the rows of each process's batch, or `NONE`.
        context: the `Context`.
    """
    ended = sizes.count(NONE)
    if ended == len(sizes):
        return
    rank = dist.get_rank()
    raise ValueError(
        f"With `auto_shard_dataset={context.auto_shard}` every process must "
        f"have the same number of batches. {ended} of {len(sizes)} processes "
        f"ran out of data before the others; process {rank} "
        f"{'has none left' if sizes[rank] == NONE else 'has another batch'}."
    )


def check_source(adapter, steps_per_epoch, arrays, context):
    """Raises where processes would take different batches, or so many.

    One that knows its number does not ask for a batch beyond it, so that the
    others would wait for it.

    Collective: every process calls it.

    Args:
        adapter: Keras's data adapter.
        steps_per_epoch: int or None.
        arrays: list of the (nested) arrays x, y and sample_weight that it
            reads, None for any other source.
        context: the `Context`.
    """
    mine = (adapter.num_batches, steps_per_epoch)
    if context.auto_shard:
        size = adapter.batch_size
        # Adapters of unknown batch sizes cannot say what the last one has.
        mine += (size, size and adapter.partial_batch_size)
    facts = {}
    if arrays is not None:
        facts = agreement.facts_of_batch(tuple(arrays), ROWS_OF_ARRAYS)
    number = agreement.digest({"numbers": mine})
    said = exchange(number, facts, context)
    if said is None:
        return
    numbers, digests = said
    if len(set(numbers)) > 1:
        _raise_for_numbers(mine, context)
    check_rows(facts, digests, context, "in the data")


def _raise_for_numbers(mine, context):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    batches, steps, *sizes = zip(*everyone)
    received = f"batches={list(batches)}, steps_per_epoch={list(steps)}"
    if sizes:
        received += f", batch_size={list(sizes[0])}, last={list(sizes[1])}"
    raise ValueError(
        f"With `auto_shard_dataset={context.auto_shard}` every process must "
        "have the same number of batches and of steps"
        f"{', of the same global rows' if context.auto_shard else ''}. "
        f"Received, from process 0 on: {received}"
    )


def check_sampler(adapter):
    """Raises if a `DataLoader` gives each process rows of its own already."""
    if not isinstance(adapter, TorchDataLoaderAdapter):
        return
    loader = adapter.get_torch_dataloader()
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    if any(isinstance(s, DistributedSampler) for s in samplers):
        raise ValueError(
            "The sampler of the `DataLoader` gives each process rows of its "
            "own, of which each would then take a part once more. Use another "
            "sampler, or set `auto_shard_dataset=False` on the distribution. "
            f"Received: sampler={loader.sampler}"
        )
