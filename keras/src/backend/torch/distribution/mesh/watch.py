"""Says who waits for whom, where processes wait for one another.

A program that one process leaves, or in which one does what the others do not,
waits: torch says nothing until its timeout, half an hour later on gloo. Here a
thread of each process looks now and then at what the main thread does, and
tells it to the others through a connection of its own to their store. Where
the main thread has waited in a collective for long, one process says once what
each of them is doing, and what to change. Where it waits for a process whose
program has failed, and torch does not tell it so, the thread ends it.

Nothing is wrapped and nothing counted: a step takes as long as without. That a
thread waits is seen from its stack, which ends where torch or this project
communicates, and from its processor time, which does not go on. Collectives of
NCCL do not stop the host: there, only what the host waits for is seen.
"""

import collections
import datetime
import functools
import json
import logging
import os
import sys
import sysconfig
import threading
import time

import torch

from keras.src import version
from keras.src.backend.torch.distribution import private

logger = logging.getLogger("keras.distribution")

# Seconds that the main thread waits before it is said; 0 for never.
VARIABLE, PATIENCE = "KERAS_DISTRIBUTION_STALL_SECONDS", 30.0
# Seconds between two looks, without a look of a process until it does not
# answer, and for an answer of the store.
PERIOD, SILENCE, TIMEOUT = 1.0, 5.0, 10.0
KEY = "keras_watch/{}"
# How many times something has been said; whether the process that keeps the
# store, the first, leaves; and how many of the others ask it nothing any more.
COUNT = "keras_watch/said"
LEAVES, LEFT = "keras_watch/leaves", "keras_watch/left"
# Which of the processes that wait reads what all do, and what it has found: of
# thousands that wait, thousands would ask the store for what thousands said.
READER, VERDICT = "keras_watch/reader", "keras_watch/verdict"
# So many looks without a sign of the reader until another takes its place.
ABSENT = 3
# What has ended the program of a process: see `failures`. Who waits for that
# process all the same, for so many seconds, is ended too.
ENDED, GRACE = "keras_failures/ended", 6.0

# What programs call that communicates.
CALLS = frozenset(
    """
    fit evaluate predict train_on_batch test_on_batch predict_on_batch
    save save_weights load_weights load_model export get_weights set_weights
    initialize set_distribution convert_to_numpy
    """.split()
)


# By what the processes do.
ADVICE_TO_ALL = {
    "is gone": "One that does not answer is stopped, killed, or out of reach: "
    "what its own output says, or its host, tells why.",
    "branches": "They are in one call, and communicate for different things: "
    "code in it goes another way on some of them (by the process, its time, "
    "its files, or a random number of its own), or they were handed data of "
    "other shapes.",
    "is slow": "One that is busy in the same call keeps the others waiting; if "
    "it only takes long, nothing is wrong.",
}
ADVICE = (
    "What communicates (`fit`, `evaluate`, `predict`, `save`, reading weights) "
    "must be called by every process, in the same order and on the same data. "
    "Do not put it behind `if process_id() == 0`."
)

HINT = f" ({VARIABLE}=0 turns this off.)"

# The `Watch` of this process, None without one.
_current = [None]


class WaitsForEver(RuntimeError):
    """All processes wait, and not in one collective."""


def _folder(*path):
    return os.path.join(os.path.realpath(os.path.join(*path)), "")


HERE = os.path.dirname(__file__)
TORCH = _folder(os.path.dirname(torch.__file__))
COMMUNICATES = (_folder(TORCH, "distributed"), _folder(HERE, os.pardir))
LAYERS = os.path.join("distribution", "layers", "execution.py")
# This project mirrors the tree of Keras.
KERAS = (
    _folder(os.path.dirname(version.__file__), os.pardir),
    _folder(HERE, *[os.pardir] * 5),
)
LIBRARIES = (TORCH, *map(_folder, set(sysconfig.get_paths().values())))


@functools.cache
def owner_of(file):
    """Whose a source file is: `"keras"`, `"user"`, or None for a library's."""
    path = os.path.realpath(file)
    if path.startswith(KERAS):
        return "keras"
    return None if path.startswith(LIBRARIES) or file[0] == "<" else "user"


@functools.cache
def communicates(file):
    """Whether torch or this project communicates in a source file."""
    return os.path.realpath(file).startswith(COMMUNICATES)


def layer_of(frame):
    """The path of the layer that is called in a frame, or None."""
    if frame.f_code.co_name != "_call":
        return None
    if not frame.f_code.co_filename.endswith(LAYERS):
        return None
    return getattr(frame.f_locals.get("layer"), "path", None)


class Place:
    """What a thread is doing.

    Args:
        frame: its innermost frame.
        closely: bool, whether to look at variables of its frames too. They
            are kept until the frame ends: to be asked of what stands still.

    Attributes:
        line: string, the innermost line of the user's own code.
        call: string, what was called of Keras, or None.
        layer: string, the path of the layer that is called, or whose gradient
            is computed, or None.
        what: string, what is communicated for, or None.
        collective: string, what is communicated, or None.
        is_backward: whether it is in a backward pass.
        communicates: whether torch or this project communicates.
    """

    def __init__(self, frame, closely=False):
        self.line = self.call = self.layer = None
        self.what = self.collective = None
        self.is_backward = False
        self.communicates = communicates(frame.f_code.co_filename)
        while frame is not None and (
            self.line is None or (closely and self.call is None)
        ):
            self._look_at(frame, closely)
            frame = frame.f_back

    def _look_at(self, frame, closely):
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        owner = owner_of(file)
        if owner == "user":
            if self.line is None:
                self.line = f"{os.path.basename(file)}:{frame.f_lineno}"
        elif owner == "keras" and name in CALLS:
            # Of those of one name, the innermost tells more.
            if not (self.call or "").startswith(name):
                self.call = name + (_progress(frame) if closely else "")
        elif name == "_engine_run_backward":
            self.is_backward = True
        elif closely and communicates(file):
            self.layer = self.layer or layer_of(frame) or _forward_layer(frame)
            waits_for = getattr(frame.f_locals.get("self"), "waits_for", None)
            if waits_for is not None and self.what is None:
                self.what = waits_for()

    def __str__(self):
        parts = [
            self.line,
            self.call and f"in `{self.call}`",
            self.layer and f"layer '{self.layer}'",
            self.is_backward and "backward",
            self.what,
            self.collective,
        ]
        return ", ".join(part for part in parts if part) or "at no known line"


def _forward_layer(frame):
    """The layer whose gradient a function of ours computes, or None."""
    layer = getattr(frame.f_locals.get("ctx"), "layer", None)
    return getattr(layer, "path", None)


def _progress(frame):
    """Which epoch and step `fit` is in."""
    epoch = frame.f_locals.get("epoch")
    step = frame.f_locals.get("begin_step")
    text = "" if epoch is None else f", epoch {epoch + 1}"
    return text if step is None else f"{text}, step {step}"


class Watch:
    """Looks at the main thread of this process, and at the others.

    Args:
        store: the store of all processes. It is kept, as the process that has
            made it serves the others, who ask until they leave.
        rank, world: ints, of this process, and how many there are.
        patience: float, seconds to wait before something is said.
        timeout: float, seconds until torch ends a wait.
    """

    def __init__(self, store, rank, world, patience, timeout=None):
        # The store's own connection is of one thread.
        self._server, self.store = store, store.clone()
        self.store.set_timeout(datetime.timedelta(seconds=TIMEOUT))
        self.rank, self.world = rank, world
        self.patience, self.timeout = patience, timeout
        # From when on it is said closely what the main thread waits for.
        self._looks_closely = min(patience, (timeout or patience) / 2)
        self._thread_id = threading.main_thread().ident
        self._clock = time.pthread_getcpuclockid(self._thread_id)
        self._since, self._seen = time.monotonic(), None
        # How often something had been said when the main thread last moved;
        # when the others were asked, and what they had answered before.
        self._looks, self._count, self._asked = 0, None, None
        self._period = min(PERIOD, patience / 4)
        # Where the main thread waits for all processes to come, or None; what
        # they all did when they were asked; and why they never will.
        self.place, self._stand, self.verdict = None, None, None
        # How often the main thread has waited for all to come; what the reader
        # has said of itself, and for how many looks it has been the same.
        self.meetings, self._heard, self._silent = 0, "", 0
        # What this process has failed with since all last met, and gone on;
        # and since when the main thread waits for one that has ended.
        self.failure, self._in_vain = None, None
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="keras-watch", daemon=True
        )

    def start(self):
        _current[0] = self
        self._thread.start()

    def stop(self):
        """Ends the thread, before the interpreter does.

        The first process waits for a moment, until the others ask its store
        nothing any more: torch would complain of each answer that is missing.
        """
        is_watching = not self._over.is_set()
        _current[0] = None
        self._over.set()
        self._thread.join(2 * TIMEOUT)
        has_failed = getattr(sys, "last_value", None) is not None
        if is_watching and not has_failed:
            self._say({"left": True})
        if not is_watching or has_failed or self._thread.is_alive():
            return
        try:
            self._part()
        except RuntimeError as error:
            logger.debug("The store has gone before this process: %s", error)
        self._server = None

    def _say(self, more):
        """Tells the others how often this process has looked, and more."""
        said = {"looks": self._looks, "failure": self.failure, **more}
        try:
            self.store.set(KEY.format(self.rank), json.dumps(said))
        except RuntimeError as error:
            logger.debug("The store does not answer: %s", error)

    def _part(self):
        if self.rank:
            self.store.add(LEFT, 1)
            return
        self.store.set(LEAVES, "yes")
        end = time.monotonic() + 3 * self._period
        while self.store.add(LEFT, 0) < self.world - 1:
            if time.monotonic() > end:
                return
            time.sleep(0.02)

    def _run(self):
        while not self._over.wait(self._period):
            try:
                self._look()
            except RuntimeError as error:
                # It has gone with the process that kept it, which the program
                # sees in its next collective.
                logger.debug("The store does not answer: %s", error)
                self._over.set()

    def _look(self):
        if self.rank and self.store.check([LEAVES]):
            self.store.add(LEFT, 1)
            self._over.set()
            return
        frame = sys._current_frames()[self._thread_id]
        # The stack is no proof: the same line is passed again and again.
        clock = round(time.clock_gettime(self._clock), 2)
        if self.place is not None:
            # It wakes each second, for nothing: see `wait`.
            clock = -self.meetings
        place, now = Place(frame), time.monotonic()
        if (str(place), clock) != self._seen:
            self._since, self._seen = now, (str(place), clock)
        still = now - self._since if place.communicates else 0.0
        is_still = now - self._since >= self._looks_closely
        if is_still:
            place = Place(frame, closely=True)
        self._looks += 1
        waits = is_still and place.communicates
        if waits:
            place.collective = private.collective_under_way()
        said = {
            "place": str(place),
            "call": place.call,
            "waits": waits,
            "still": still,
            "meets": self.place,
            "meetings": self.meetings,
        }
        self._say(said)
        self._end_with_another(now, still)
        waits_long = still >= self.patience / 2
        reads = waits_long and self._is_reader()
        if waits_long and self.place is not None:
            self._hear_verdict()
        if reads:
            self._judge(now)
        else:
            self._stand = None
        if not waits or still < self.patience:
            self._count, self._asked = self.store.add(COUNT, 0), None
        elif not reads:
            self._asked = None
        elif self._count is not None:
            self._ask(now)

    def _end_with_another(self, now, still):
        """Ends this process if it waits for one whose program has ended.

        torch tells it so on gloo, as soon as that process has gone. On NCCL it
        does not, nor where a thread of that process keeps it from going.
        """
        if still < GRACE / 2 or not self.store.check([ENDED]):
            self._in_vain = None
            return
        if self._in_vain is None:
            self._in_vain = now
        if now - self._in_vain < GRACE / 2:
            return
        failure = json.loads(self.store.get(ENDED))
        if failure["rank"] == self.rank:
            return
        sys.stderr.write(
            f"[rank{self.rank}]: {failure['text']}. This process waited for "
            "it, and ends.\n"
        )
        sys.stderr.flush()
        os._exit(1)

    def _is_reader(self):
        """Whether this process reads what all do, for all that wait."""
        heard = ""
        if self.store.check([READER]):
            heard = self.store.get(READER).decode()
        is_mine = heard.partition(" ")[0] == str(self.rank)
        self._silent = 0 if heard != self._heard else self._silent + 1
        self._heard = heard
        if heard and not is_mine and self._silent < ABSENT:
            return False
        mine = f"{self.rank} {self._looks}"
        self._heard = self.store.compare_set(READER, heard, mine).decode()
        return self._heard == mine

    def _hear_verdict(self):
        """Takes what a reader has found, if this process waits as it did."""
        if not self.store.check([VERDICT]):
            return
        verdict = json.loads(self.store.get(VERDICT))
        if verdict["meetings"][self.rank] == self.meetings:
            self.verdict = verdict["text"]

    def _judge(self, now):
        """Finds out whether all processes wait, some of them where nobody
        meets this one: then they do for ever."""
        if self._stand is None:
            self._stand = now, self._read()
        since, before = self._stand
        if now - since < 2 * self._period:
            return
        answers = self._read()
        self._stand = now, answers
        if len(answers) < self.world or len(before) < self.world:
            return
        said = list(answers.values())
        if (
            all(
                a["looks"] > before[rank]["looks"] and not a.get("left")
                for rank, a in answers.items()
            )
            and all(a["still"] >= self.patience / 2 for a in said)
            and any(a["meets"] is None for a in said)
            and any(a["meets"] is not None for a in said)
        ):
            meetings = [a["meetings"] for a in said]
            said = [{**a, "waits": True} for a in said]
            text = describe(
                dict(enumerate(said)), self.world, self.patience / 2
            )
            verdict = {"text": text, "meetings": meetings}
            self.store.set(VERDICT, json.dumps(verdict))
            if self.place is not None:
                self._hear_verdict()

    def _ask(self, now):
        """Says, some looks later, what all do; unless another has, in this
        wait. It goes on looking: the others ask for its looks too."""
        if self._asked is None:
            self._asked = now, self._read()
        since, before = self._asked
        if now - since < SILENCE:
            return
        answers = _alive(before, self._read())
        if self.store.add(COUNT, 1) == self._count + 1:
            logger.warning("%s", describe(answers, self.world, self.patience))
        self._count = None

    def missing(self, is_late):
        """Why some processes do not come. Takes some seconds.

        Args:
            is_late: whether torch has waited for them for too long.

        Returns:
            String, None where all of them are there.
        """
        before = self._read()
        time.sleep(3 * self._period + 1)
        now = self._read()
        answers = _alive(before, now)
        if is_late:
            # As it was: since then the program has gone on.
            said = {rank: before[rank] for rank in answers if rank in before}
            return describe(said, self.world, self.timeout, hint="")
        left = [rank for rank, said in answers.items() if said.get("left")]
        gone = [rank for rank in range(self.world) if rank not in answers]
        if gone:
            return (
                f"{processes(gone).capitalize()} ended first, without an error "
                "of Python's: killed (for want of memory?), crashed, or out of "
                "reach. The output of that process, or its host, tells why."
            )
        if left:
            return (
                f"The program of {processes(left)} has ended, and others "
                f"waited for it. {ADVICE}"
            )
        return None

    def _read(self):
        keys = [KEY.format(rank) for rank in range(self.world)]
        return {
            rank: json.loads(self.store.get(key))
            for rank, key in enumerate(keys)
            if self.store.check([key])
        }


def _alive(before, now):
    """What those say that have looked since, or have left."""
    return {
        rank: said
        for rank, said in now.items()
        if said.get("left")
        or rank not in before
        or said["looks"] != before[rank]["looks"]
    }


def who_is_missing(is_late):
    """As `Watch.missing`; None where nobody watches."""
    watch = _current[0]
    return None if watch is None else watch.missing(is_late)


def note_failure(text):
    """Lets the others know, if they come to wait for this process, what a call
    of Keras's has failed with that the program has gone on after.

    Args:
        text: string, or None where all have met since.
    """
    watch = _current[0]
    if watch is not None:
        watch.failure = text


def processes(ranks):
    """How some processes are called."""
    return f"process{'es' if len(ranks) > 1 else ''} " + ", ".join(
        map(str, ranks)
    )


def wait(work, place):
    """Waits for a collective that every process comes to, sooner or later.

    Args:
        work: of the collective.
        place: string, where this process is.

    Raises:
        WaitsForEver: where all processes have waited for half as long as it
            takes until that is said, some of them in other collectives.
    """
    watch = _current[0]
    if watch is None:
        work.wait()
        return
    watch.place, watch.verdict = place, None
    watch.meetings += 1
    try:
        while True:
            try:
                work.wait(datetime.timedelta(seconds=PERIOD))
                return
            except RuntimeError:
                if work.is_completed():
                    raise
            if watch.verdict is not None:
                raise WaitsForEver(
                    f"This process would wait for ever ({place}). "
                    f"{watch.verdict}"
                )
    finally:
        watch.place = None


def describe(answers, world, patience, hint=HINT):
    """The paragraph that is said.

    Args:
        answers: dict from ranks to what they said of themselves.
        world: int, how many processes there are.
        patience: float, for how many seconds some have waited, None for the
            time that torch has.
        hint: string, of what to do about being told.
    """
    how_long = "too long" if patience is None else f"{patience:g} s"
    groups = collections.defaultdict(list)
    for rank in range(world):
        groups[_does(answers.get(rank))].append(rank)
    lines = [f"  {processes(ranks)}: {what}" for what, ranks in groups.items()]
    return "\n".join(
        [
            f"Processes have waited for others for {how_long}:",
            *lines,
            _advice(answers, world) + hint,
        ]
    )


def _does(said):
    """What a process does, in words."""
    if said is None:
        return "not answering: stopped, dead, or out of reach"
    if said.get("left"):
        return "its program has ended"
    text = f"{'waiting' if said['waits'] else 'busy'}, {said['place']}"
    failure = said.get("failure")
    return text if failure is None else f"{text}, after {failure}"


def _advice(answers, world):
    """What to look for, by what the processes do."""
    said = list(answers.values())
    calls = {a.get("call") for a in said}
    if len(said) < world:
        kind = "is gone"
    elif len(calls) > 1 or None in calls:
        return ADVICE
    elif not all(a["waits"] for a in said):
        kind = "is slow"
    elif len({a["place"] for a in said}) > 1:
        kind = "branches"
    else:
        return ADVICE
    return ADVICE_TO_ALL[kind]


def begin(store, rank, world, timeout=None, most=None):
    """Starts to watch this process; returns a function that ends it.

    Args:
        store: the store of all processes.
        rank, world: ints, of this process, and how many there are.
        timeout: float, seconds until torch ends a wait, if the user has set it.
        most: float, seconds, by when who waits for whom must have been said.
    """
    try:
        patience = float(os.environ.get(VARIABLE, PATIENCE))
    except ValueError:
        raise ValueError(
            f"{VARIABLE} is a number of seconds, 0 for never. Received: "
            f"{VARIABLE}={os.environ[VARIABLE]!r}"
        ) from None
    if patience <= 0 or not hasattr(time, "pthread_getcpuclockid"):
        return lambda: None
    patience = min(patience, most or patience)
    watch = Watch(store, rank, world, patience, timeout)
    watch.start()
    return watch.stop
