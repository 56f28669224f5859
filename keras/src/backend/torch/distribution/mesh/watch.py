"""Says who waits for whom, where processes wait for one another.

A program that one process leaves, or in which one does what the others do not,
waits: torch says nothing until its timeout, half an hour later on gloo. Here a
thread of each process looks now and then at what the main thread does, and
tells it to the others through a connection of its own to their store. Where
the main thread has waited in a collective for long, one process says once what
each of them is doing, and what to change.

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

# What programs call that communicates.
CALLS = frozenset(
    """
    fit evaluate predict train_on_batch test_on_batch predict_on_batch
    save save_weights load_weights load_model export get_weights set_weights
    initialize set_distribution backward convert_to_numpy
    """.split()
)


ADVICE = (
    "What communicates (`fit`, `evaluate`, `predict`, `save`, reading weights) "
    "must be called by every process, in the same order and on the same data. "
    "Do not put it behind `if process_id() == 0`."
)

# The `Watch` of this process, None without one.
_current = [None]


class WaitsForEver(RuntimeError):
    """All processes wait, and not in one collective."""


def _folder(*path):
    return os.path.join(os.path.realpath(os.path.join(*path)), "")


HERE = os.path.dirname(__file__)
TORCH = _folder(os.path.dirname(torch.__file__))
COMMUNICATES = (_folder(TORCH, "distributed"), _folder(HERE, os.pardir))
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


class Place:
    """What a thread is doing.

    Args:
        frame: its innermost frame.
        closely: bool, whether to look at variables of its frames too. They
            are kept until the frame ends: to be asked of what stands still.

    Attributes:
        line: string, the line of the user's own code.
        call: string, what it has called of Keras, or None.
        layer: string, the path of the layer that is called, or None.
        communicates: whether torch or this project communicates.
    """

    def __init__(self, frame, closely=False):
        self.line = self.call = self.layer = None
        self.communicates = communicates(frame.f_code.co_filename)
        while frame is not None and self.line is None:
            self._look_at(frame, closely)
            frame = frame.f_back

    def _look_at(self, frame, closely):
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        owner = owner_of(file)
        if owner == "user":
            self.line = f"{os.path.basename(file)}:{frame.f_lineno}"
        elif owner == "keras" and name in CALLS:
            # Of those of one name, the innermost tells more.
            if not (self.call or "").startswith(name):
                self.call = name + (_progress(frame) if closely else "")
        elif closely and name == "_call" and file.endswith("execution.py"):
            layer = frame.f_locals.get("layer")
            self.layer = self.layer or getattr(layer, "path", None)

    def __str__(self):
        parts = [
            self.line,
            self.call and f"in `{self.call}`",
            self.layer and f"layer '{self.layer}'",
        ]
        return ", ".join(part for part in parts if part) or "at no known line"


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
    """

    def __init__(self, store, rank, world, patience):
        # The store's own connection is of one thread.
        self._server, self.store = store, store.clone()
        self.store.set_timeout(datetime.timedelta(seconds=TIMEOUT))
        self.rank, self.world = rank, world
        self.patience = patience
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
        if not is_watching or has_failed or self._thread.is_alive():
            return
        try:
            self._part()
        except RuntimeError as error:
            logger.debug("The store has gone before this process: %s", error)
        self._server = None

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
        place, now = Place(frame), time.monotonic()
        if (str(place), clock) != self._seen:
            self._since, self._seen = now, (str(place), clock)
        still = now - self._since if place.communicates else 0.0
        is_still = now - self._since >= self.patience
        if is_still:
            place = Place(frame, closely=True)
        self._looks += 1
        said = {
            "looks": self._looks,
            "place": str(place),
            "waits": is_still and place.communicates,
            "still": still,
            "meets": self.place,
            "meetings": self.meetings,
        }
        self.store.set(KEY.format(self.rank), json.dumps(said))
        waits_long = still >= self.patience / 2
        reads = waits_long and self._is_reader()
        if waits_long and self.place is not None:
            self._hear_verdict()
        if reads:
            self._judge(now)
        else:
            self._stand = None
        if not said["waits"]:
            self._count, self._asked = self.store.add(COUNT, 0), None
        elif not reads:
            self._asked = None
        elif self._count is not None:
            self._ask(now)

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
                a["looks"] > before[rank]["looks"]
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
        answers = {
            rank: said
            for rank, said in self._read().items()
            if rank not in before or said["looks"] != before[rank]["looks"]
        }
        if self.store.add(COUNT, 1) == self._count + 1:
            logger.warning("%s", describe(answers, self.world, self.patience))
        self._count = None

    def _read(self):
        keys = [KEY.format(rank) for rank in range(self.world)]
        return {
            rank: json.loads(self.store.get(key))
            for rank, key in enumerate(keys)
            if self.store.check([key])
        }


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


def describe(answers, world, patience):
    """The paragraph that is said.

    Args:
        answers: dict from ranks to what they said of themselves.
        world: int, how many processes there are.
        patience: float, for how many seconds some have waited.
    """
    groups = collections.defaultdict(list)
    for rank in range(world):
        said = answers.get(rank)
        if said is None:
            groups["not answering: stopped, dead, or out of reach"].append(rank)
        else:
            verb = "waiting" if said["waits"] else "busy"
            groups[f"{verb}, {said['place']}"].append(rank)
    lines = [f"  {processes(ranks)}: {what}" for what, ranks in groups.items()]
    return "\n".join(
        [
            f"Processes have waited for others for {patience:g} s:",
            *lines,
            f"{ADVICE} ({VARIABLE}=0 turns this off.)",
        ]
    )


def begin(store, rank, world):
    """Starts to watch this process; returns a function that ends it.

    Args:
        store: the store of all processes.
        rank, world: ints, of this process, and how many there are.
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
    watch = Watch(store, rank, world, patience)
    watch.start()
    return watch.stop
