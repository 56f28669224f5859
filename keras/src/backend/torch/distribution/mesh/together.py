"""Work that all processes do together, and that may fail on one of them.

A process that fails would leave the others in their next collective. Within
`work`, collectives that only exist because of it (weights are gathered for a
file, say) are preceded by `go_on`, in which all tell whether they still can:
what one raises, all raise, at their next `go_on` or at the end of the work.
There each says in which works it is, so that one that does alone what all
should do is found out (see `meeting`).
"""

import contextlib
import pickle
import threading

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.mesh import failures
from keras.src.backend.torch.distribution.mesh import meeting
from keras.src.backend.torch.distribution.mesh import process_group

END = "the end"


class _Stack(threading.local):
    """The works that this thread is in, the outermost first."""

    def __init__(self):
        self.works = []


_stack = _Stack()


class Work:
    """Some work of all processes.

    Attributes:
        what: string, what is done, for errors. The first word says of what
            kind it is.
        flag: bool, to be set by a process; afterwards whether one has.
        failure: the error that all know of, or None.
    """

    def __init__(self, what):
        self.what = what
        self.flag = False
        self.failure = None


@contextlib.contextmanager
def work(what, by_writer=False):
    """Within it, what one process raises, all raise.

    Afterwards the processes are in step, whether it failed or not. Works may
    be nested; each ends for all at once.

    Collective: every process enters it.

    Args:
        what: string, what is done, for errors.
        by_writer: whether it is done when process 0 has done its part, who
            then ends it without the others, if they are not in it.

    Yields:
        A `Work`.
    """
    this = Work(what)
    _stack.works.append(this)
    try:
        with failures.told():
            try:
                yield this
                this.flag = _ask_all(this.flag, END, by_writer)
            except Exception as error:
                if this.failure is None:
                    _tell(error)
                raise
    finally:
        _stack.works.remove(this)


def go_on(what=None):
    """To be called before what communicates within work.

    Collective within work, and if it is said what is done: every process calls
    it.

    Args:
        what: string, what is done outside of work, or None.
    """
    if _stack.works or what is not None:
        _ask_all(False, what or "")


def begin(what):
    """To be called before what communicates and is called again and again: the
    first of those calls tells at once where a process is alone in it.

    Collective: every process calls it.

    Args:
        what: string, what is done.
    """
    if meeting.have_met_since():
        go_on(what)
        meeting.have_met_since()


def any_process(flag, by_writer=False):
    """Whether the flag is set on any process.

    Collective: every process calls it.

    Args:
        flag: bool.
        by_writer: whether process 0 alone may set it, who then needs nobody to
            know the answer.

    Raises:
        What another process has raised, if within work one has.
    """
    return _ask_all(flag, "", by_writer)


def is_same(digest, what):
    """Whether all processes give the same number.

    Collective: every process calls it.

    Args:
        digest: a whole number that float64 holds.
        what: string, what is done.

    Raises:
        RuntimeError: on all, if they do different things.
    """
    _raise_again()
    met, failure = _exchange(False, None, what, digest=digest)
    if failure is not None:
        raise failure
    return met.is_same


def _ask_all(flag, what, by_writer=False):
    _raise_again()
    alone = by_writer and process_group.is_first()
    met, failure = _exchange(flag, None, what, alone)
    if failure is not None:
        raise failure
    return flag if met is None else met.flag


def _raise_again():
    if _stack.works and _stack.works[-1].failure is not None:
        # User code has caught it.
        raise _stack.works[-1].failure


def any_of_each(flags):
    """As `any_process`, of each flag of a list.

    Collective: every process calls it, with a list as long.
    """
    go_on()
    return _any_of_each(flags)


def _any_of_each(flags):
    state = torch.tensor([float(flag) for flag in flags])
    dist.all_reduce(state, dist.ReduceOp.MAX)
    return [bool(flag) for flag in state.tolist()]


def _tell(error):
    """Tells the other processes of an error, where they next ask."""
    try:
        _exchange(False, error)
    except RuntimeError as lost:
        # The error may be that there is nobody left to tell.
        raise error from lost


def _place(what):
    """Where this process is: what it does, in which works."""
    kinds = [work.what.partition(" ")[0] for work in reversed(_stack.works)]
    if what == END:
        kinds[0] = f"the end of {kinds[0]}"
    elif what:
        kinds.insert(0, what)
    return " in ".join(kinds) or "a question to all"


def _exchange(flag, error, what="", alone=False, digest=0):
    """What all processes say.

    Args:
        flag: bool, of this process.
        error: what this process failed with, or None.
        what: string, what it does within its works.
        alone: whether it may go on without the others.
        digest: a whole number.

    Returns:
        Tuple of a `meeting.Met`, None where this process goes on alone, and of
        the error of the first process that failed, None if none has.

    Raises:
        RuntimeError: on all, where they are in different works.
    """
    works = _stack.works
    try:
        # The work that fails is the outermost that a process is in: one may
        # have entered another since, and never comes to its end.
        met = meeting.meet(
            _place(what),
            flag,
            failed=error is not None,
            depth=len(works),
            digest=digest,
            alone=alone,
        )
    except RuntimeError as apart:
        # It is over for all.
        for each in works:
            each.failure = apart
        raise
    if met is None or not met.failed:
        return met, None
    errors = [None] * dist.get_world_size()
    what = works[-1].what if works else what
    mine = None
    if error is not None:
        mine = _as_bytes(error, what), failures.facts_of(error)
    dist.all_gather_object(errors, (mine, what))
    rank = next(i for i, (each, _) in enumerate(errors) if each is not None)
    (data, facts), what = errors[rank]
    failure = pickle.loads(data)
    failure.add_note(f"Process {rank} failed in {what}.")
    failures.mark(failure, facts)
    for each in works[max(met.depth, 1) - 1 :]:
        each.failure = failure
    return met, failure


def _as_bytes(error, what):
    """A pickled error, of its own class where that can be pickled."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        # Whatever a class of the user's raises there.
        return pickle.dumps(
            RuntimeError(f"{type(error).__name__} in {what}: {error}")
        )
    return data
