"""What is ambient: what code sees of a variable that it reads, and of a batch.

Nothing but this module writes it, and what is set is put back.

Outside of layers a sharded variable shows what is stored: a DTensor of the
global shape. Inside any layer's call it shows what the layer computes with,
and inside an optimizer's update the local shard.

Threads: what is here is of each thread, as a layer's call is; autograd, which
runs a layer again in a thread of its own (activation checkpointing), enters
the modes that held (`as_now`). What belongs to a step is of the process, since
hooks of its backward pass run in any thread: the rows of its batch
(`rows.current_rows`), and which distribution was set last (`context`). Works
that may fail (`together`) are of the thread that does them.
"""

import contextlib
import enum
import threading


class Shows(enum.Enum):
    """What a sharded variable shows inside a layer's call."""

    OPERAND = "our shard, whole on the data axis"
    DTENSORS = "a DTensor of the model mesh; plain variables too"
    WHOLE = "the whole value"
    LOCAL = "what this process stores, also outside of layers"
    STORED = "what is stored, as outside of layers"


class _Modes(threading.local):
    # Threads: autograd may run a layer again (activation checkpointing).
    step = None  # the `borders.Step` in which code sees the global batch
    known = False  # code that knows about rows is handed local ones
    calls = 0  # layer calls under way
    layer = None  # the innermost of them
    on_shards = False  # torch functions are handed shards: see `operators`
    direct = False  # torch functions are left to torch
    shows = Shows.OPERAND  # what the innermost of them reads of variables
    gathered = None  # dict of whole weights, inside a layer that repeats itself
    reads = None  # the `resharding.Reads` of the innermost layer, or None
    shared = None  # list of what the layers inside one share, while it runs
    updates = False  # an optimizer's: what weights meet is equal everywhere
    sharded_outputs = False  # what leaves the outermost layer may be sharded
    runs_backward_once = False  # a step of Keras's own code alone runs
    drawing = False  # drawing initial values, equal on all processes
    settle = None  # what a variable's readers call first: see `late`
    part = None  # the `drawing.Part` that is to be drawn of one

    def __init__(self):
        # Of each thread. `torch.compile` guards on what an object itself has,
        # and what is first written while it compiles fails its guards.
        vars(self).update(
            (name, value)
            for name, value in vars(_Modes).items()
            if not name.startswith("_")
        )


modes = _Modes()


@contextlib.contextmanager
def _set(**values):
    previous = {name: getattr(modes, name) for name in values}
    for name, value in values.items():
        setattr(modes, name, value)
    try:
        yield
    finally:
        for name, value in previous.items():
            setattr(modes, name, value)


@contextlib.contextmanager
def swapped(places):
    """Within it, attributes of other objects have other values; then those that
    they had, whatever has been written into them.

    Args:
        places: iterable of triples of an object, the name of an attribute that
            it has, and the value.
    """
    places = list(places)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, value in places:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class layer_call:
    """Within it, a layer is called.

    Args:
        layer: the layer.
    """

    # A class, as it is entered in each call: it takes a third of the time.
    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        self.before = modes.calls, modes.layer, modes.shared, modes.reads
        modes.calls += 1
        modes.layer, modes.reads = self.layer, None
        if self.layer._layers:
            modes.shared = []

    def __exit__(self, *error):
        modes.calls, modes.layer, modes.shared, modes.reads = self.before


def on_global_batch(step):
    """Within it, code sees the global batch: see `global_rows`."""
    return _set(step=step, known=False)


def on_local_rows():
    """Within it, code that knows about rows is handed local ones."""
    return _set(known=True)


def on_dtensors():
    """Within it, plain variables enter as `Replicate` when they are read."""
    return _set(shows=Shows.DTENSORS)


def on_whole_weights():
    """Within it, sharded variables are gathered when they are read."""
    return _set(shows=Shows.WHOLE)


def on_weights_gathered_once():
    """Within it, all layers run on whole weights, each gathered once."""
    return _set(shows=Shows.WHOLE, gathered={})


def on_plain_tensors():
    """Within it, variables are read as a layer without a style reads them."""
    return _set(shows=Shows.OPERAND)


def settle_before_reads(settle):
    """Lets whoever reads a variable, in this thread, wait for what it will be.

    Args:
        settle: function without arguments, that calls this with None; or None.
    """
    modes.settle = settle


def handing_shards():
    """Within it, torch functions are handed shards."""
    return _set(on_shards=True)


def reads(reads):
    """Within it, what the innermost layer unshards is noted."""
    return _set(reads=reads)


def sharded_outputs():
    """Within it, what leaves the outermost layer may be sharded."""
    return _set(sharded_outputs=True)


def local_shards():
    """Within it, `variable.value` is the local shard (under `no_grad`)."""
    return _set(shows=Shows.LOCAL)


def updating():
    """Within it, plain tensors that weights meet are equal on all processes."""
    return _set(updates=True)


def is_local():
    """Whether `variable.value` is the local shard."""
    return modes.shows is Shows.LOCAL


def stored_values():
    """Within it, `variable.value` is what is stored, in any layer's call."""
    return _set(shows=Shows.STORED)


def direct():
    """Within it, torch functions do with DTensors what torch has for them."""
    return _set(direct=True)


def running_backward_once():
    """Within it, no graph is gone through twice, or differentiated."""
    return _set(runs_backward_once=True)


def drawing_initial_values():
    """Within it, random numbers are equal on all processes."""
    return _set(drawing=True, part=None)


def drawing_part(part):
    """Within it, the one tensor that is drawn is a variable's initial value,
    and of it only a part.

    Args:
        part: `drawing.Part`.
    """
    return _set(part=part)


def as_now():
    """The modes as they are, to be entered again later."""
    names = [
        name
        for name in vars(_Modes)
        # These are of one call, not set.
        if not name.startswith("_")
        and name not in ("on_shards", "shared", "reads")
    ]
    return _set(**{name: getattr(modes, name) for name in names})
