"""One process of a measurement: makes the variants and times them in turns."""

import gc
import random
import traceback

import catalog
import torch
import torch.distributed as dist
import workloads
from processes import describe
from storage import stored_bytes
from torch.distributed.device_mesh import init_device_mesh

from keras.src.backend.torch.distribution.report.collectives import (
    CollectiveCounter,
)


def worker(rank, report, workload, keys, rounds, steps):
    """Prepares every variant, then times all of them in every round.

    Collective: every process of the measurement runs it.

    Args:
        rank: int.
        report: takes messages, tuples: `("start", key)` before a variant is
            touched, `("facts", key, dict)`, `("trouble", key, error, trace)`
            from the process that has it, `("failed", key, error, trace)`,
            `("round", number)`, `("seconds", {key: [seconds a step]})`.
        workload: name, of `workloads.WORKLOADS`.
        keys: of the catalog's entries.
        rounds: int.
        steps: int, steps of each variant in one round.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        session = Session(rank, report, workload)
        for entry in catalog.entries(workload):
            if entry.key in keys:
                session.prepare(entry)
        session.time_rounds(rounds, steps)
        dist.barrier(session.control)
    finally:
        dist.destroy_process_group()


class Session:
    def __init__(self, rank, report, workload):
        self.rank = rank
        self.report_alone = report
        self.report = report if rank == 0 else lambda message: None
        self.sizes = workloads.WORKLOADS[workload]
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        # What the variants do on their groups cannot disturb this one.
        self.control = dist.new_group()
        self.entries = {}
        self.variants = {}

    def takes_part(self, entry):
        return entry.all_processes or self.rank == 0

    def prepare(self, entry):
        """Makes a variant, checks it and keeps it if all processes could."""
        self.report(("start", entry.key))
        variant = facts = error = None
        if self.takes_part(entry):
            try:
                variant = entry.make(self.sizes, self.mesh)
                facts = examine(variant)
            except Exception as e:
                error = (describe(e), traceback.format_exc())
                # The others may never come to the exchange of errors.
                self.report_alone(("trouble", entry.key, *error))
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=self.control)
        if not any(errors):
            self.entries[entry.key] = entry
            self.variants[entry.key] = variant
            self.report(("facts", entry.key, facts))
            return
        taking_part = errors if entry.all_processes else errors[:1]
        error, trace = next(e for e in errors if e)
        if not all(taking_part):
            # The others may have left a collective half done.
            failed = [rank for rank, e in enumerate(errors) if e]
            raise RuntimeError(f"on ranks {failed} only: {error}")
        self.report(("failed", entry.key, error, trace))

    def time_rounds(self, rounds, steps):
        # All variants live in one process: no garbage collection that one
        # of them triggers should walk through the objects of the others.
        gc.collect()
        gc.freeze()
        seconds = {key: [] for key in self.variants}
        for number in range(rounds + 1):
            keys = list(self.variants)
            random.Random(number).shuffle(keys)
            for key in keys:
                self.report(("start", key))
                sample = self.time(key, steps)
                if number > 0:  # The first round only warms up.
                    seconds[key].append(sample / steps)
            self.report(("round", number))
        self.report(("seconds", seconds))

    def time(self, key, steps):
        """Seconds of the slowest process."""
        dist.barrier(self.control)
        taken = 0.0
        if self.takes_part(self.entries[key]):
            taken = self.variants[key].run(steps)
        taken = torch.tensor(taken, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX, group=self.control)
        return float(taken)


def examine(variant):
    """What is the same on every run: losses, communication, storage.

    Collective: every process that takes part in the variant calls it.

    Returns:
        Dict: `losses` of the first three steps, `gradient_norm` of the first
        step, `calls` and `bytes` of the collectives of one step, `run_calls`
        of the collectives that a run adds to those of its steps, and the
        bytes of `stored_bytes`.
    """
    losses = [variant.loss()]
    gradient_norm = variant.gradient_norm()
    losses += [variant.loss(), variant.loss()]
    two, three = count(variant, 2), count(variant, 3)
    calls = {name: three.calls[name] - two.calls[name] for name in three.calls}
    return {
        "losses": losses,
        "gradient_norm": gradient_norm,
        "calls": {name: n for name, n in calls.items() if n},
        "bytes": three.bytes.total() - two.bytes.total(),
        "run_calls": two.calls.total() - 2 * sum(calls.values()),
        **stored_bytes(variant),
    }


def count(variant, steps):
    with CollectiveCounter() as counter:
        variant.run(steps)
    return counter
