"""What must be the same on all processes, and whether it is.

A process states what it has in *facts*: a dict from names to plain values and
samples of arrays. A digest of them, one number, rides on a collective that
there is anyway. Only where digests differ are facts exchanged, to say which of
them differ, and on which processes.
"""

import dataclasses
import logging
import math
import zlib

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src import tree
from keras.src.backend.torch.distribution.mesh import together
from keras.src.backend.torch.distribution.mesh import trail

logger = logging.getLogger("keras.distribution")

# Sums of the squares of digests of 2**12 processes are exact in float64, whose
# integers have 53 bits.
DIGEST_BITS = 20

# How far samples of floats may differ, of the largest entry. Devices of two
# kinds round differently, and replicas drift apart; other data or another
# learning rate differ by more.
ROUNDING, DRIFT = 1e-5, 1e-2

# Floats that numpy has: bfloat16 and those of 8 bits are none of its own.
IN_NUMPY = (torch.float16, torch.float32, torch.float64)

PARTS_OF_DATA = ("x", "y", "sample_weight")
SAMPLED_ROWS, SAMPLED_ENTRIES = 4, 16

COMMUNICATED = "what the step has communicated for"
GATHERED = "what the step has gathered"

ADVICE = {
    "batch": "With `auto_shard_dataset=True` every process must read the same "
    "global data in the same order: give whatever shuffles, splits or draws "
    "data one seed on all of them, and sort what comes from a set or a "
    "folder. If each process has rows of its own, set "
    "`auto_shard_dataset=False` on the distribution.",
    "weights": "Weights must be set on every process, to the same values. Load "
    "them on all processes, from one file.",
    "learning rate": "Callbacks that change the learning rate must do so on "
    "every process, by what all of them know.",
    "what the step has": "Layers that communicate must be called in one order "
    "on all processes, whatever each of them knows for itself: its number, its "
    "time, its files. What was computed in this step is of no use.",
    "": "Build, compile and fit the same model with the same arguments on all "
    "of them.",
}


@dataclasses.dataclass
class Disagreement:
    """One fact that differs.

    Attributes:
        name: of the fact.
        values: dict from texts of the values to lists of ranks.
        drift: float, the relative difference of samples of floats, or None
            for anything else.
    """

    name: str
    values: dict
    drift: float | None

    def __str__(self):
        parts = [
            f"{text} on process{'es' if len(ranks) > 1 else ''} "
            f"{', '.join(map(str, ranks[:8]))}{', ...' if ranks[8:] else ''}"
            for text, ranks in self.values.items()
        ]
        return f"{self.name}: {'; '.join(parts)}"


def digest(facts):
    """A number of `DIGEST_BITS` bits that tells facts apart."""
    code = 0
    for name, value in facts.items():
        code = zlib.crc32(name.encode(), code)
        if isinstance(value, np.ndarray):
            code = zlib.crc32(value.tobytes(), code)
        elif isinstance(value, trail.Trail):
            code = zlib.crc32("\n".join(map(str, value)).encode(), code)
        else:
            code = zlib.crc32(repr(value).encode(), code)
    return code & (1 << DIGEST_BITS) - 1


def add_up(flags):
    """Sums over processes of some numbers of the host, in float64.

    Collective: every process calls it.
    """
    return adding_up(flags)()


def adding_up(flags):
    """As `add_up`, under way: a function that waits for the sums.

    Collective: every process calls it.
    """
    sums = torch.tensor(flags, dtype=torch.float64)
    work = dist.all_reduce(sums, async_op=True)

    def wait():
        work.wait()
        return sums.tolist()

    return wait


class Ballot:
    """Facts, to be compared by a sum over processes.

    Args:
        facts: dict from names to plain values and numpy arrays.

    Attributes:
        numbers: two floats, to be added up in float64.
    """

    def __init__(self, facts):
        self.facts = facts
        number = float(digest(facts))
        self.numbers = [number, number * number]

    def check(self, sums, what):
        """Raises on all processes if their facts differ.

        By the inequality of Cauchy and Schwarz, n times the sum of squares is
        the square of the sum only if all numbers are equal: so all processes
        come to one answer.

        Collective if they differ: every process calls it.

        Args:
            sums: the sums of the `numbers` of all processes.
            what: string, what was under way.

        Returns:
            Whether they differ in what may differ between data shards.
        """
        total, squares = map(int, sums)
        if total * total == dist.get_world_size() * squares:
            return False
        return not check(self.facts, what)


def compare(facts, what):
    """Raises on all processes if their facts differ, or what is under way.

    Collective: every process calls it.

    Args:
        facts: dict from names to plain values and numpy arrays.
        what: string, what was under way.
    """
    if not together.is_same(digest(facts), what):
        check(facts, what)


def check(facts, what="", shards=None):
    """Raises on all processes if their facts differ.

    Collective: every process calls it, as soon as digests differ.

    Args:
        facts: dict from names to plain values and numpy arrays.
        what: string, what was under way.
        shards: optional list, for each rank the data shard it belongs to. Facts
            are compared between processes of one shard only.

    Returns:
        List of `Disagreement`s: drifts, that have been warned of.

    Raises:
        ValueError: naming what differs, on which processes.
    """
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    groups = {}
    for rank, theirs in enumerate(everyone):
        groups.setdefault(shards and shards[rank], {})[rank] = theirs
    found = [d for group in groups.values() for d in differences(group)]
    wrong = [d for d in found if d.drift is None or d.drift > DRIFT]
    if not wrong:
        _warn_of_drift(found)
        return found
    listed = "".join(f"\n  {d}" for d in wrong[:5])
    more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    advice = next(
        text for key, text in ADVICE.items() if wrong[0].name.startswith(key)
    )
    raise ValueError(
        f"Processes differ in what must be the same on all of them"
        f"{what and f', {what}'}:{listed}{more}\n{advice}"
    )


def differences(facts_of):
    """The `Disagreement`s among some processes.

    Args:
        facts_of: dict from ranks to facts.
    """
    found = []
    names = dict.fromkeys(name for facts in facts_of.values() for name in facts)
    for name in names:
        values = {rank: facts.get(name) for rank, facts in facts_of.items()}
        if all(isinstance(value, trail.Trail) for value in values.values()):
            values = _first_that_differs(values)
        first = next(iter(values.values()))
        drift, same = 0.0, True
        for value in values.values():
            if _is_sample(value) and _is_sample(first):
                drift = max(drift, _drift(value, first))
            elif not _equal(value, first):
                same = False
        if not same or drift:
            texts = {}
            for rank, value in values.items():
                texts.setdefault(_text(value), []).append(rank)
            found.append(Disagreement(name, texts, drift if same else None))
    return found


def _first_that_differs(trails):
    """Of the processes of a data shard, what is in the first place where they
    differ."""
    shards = {}
    for rank, names in trails.items():
        shards.setdefault(names.shard, {})[rank] = names
    for each in shards.values():
        found = _first_of_one_shard(each)
        if found is not None:
            return found
    return dict.fromkeys(trails, "")


def _first_of_one_shard(trails):
    longest = max(map(len, trails.values()))
    for place in range(longest):
        found = {
            rank: f"{names[place]}, as number {place + 1}"
            if place < len(names)
            else f"nothing, after {len(names)}"
            for rank, names in trails.items()
        }
        if len(set(found.values())) > 1:
            return found
    return None


def _is_sample(value):
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _equal(a, b):
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return (
            type(a) is type(b)
            and a.dtype == b.dtype
            and a.tobytes() == b.tobytes()
        )
    return repr(a) == repr(b)


def _drift(a, b):
    """How far two samples differ, relative to their largest entry."""
    if a.shape != b.shape:
        return np.inf
    if a.tobytes() == b.tobytes():
        return 0.0
    a, b = a.astype("float64"), b.astype("float64")
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return np.inf
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    scale = max(np.abs(a).max(), np.abs(b).max())
    # Bits may differ where values do not: zero has two signs.
    return float(np.abs(a - b).max() / scale) if scale else 0.0


def _text(value):
    if value is None:
        return "nothing"
    if isinstance(value, np.ndarray):
        start = ", ".join(f"{x:.6g}" for x in value.ravel()[:4].tolist())
        return f"[{start}{', ...' if value.size > 4 else ''}]"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _warn_of_drift(found):
    drifted = [d for d in found if d.drift and d.drift > ROUNDING]
    if drifted:
        logger.warning(
            "Processes that hold copies of one value differ by %.1e of it, "
            "more than by rounding once: %s",
            max(d.drift for d in drifted),
            drifted[0],
        )


def sample(x, rows=SAMPLED_ROWS):
    """A few numbers of an array, as a fact.

    Never waits for a GPU: of what lies there, only shape and dtype.

    Args:
        x: array or tensor, or anything else, of which nothing is known.
        rows: int, of how many rows some entries are taken.

    Returns:
        1-D numpy array, or a string.
    """
    shape = getattr(x, "shape", "")
    shape = tuple(shape) if isinstance(shape, tuple) else shape
    kind = f"{getattr(x, 'dtype', '')} {shape}".strip()
    if isinstance(x, torch.Tensor):
        is_read = x.device.type == "cpu" and x.layout is torch.strided
        if not is_read or not x.numel():
            return kind
        return _to_numpy(_taken(x.detach(), rows, torch.cat))
    if not hasattr(x, "__array__") or not all(getattr(x, "shape", (0,))):
        return kind
    taken = _taken(x, rows, np.concatenate)
    # Of text and other objects, what they look like.
    return taken if taken.dtype.kind in "biufc" else repr(taken.tolist())


def sample_of_file(x, rows=SAMPLED_ROWS):
    """As `sample`, of an array that lies in a file, and is not read.

    Args:
        x: an array that has a shape, and `take`s numbers by their positions.
    """
    if not len(x.shape) or not all(x.shape):
        return sample(x, rows)
    length = math.prod(x.shape[1:])
    taken = range(0, length, max(1, length // SAMPLED_ENTRIES))
    picked = _picked_rows(x.shape[0], rows)
    return x.take([row * length + i for row in picked for i in taken])


def _picked_rows(size, rows):
    """Which of `size` rows are looked at."""
    last = max(1, rows - 1)
    return sorted({(size - 1) * i // last for i in range(rows)})


def _taken(x, rows, join):
    if not len(x.shape):
        return x.reshape(1)
    picked = []
    for i in _picked_rows(x.shape[0], rows):
        # A pandas frame counts by columns, but for its `iloc`.
        row = getattr(x, "iloc", x)[i : i + 1]
        row = row if isinstance(row, torch.Tensor) else np.asarray(row)
        row = row.reshape(-1)
        picked.append(row[:: max(1, len(row) // SAMPLED_ENTRIES)])
    return join(picked)


def facts_of_batch(data, rows=SAMPLED_ROWS):
    """Facts of the global rows of a batch, or of whole arrays."""
    facts = {}
    # As Keras unpacks a batch.
    if not isinstance(data, (tuple, list)) or len(data) > len(PARTS_OF_DATA):
        data = (data,)
    for name, part in zip(PARTS_OF_DATA, data):
        leaves = tree.flatten(part)
        for i, leaf in enumerate(leaves):
            if leaf is None:
                continue
            which = f"[{i}]" if len(leaves) > 1 else ""
            facts[f"batch, {name}{which}"] = sample(leaf, rows)
    return facts


def facts_of_weights(variables, names):
    """Facts of weights: a few entries of each that every process stores whole,
    and of what a program last wrote into the others.

    Waits for a GPU, once for all of them.

    Args:
        variables: list of variables.
        names: `configuration.Names` of their model.
    """
    facts, by_kind = {}, {}
    for number, v in enumerate(variables):
        value = v._value
        name = f"weights, {names.of(v.path)}"
        if name in facts:
            name = f"{name}, variable {number}"
        if isinstance(value, DTensor):
            facts[name] = v.written
        elif value.numel():
            flat = value.detach().reshape(-1)
            taken = flat[:: max(1, len(flat) // SAMPLED_ENTRIES)]
            kind = (value.dtype, value.device)
            # Its place among the facts is this one, on all processes.
            facts[name] = None
            by_kind.setdefault(kind, []).append((name, taken))
    for group in by_kind.values():
        host = _to_numpy(torch.cat([taken for _, taken in group]))
        stops = np.cumsum([len(taken) for _, taken in group])
        for (name, _), part in zip(group, np.split(host, stops[:-1])):
            facts[name] = part
    return facts


def _to_numpy(x):
    x = x.detach().cpu()
    if x.is_floating_point() and x.dtype not in IN_NUMPY:
        x = x.float()
    return x.resolve_conj().resolve_neg().numpy()
