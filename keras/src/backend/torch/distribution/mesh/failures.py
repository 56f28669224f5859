"""The first error wins: what ends one process is what the others say, too.

torch tells the others that a connection was closed, or nothing for half an
hour. Here a process that fails writes into the store of the job what it failed
with, in which layer and at which line of the program, and reads there where
torch tells it that another one has gone. Where nobody has written anything, as
one was killed, the watches say who does not answer any more.

On the screen, the traceback of the first comes whole and first; all others
end with one line that names it.

Nothing is done in a step.
"""

import contextlib
import datetime
import functools
import json
import logging
import os
import re
import sys
import time
import traceback

import torch.distributed as dist

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.mesh import meeting
from keras.src.backend.torch.distribution.mesh import watch

logger = logging.getLogger("keras.distribution")

# By how often all have met before: what they went on after is no news.
FIRST, SEARCHES = "keras_failures/first/{}", "keras_failures/searches/{}"
# What has ended a program; whether it is on the screen; and how many of the
# others ask the store nothing any more.
ENDED, SAID = watch.ENDED, "keras_failures/said/{}"
HEARD = "keras_failures/heard"
# Seconds: for an answer of the store, until nothing has been said by the one
# that failed, for a search, and for others to read what the store's keeper
# takes along.
TIMEOUT, MOMENT, SEARCH, FAREWELL = 5.0, 0.5, 12.0, 3.0
PAUSE = 0.05
LENGTH, SHORT = 400, 120
# Where `torchrun` looks for what its processes have failed with, and since
# when: it names the earliest as the cause.
FILE_OF_TORCHRUN = "TORCHELASTIC_ERROR_FILE"

COLOURS = re.compile("\x1b\\[[0-9;]*m")
# Of what Keras tells of a layer that fails, what the layer has said.
OF_A_LAYER = re.compile(
    r"Exception encountered when calling .*?\n\n(.*?)\n\nArguments received",
    re.DOTALL,
)

UNKNOWN = {
    "text": "Another process has failed or ended first, and has not said why: "
    "its own output may."
}

# The `_Job` of this process, None without others.
_current = [None]


class AnotherFailed(RuntimeError):
    """Another process has failed, and this one cannot go on without it."""


class _Job:
    """The store of a job, as this process talks to it about failures.

    Args:
        store: of all processes.
        rank, world: ints, of this process, and how many there are.
        keeps_store: whether the store ends with this process.
    """

    def __init__(self, store, rank, world, keeps_store):
        self.rank, self.world, self.process = rank, world, os.getpid()
        self.keeps_store = keeps_store
        # It serves the others, who ask until they leave, and is asked by
        # nobody who waits. A connection takes long where it is no more.
        self._served, self.store = store, store.clone()
        self.store.set_timeout(datetime.timedelta(seconds=TIMEOUT))
        # How often all had met when a call of Keras's failed here.
        self.failed_at = -1
        # What shows an error that ends the program, and did before.
        self.hook = self.released = None

    def read(self, key):
        """What is written there, None if there is nothing."""
        if not self.store.check([key]):
            return None
        return json.loads(self.store.get(key))

    def write(self, key, failure):
        """Writes what failed, unless another has. Returns what is there."""
        there = self.store.compare_set(key, "", json.dumps(failure))
        return json.loads(there)

    def first(self):
        """What failed first since all have met, None if nothing has."""
        key = FIRST.format(meeting.count())
        return self.read(key) or self.read(ENDED)


def _job():
    """The job that this process has joined, None for one that it has forked:
    the store's connection is not of that one."""
    job = _current[0]
    return None if job is None or job.process != os.getpid() else job


def begin(store, rank, world, keeps_store):
    """Lets this process tell what it fails with, and hear it of others.

    Args:
        store: of all processes.
        rank, world: ints, of this process, and how many there are.
        keeps_store: whether the store ends with this process.

    Returns:
        Function to be called when the process has left its groups.
    """
    job = _current[0] = _Job(store, rank, world, keeps_store)
    job.released = sys.excepthook
    job.hook = sys.excepthook = functools.partial(_show, job.released)
    return _end


def _end():
    job, _current[0] = _job(), None
    if job is not None and sys.excepthook is job.hook:
        sys.excepthook = job.released
    if job is None or getattr(sys, "last_value", None) is None:
        return
    try:
        if not job.keeps_store:
            job.store.add(HEARD, 1)
            return
        end = time.monotonic() + FAREWELL
        while time.monotonic() < end:
            if sum(job.store.add(x, 0) for x in (HEARD, watch.LEFT)) >= (
                job.world - 1
            ):
                return
            time.sleep(PAUSE)
    except RuntimeError as error:
        logger.debug("The store has gone before this process: %s", error)


def forget_frames(error):
    """Drops what the frames of an error, and of its causes, have kept."""
    todo, seen = [error], set()
    while todo:
        error = todo.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            todo += [error.__cause__, error.__context__]
            traceback.clear_frames(error.__traceback__)


def is_of_another(error):
    """Whether it tells of nothing but that another process has gone."""
    if isinstance(error, (dist.DistError, meeting.AnotherLeft)):
        return True
    return type(error) is RuntimeError and "/gloo/" in str(error)


def is_timeout(error):
    """Whether it tells that another process did not come."""
    return "imed out" in str(error) or "imeout" in str(error)


class told:
    """Within it a call of Keras's communicates: what it fails with is told to
    the others, and what they have failed with is raised here.

    Raises:
        AnotherFailed: where another process is the cause.
    """

    # A class, as callbacks enter it in each step.
    def __enter__(self):
        return self

    def __exit__(self, kind, error, stack):
        if error is None or isinstance(error, (AnotherFailed, GeneratorExit)):
            return
        failure = caused_by(error)
        if failure is not None:
            raise as_error(failure) from error
        tell(error)


def as_error(failure):
    """What the others raise of a failure.

    Args:
        failure: dict as of `facts_of`.
    """
    error = AnotherFailed(failure["text"])
    mark(error, failure)
    return error


def mark(error, failure):
    """Says of an error that another process has failed with it first."""
    setattr(error, marks.FAILED_FIRST, failure)


def error_of(rank, what):
    """The error of processes for which another has failed, and has told it.

    Args:
        rank: int, of that process.
        what: string, what it could not do, of which all have heard.
    """
    job, told = _job(), None
    if job is not None:
        with contextlib.suppress(RuntimeError):  # The store may have gone.
            told = job.first()
    why = "its own error says why"
    if told is not None and told.get("rank") == rank:
        why = told["what"]
    text = f"Process {rank} {what}: {why}"
    return as_error({"rank": rank, "text": text})


def tell(error):
    """Tells the others what this process fails with, unless another has
    failed first. Waits for nobody.

    Args:
        error: an exception.

    Returns:
        What failed first, a dict; None without others, or if they are out of
        reach.
    """
    job = _job()
    if job is None or marks.FAILED_FIRST in error.__dict__:
        return None
    count = job.failed_at = meeting.count()
    mine = facts_of(error, job.rank)
    watch.note_failure(mine["what"])
    try:
        return job.write(FIRST.format(count), mine)
    except RuntimeError as lost:
        logger.debug("The store does not answer: %s", lost)
    return None


def facts_of(error, rank=None):
    """What others are told of an error, as a dict of plain values."""
    rank = dist.get_rank() if rank is None else rank
    layer, line = _place_of(error)
    message = _message_of(error)
    what = type(error).__name__ + (f": {message}" if message else "")
    where = ", ".join(x for x in (layer and f"layer {layer}", line) if x)
    what += f" ({where})" if where else ""
    return {
        "rank": rank,
        "type": type(error).__name__,
        "message": message,
        "what": what,
        "text": f"Process {rank} failed first: {what}",
    }


def _place_of(error):
    """The path of the innermost layer, and the last line of the program."""
    layer = line = None
    step = error.__traceback__
    while step is not None:
        frame = step.tb_frame
        layer = watch.layer_of(frame) or layer
        file = frame.f_code.co_filename
        if watch.owner_of(file) == "user":
            line = f"{os.path.basename(file)}:{step.tb_lineno}"
        step = step.tb_next
    return layer, line


def _message_of(error):
    """An error's message in one line."""
    text = COLOURS.sub("", str(error))
    inner = OF_A_LAYER.match(text)
    text = " ".join((inner.group(1) if inner else text).split())
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 3]}..."


def caused_by(error):
    """What has failed on another process, if that is what an error tells of.

    Waits for it to be said, for some seconds at most.

    Args:
        error: an exception.

    Returns:
        Dict as of `facts_of`; None for an error of this process's own.
    """
    job = _job()
    if job is None or not is_of_another(error):
        return None
    try:
        found = _search(job, is_timeout(error))
    except RuntimeError as lost:
        logger.debug("The store does not answer: %s", lost)
        found = {
            "text": "Process 0, which keeps the store of the job, has failed "
            "or ended first."
        }
    return found or UNKNOWN


def _search(job, is_late):
    """What has failed first; None if nobody says so in time."""
    start = time.monotonic()
    searches = False
    while time.monotonic() < start + SEARCH:
        # What all have failed with, and gone on after, is no news.
        went_on = job.failed_at == meeting.count()
        first = job.read(ENDED) if went_on else job.first()
        if first is not None:
            return first
        if not searches and (is_late or time.monotonic() > start + MOMENT):
            # One of them looks, however many wait.
            searches = True
            key = SEARCHES.format(meeting.count())
            mine = str(job.rank)
            if job.store.compare_set(key, "", mine).decode() == mine:
                text = watch.who_is_missing(is_late)
                if text is not None:
                    found = {"text": text}
                    return job.write(FIRST.format(meeting.count()), found)
        time.sleep(PAUSE)
    return None


def _show(released, kind, error, stack):
    """Shows what ends the program: whole, or in a line if another process has
    failed first. Takes the place of `sys.excepthook`."""
    job = _job()
    failure = None if job is None else _first_of(job, error)
    if failure is None or failure == UNKNOWN:
        released(kind, error, stack)
        return
    if failure.get("rank") == job.rank:
        released(kind, error, stack)
        _write_for_torchrun(failure["text"], int(time.time()))
        with contextlib.suppress(RuntimeError):  # The store may have gone.
            job.store.set(SAID.format(job.rank), "yes")
        return
    _wait_until_said(job, failure)
    _, line = _place_of(error)
    text = failure["text"]
    text += "" if text.endswith(".") else "."
    if line:
        text += "\n" if "\n" in text else " "
        text += f"This process stopped at {line}."
    # What torch raises of another's end, and where, tells nobody anything.
    kind = AnotherFailed if is_of_another(error) else kind
    # In one piece: the lines of several processes do not mix.
    sys.stderr.write(f"[rank{job.rank}]: {kind.__name__}: {text}\n")
    sys.stderr.flush()
    logger.debug("", exc_info=(kind, error, stack))
    _write_for_torchrun(text, int(time.time()) + 1)


def _first_of(job, error):
    """What a program ends of; None if nobody can be told."""
    failure = error.__dict__.get(marks.FAILED_FIRST) or caused_by(error)
    if failure is not None:
        return failure
    failure = tell(error)
    if failure is None:
        return None
    mine = facts_of(error, job.rank)
    if any(failure.get(k) != mine[k] for k in ("type", "message")):
        # It has gone on after what failed first, or does not know of it.
        failure = mine
    elif failure["rank"] != job.rank:
        start = failure["message"][:SHORT]
        start += "..." if start != failure["message"] else ""
        text = f"{start} (process {failure['rank']} shows all of it)"
        failure = {**failure, "text": text}
    if not hasattr(sys, "ps1"):
        with contextlib.suppress(RuntimeError):
            job.write(ENDED, failure)
    return failure


def _wait_until_said(job, failure):
    """Lets the whole traceback come first, and come at all: a launcher may end
    all processes as soon as one has."""
    if "rank" not in failure or failure.get("type") == "SystemExit":
        return  # Nobody shows it.
    end = time.monotonic() + FAREWELL
    with contextlib.suppress(RuntimeError):
        said = [SAID.format(failure["rank"])]
        while not job.store.check(said) and time.monotonic() < end:
            time.sleep(PAUSE)


def _write_for_torchrun(line, when):
    """Tells `torchrun` what this process failed with, as torch's `record` does.

    Args:
        line: string.
        when: int, seconds since 1970. `torchrun` names the earliest.
    """
    path = os.environ.get(FILE_OF_TORCHRUN)
    if not path:
        return
    message = {
        "message": line,
        "extraInfo": {"py_callstack": line, "timestamp": str(when)},
    }
    try:
        with open(f"{path}.part", "w") as file:
            json.dump({"message": message}, file)
        os.replace(f"{path}.part", path)
    except OSError as error:
        logger.debug("torchrun cannot be told: %s", error)
