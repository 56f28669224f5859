"""Places where all processes come together, on a process group of their own.

Before what only makes sense if all do it (a `fit`, a save, a weight that is
read) each process says at which place of the program it is. Where they are at
different places, as under `if process_id() == 0:`, all learn of it at once:
nothing that is said here is ever taken for a part of a gradient, nor the other
way round, since steps communicate in other groups.
"""

import ctypes
import logging
import typing
import weakref
import zlib

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.mesh import watch

logger = logging.getLogger("keras.distribution")


class AnotherLeft(ConnectionError):
    """Another process has left while this one waited for it."""


class _State:
    """Of the process group that `of` refers to.

    Attributes:
        name: of the group in which processes meet, None for all groups alike.
        lost: the error after which nobody can meet in it any more.
        left: the `_Round` that this process has left without the others, who
            come to it some time later.
        count, asked: how often all have met at one place, and had when
            `have_met_since` was asked.
    """

    def __init__(self):
        self.of = lambda: None
        self.name = self.lost = self.left = None
        self.count, self.asked = 0, -1


_state = _State()


def open_group(limit):
    """Makes the group in which processes meet.

    Collective, once for a process group: every process calls it.

    Args:
        limit: function that sets how long a group waits.
    """
    _state.__init__()
    _state.of = weakref.ref(dist.group.WORLD)
    if dist.get_world_size() > 1 and "gloo" in dist.get_backend_config():
        # Its name: a group that is kept never ends.
        group = dist.new_group(backend="gloo")
        limit(group)
        _state.name = group.group_name


def _group():
    if _state.of() is not dist.group.WORLD or _state.name is None:
        return None
    return private.group_of(_state.name)


class Met(typing.NamedTuple):
    """What all processes have said.

    Attributes:
        flag, failed: bools, whether any has set it.
        depth: int, the smallest of all.
        is_same: bool, whether all have given one digest.
    """

    flag: bool
    failed: bool
    depth: int
    is_same: bool


def meet(place, flag=False, failed=False, depth=0, digest=0, alone=False):
    """Waits for all processes at one place of the program.

    Collective: every process calls it, whatever its place.

    Args:
        place: string, where this process is. Those at one place give the same.
        flag, failed: bools.
        depth: int.
        digest: a whole number that float64 holds.
        alone: whether this process may go on without the others, as it needs
            nothing of them. Then those at another place wait on.

    Returns:
        A `Met`; None where this process goes on alone.

    Raises:
        RuntimeError: on all, where they are at different places; on this one
            alone, where it would wait for ever.
        AnotherLeft: where another process has left.
    """
    left, _state.left = _state.left, None
    if left is not None:
        met = left.finish(place)
        if met is not None and met.failed:
            return met
    while True:
        this = _Round(place, flag, failed, depth, digest, alone)
        try:
            met = this.finish(place)
        except watch.WaitsForEver as error:
            if not alone:
                _state.lost = error
                _keep_for_ever(_group())
                raise
            logger.warning("This process goes on without the others. %s", error)
            _state.left = this
            return None
        except AnotherLeft:
            if not alone:
                raise
            return None
        if met is not None or alone:
            return met


def count():
    """How often all have met: the same on all processes that are in step."""
    return _state.count


def have_met_since():
    """Whether all have met since this was asked the last time.

    The same on all processes of a program in which all do the same. What is
    called again and again meets only then: it takes a step's time for nothing.
    """
    asked, _state.asked = _state.asked, _state.count
    return asked != _state.count


def _keep_for_ever(group):
    """Lets a process end that has given up: as a group of gloo's ends, it waits
    for what is under way in it, half an hour."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


class _Round:
    """What this process says in a meeting, and hears."""

    def __init__(self, place, flag, failed, depth, digest, alone):
        if _state.lost is not None:
            raise RuntimeError(
                "This process has given up waiting for the others once, and "
                f"cannot meet them again ({place}): {_state.lost}"
            )
        self.place, self.alone = place, alone
        code = zlib.crc32(place.encode())
        self.numbers = torch.tensor(
            [flag, failed, -depth, code, -code, digest, -digest],
            dtype=torch.float64,
        )
        self.work = dist.all_reduce(
            self.numbers, dist.ReduceOp.MAX, group=_group(), async_op=True
        )

    def finish(self, place):
        """Waits for the others.

        Args:
            place: string, where this process is now.

        Returns:
            A `Met`; None if some were at another place, and may go on alone.
        """
        try:
            watch.wait(self.work, place)
        except watch.WaitsForEver:
            raise
        except RuntimeError as error:
            _state.lost = error
            raise AnotherLeft(
                "Another process has left, or failed, while this one waited "
                f"for it ({place}). If it was killed, or ended with an error, "
                f"that is the reason. Else: {watch.ADVICE}"
            ) from error
        flag, failed, depth, first, last, most, least = self.numbers.tolist()
        if failed or first == -last:
            _state.count += 1
            watch.note_failure(None)
            is_same = most == -least
            return Met(bool(flag), bool(failed), int(-depth), is_same)
        places = [None] * dist.get_world_size()
        dist.all_gather_object(places, (self.place, self.alone), group=_group())
        if len({where for where, alone in places if not alone}) > 1:
            raise RuntimeError(apart([where for where, _ in places]))
        return None


def apart(places):
    """What is said where processes are at different places.

    Args:
        places: list of strings, by rank.
    """
    ranks = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    lines = [f"\n  {watch.processes(r)}: {p}" for p, r in ranks.items()]
    return (
        "Processes have come to different places of the program, where each "
        f"waits for the others:{''.join(lines)}\n{watch.ADVICE}"
    )
