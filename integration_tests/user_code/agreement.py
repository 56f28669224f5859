"""Runs programs on all processes in step, and reports all that fail."""

import contextlib
import datetime

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from integration_tests.harness import parity
from integration_tests.harness import process
from keras import tree

# Longer than any program. A process that waits for this long in a collective
# of a program gives up; after a bit more the others do not wait for it.
PATIENCE = datetime.timedelta(seconds=20)
MORE_PATIENCE = 3 * PATIENCE
REPORTED = 400


class Failure(str):
    """What a program raised, as text."""


def attempt(program, distribution=None):
    """What a program gives, or the `Failure` that it ends in."""
    process.reset_state()
    try:
        return program(distribution)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Failure(text[:REPORTED])


_on_one_device = {}


def on_one_device(programs, key):
    """What each program gives on rank 0, without a distribution.

    Collective: every process calls it.

    Args:
        programs: dict from names to functions of a distribution.
        key: what tells them from those of the same names; each is run once.
    """
    known = _on_one_device.setdefault(key, {})
    new = {name: p for name, p in programs.items() if name not in known}
    if new:
        known |= parity.on_one_device(
            lambda: {name: attempt(p) for name, p in new.items()}
        )
    return known


@contextlib.contextmanager
def meeting():
    """A group of all processes for nothing but to agree.

    What a program leaves unfinished in the others is not taken for an answer.
    """
    group = dist.new_group(backend="gloo", timeout=MORE_PATIENCE)
    yield group
    dist.destroy_process_group(group)
    wait_at_most(distributed_c10d.default_pg_timeout)


def wait_at_most(patience, but=None):
    """Sets after how long collectives raise, of all groups but one."""
    for group in list(distributed_c10d._world.pg_map):
        if group is not but:
            distributed_c10d._set_pg_timeout(patience, group)


def agree(value, group):
    """The value of each process, by rank; a `Failure` for who did not come."""
    values = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        values = [Failure(f"did not come: {error}"[:REPORTED])] * len(values)
        values[dist.get_rank()] = value
    return values


def without_nan(values):
    """Numbers, and where they were none."""

    def split(x):
        if x is None:
            return None
        x = np.asarray(x)
        bad = ~np.isfinite(x)
        return {"numbers": np.where(bad, 0, x), "bad": bad.astype("int8")}

    return tree.map_structure(split, values)


def compare(actual, expected, tolerance):
    """What is wrong, or None."""
    try:
        parity.assert_same(
            without_nan(actual), without_nan(expected), tolerance
        )
    except (AssertionError, ValueError, TypeError) as error:
        return str(error).split("\n")[0][:REPORTED]
    return None


def out_of_step(values):
    """Whether a process may have left another alone in a collective."""
    failures = [value for value in values if isinstance(value, Failure)]
    if len(failures) not in (0, len(values)):
        return True
    return any(
        "gloo" in failure or "did not come" in failure for failure in failures
    )


def judge(values, expected, tolerance):
    """What is wrong with what the processes gave, or None."""
    failed = [isinstance(value, Failure) for value in values]
    if any(failed) and not all(failed):
        rank = failed.index(True)
        return f"rank {rank} alone: {values[rank]}"
    if out_of_step(values):
        return f"out of step: {values[0]}"
    if isinstance(expected, Failure):
        # Several processes compute with a gathered copy of the weight.
        if all(failed) or "modified by an inplace operation" in expected:
            return None
        return f"one device raises {expected}"
    if all(failed):
        return f"raises {values[0]}"
    for rank, value in enumerate(values):
        if wrong := compare(value, values[0], 0):
            return f"ranks 0 and {rank} differ: {wrong}"
    return compare(values[0], expected, tolerance)


def check(programs, make_distribution, key, tolerance=1e-5, known_errors=()):
    """Asserts that programs give one device's numbers, and names those that
    do not.

    Collective: every process calls it.

    Args:
        programs: dict from names to functions of a distribution.
        make_distribution: function without arguments.
        key: of `on_one_device`.
        known_errors: names of programs that may be an error on all processes.
    """
    expected = on_one_device(programs, key)
    wrong = {}
    with meeting() as group:
        for name, program in programs.items():
            distribution = make_distribution()
            wait_at_most(PATIENCE, group)
            value = attempt(program, distribution)
            values = agree(value, group)
            reason = judge(values, expected[name], tolerance)
            failed = [isinstance(v, Failure) for v in values]
            if reason and not (all(failed) and name in known_errors):
                wrong[name] = reason
            if out_of_step(values):
                left = list(programs)[list(programs).index(name) + 1 :]
                if left:
                    wrong[f"{left[0]} and all that follow"] = "out of step"
                break
    if wrong:
        # Without the code of this function, which is not what failed.
        lines = [f"  {name}: {reason}" for name, reason in wrong.items()]
        title = f"{len(wrong)} of {len(programs)} programs:"
        pytest.fail("\n".join([title, *lines]), pytrace=False)
