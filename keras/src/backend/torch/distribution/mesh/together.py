"""Work that all processes do together, and that may fail on one of them.

A process that fails would leave the others in their next collective. Within
`work`, collectives that only exist because of it (weights are gathered for a
file, say) are preceded by `go_on`, in which all tell whether they still can:
what one raises, all raise, at their next `go_on` or at the end of the work.
"""

import contextlib
import pickle
import threading

import torch
import torch.distributed as dist


class _Stack(threading.local):
    """The works that this thread is in, the outermost first."""

    def __init__(self):
        self.works = []


_stack = _Stack()


class Work:
    """Some work of all processes.

    Attributes:
        what: string, what is done, for errors.
        flag: bool, to be set by a process; afterwards whether one has.
        failure: the error that all know of, or None.
    """

    def __init__(self, what):
        self.what = what
        self.flag = False
        self.failure = None


@contextlib.contextmanager
def work(what):
    """Within it, what one process raises, all raise.

    Afterwards the processes are in step, whether it failed or not. Works may
    be nested; each ends for all at once.

    Collective: every process enters it.

    Args:
        what: string, what is done, for errors.

    Yields:
        A `Work`.
    """
    this = Work(what)
    _stack.works.append(this)
    try:
        yield this
        this.flag = any_process(this.flag)
    except Exception as error:
        if this.failure is None:
            _tell(error)
        raise
    finally:
        _stack.works.remove(this)


def go_on():
    """To be called before what communicates within work; else does nothing.

    Collective within work: every process calls it.
    """
    if _stack.works:
        any_process(False)


def any_process(flag):
    """Whether the flag is set on any process.

    Collective: every process calls it.

    Raises:
        What another process has raised, if within work one has.
    """
    if not _stack.works:
        return _any_of_each([flag])[0]
    if _stack.works[-1].failure is not None:
        # User code has caught it.
        raise _stack.works[-1].failure
    flag, failure = _exchange(flag, None)
    if failure is not None:
        raise failure
    return flag


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


def _exchange(flag, error):
    """What all processes say within work.

    Args:
        flag: bool, of this process.
        error: what this process failed with, or None.

    Returns:
        Tuple of whether any has set its flag, and of the error of the first
        process that failed, None if none has.
    """
    works = _stack.works
    # The work that fails is the outermost that a process is in: one may have
    # entered another since, and never comes to its end.
    state = torch.tensor([flag, error is not None, -len(works)]).float()
    dist.all_reduce(state, dist.ReduceOp.MAX)
    flag, failed, depth = state.tolist()
    if not failed:
        return bool(flag), None
    errors = [None] * dist.get_world_size()
    what = works[-1].what
    dist.all_gather_object(errors, (_as_bytes(error, what), what))
    rank = next(i for i, (data, _) in enumerate(errors) if data is not None)
    data, what = errors[rank]
    failure = pickle.loads(data)
    failure.add_note(f"Process {rank} failed in {what}.")
    for each in works[int(-depth) - 1 :]:
        each.failure = failure
    return bool(flag), failure


def _as_bytes(error, what):
    """A pickled error, of its own class where that can be pickled."""
    if error is None:
        return None
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        # Whatever a class of the user's raises there.
        return pickle.dumps(
            RuntimeError(f"{type(error).__name__} in {what}: {error}")
        )
    return data
