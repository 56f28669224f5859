"""A layout map that is found, and not written: `LayoutMap.auto`.

A model is traced once (`processes.flows`). Variables that are alike but for the
numbers in their paths are decided on together. Each is left whole, or cut on a
dim that the model axis divides; a layout is judged by the bytes that a process
sends in a step, on the model axis alone, and those that it holds. Where a block
ends in a sum of branches activations are whole, so blocks are searched apart:
all choices of one, or, where these are too many, choices that no change of one
variable betters. Then, until a process holds no more than the budget, the
largest weights are cut by the data axis (FSDP).

As in Megatron-LM (Shoeybi et al., 2019), what comes out pairs a layer whose
outputs are cut with one whose inputs are. Of search, sharing between repeated
blocks and costs after Alpa (Zheng et al., 2022).
"""

import collections
import itertools
import math
import re

from keras.src import backend
from keras.src.distribution import processes
from keras.src.distribution import report_text
from keras.src.utils import dtype_utils

# A byte that a process holds may cost so many that it sends in a step. Held
# bytes are computed with, reduced over data shards and updated by an optimizer,
# and there are activations beside them.
WORTH = 30
# Variables of less than this share of all bytes are whole, or follow others.
SMALL = 0.015
CHOICES = 4096


class Group:
    """Variables that are decided on together.

    Attributes:
        members: list of indices.
        key: string, a regular expression of their paths.
        dims: the choices: dims to cut, and None.
        bytes: int, of all of them.
    """

    def __init__(self, key):
        self.key, self.members, self.dims, self.bytes = key, [], [None], 0


class Search:
    """The search for the cuts over one model axis.

    Args:
        weights, flow: what `processes.flows().trace` gives.
        shards: int, the size of the axis.
    """

    def __init__(self, weights, flow, shards):
        self.weights, self.shards = weights, shards
        self.groups = _groups(weights, flow, shards)
        self.group_of = {
            i: g for g, group in enumerate(self.groups) for i in group.members
        }
        total = sum(_bytes(v) for v in weights)
        self.counts = [
            group.bytes >= SMALL * total and len(group.dims) > 1
            for group in self.groups
        ]
        self.events = self._of_groups(flow.events)

    def _of_groups(self, events):
        """Events of groups and not of variables, and how often they are."""
        columns, counted = collections.defaultdict(list), collections.Counter()
        for e in events:
            labels = self._labels(e["labels"])
            others = self._labels(e["others"])
            if e["kind"] == "column":
                columns[e["origin"]].append((labels, others, e["bytes"]))
            else:
                counted[e["kind"], labels, others, e["bytes"], e["more"]] += 1
        for given in columns.values():
            counted["columns", frozenset(given), None, 0, 0] += 1
        return counted

    def _labels(self, labels):
        found = ((self.group_of[i], d) for i, d in labels)
        return frozenset((g, d) for g, d in found if d in self.groups[g].dims)

    def best(self):
        """The decisions: a list of a dim or None for each group, and what
        comes next: a tuple of the cost that it adds, the groups and dims."""
        decisions = [None] * len(self.groups)
        second = None
        for part, events in self._parts():
            ranked = self._ranked(part, events)
            cost, chosen = ranked[0]
            for g, dim in zip(part, chosen):
                decisions[g] = dim
            for other_cost, other in ranked[1:]:
                if second is None or other_cost - cost < second[0]:
                    second = other_cost - cost, part, other
        return decisions, second

    def _parts(self):
        """Groups that meet in an event, and these events."""
        parent = list(range(len(self.groups)))

        def root(g):
            while parent[g] != g:
                g = parent[g]
            return g

        met = {event: sorted(_met(event)) for event in self.events}
        for groups in met.values():
            for g in groups[1:]:
                parent[root(g)] = root(groups[0])
        parts, events = collections.defaultdict(list), {}
        for g, group in enumerate(self.groups):
            if len(group.dims) > 1:
                parts[root(g)].append(g)
        for event, groups in met.items():
            if groups:
                events.setdefault(root(groups[0]), []).append(event)
        return [(part, events.get(r, [])) for r, part in parts.items()]

    def _ranked(self, part, events):
        """The best choices for some groups, and the next: pairs of a cost and
        a tuple of dims."""
        choices = [self.groups[g].dims for g in part]

        def cost(dims):
            return self.cost(dict(zip(part, dims)), events)

        if math.prod(len(dims) for dims in choices) <= CHOICES:
            ranked = [
                (cost(dims), dims) for dims in itertools.product(*choices)
            ]
        else:
            ranked = _descents(choices, cost)
        ranked.sort(key=lambda pair: pair[0])
        return ranked[:2]

    def cost(self, decisions, events):
        """Bytes that a process sends, and what it holds."""
        cut = {(g, d) for g, d in decisions.items() if d is not None}
        held = sum(
            self.groups[g].bytes / (1 if d is None else self.shards)
            for g, d in decisions.items()
            if self.counts[g]
        )
        return self.sent(cut, events) + WORTH * held

    def sent(self, cut, events):
        return sum(
            self.events[event] * _sent(event, cut, self.shards)
            for event in events
        )


def _descents(choices, cost):
    """Choices that no change of one betters, from a few starts."""
    found = {}
    for start in range(max(map(len, choices))):
        dims = [options[min(start, len(options) - 1)] for options in choices]
        best, is_better = cost(dims), True
        while is_better:
            is_better = False
            for i, options in enumerate(choices):
                for option in options:
                    other = [*dims[:i], option, *dims[i + 1 :]]
                    now = cost(other)
                    if now < best:
                        dims, best, is_better = other, now, True
        found[tuple(dims)] = best
    return [(value, dims) for dims, value in found.items()]


def _met(event):
    kind, labels, others, _, _ = event
    if kind == "columns":
        return {g for mine, inner, _ in labels for g, _ in (*mine, *inner)}
    return {g for g, _ in (*labels, *others)}


def _sent(event, cut, shards):
    """Bytes that a process sends because of an event."""
    kind, labels, others, size, more = event
    part = (shards - 1) / shards
    if kind == "columns":
        # One reduction of what several were handed.
        costs = [
            (part if inner & cut else 2 * part) * handed
            for mine, inner, handed in labels
            if mine & cut
        ]
        return max(costs, default=0)
    mine, theirs = bool(labels & cut), bool(others & cut)
    if kind == "gather":
        return part * size * mine
    if kind == "sum":
        return 2 * part * size * mine
    if kind == "meet":
        # What is whole is sliced, and its gradient is gathered.
        return part * (more if mine else size) * (mine != theirs)
    # "contract": activations, and a weight, are cut on the dim summed over.
    if mine and theirs:
        return 2 * part * size
    if theirs:
        return 2 * part * size + part * more
    return part * more * mine


def _bytes(variable):
    dtype = backend.standardize_dtype(variable.dtype)
    return math.prod(variable.shape) * dtype_utils.dtype_size(dtype) // 8


def pattern_of(path):
    """A regular expression of a path, whatever numbers it has."""
    return re.sub(r"\d+", r"\\d+", re.escape(path).replace(r"\-", "-"))


def _groups(weights, flow, shards):
    live = set()
    for event in flow.events:
        if event["kind"] != "gather":
            live |= event["labels"] | event["others"]
    groups = {}
    for i, v in enumerate(weights):
        shape = tuple(v.shape)
        pattern = pattern_of(v.path)
        dims = [
            d
            for d, n in enumerate(shape)
            if (i, d) in live and n % shards == 0 and (i, d) not in flow.follows
        ]
        kind = pattern, shape, v.dtype, tuple(dims)
        group = groups.setdefault(kind, Group(pattern))
        group.members.append(i)
        group.dims = [None, *dims]
        group.bytes += _bytes(v)
    return list(groups.values())


def find(
    model, mesh, batch_size=None, budget=None, x=None, batch_dim_name=None
):
    """See `LayoutMap.auto`.

    Returns:
        Tuple of a dict from keys to tuples of axis names, and a string: what
        was decided, and what else could have been.
    """
    names = list(mesh.axis_names)
    sizes = dict(zip(names, (int(n) for n in mesh.shape)))
    batch = batch_dim_name or names[0]
    batch = (batch,) if isinstance(batch, str) else tuple(batch)
    model_axes = [n for n in names if n not in batch and sizes[n] > 1]
    axis = max(model_axes, key=sizes.get, default=None)
    shards = 1 if axis is None else sizes[axis]
    data = math.prod(sizes[n] for n in batch)
    flows = processes.flows()
    made = flows.make(model, x)
    rows = batch_size if x is None else len(_first(x))
    rows = max(1, -(-(rows or data) // data))
    weights, flow = flows.trace(made, shards, rows, x)
    axes = [[None] * len(v.shape) for v in weights]
    notes = []
    if shards > 1:
        search = Search(weights, flow, shards)
        decisions, second = search.best()
        _cut(axes, search, decisions, flow, axis)
        notes.append(_sentence(search, decisions, axis))
        if second is not None:
            notes.append(_runner_up(search, second))
    if budget is not None:
        data_axis = max(batch, key=sizes.get)
        notes.append(
            _fit(
                weights,
                axes,
                sizes,
                data_axis,
                budget,
                _factor(made, flows.slots_of(made)),
            )
        )
    return _keys(weights, axes), "\n".join(notes)


def _first(x):
    from keras.src import tree

    return tree.flatten(x)[0]


def _cut(axes, search, decisions, flow, axis):
    cut = set()
    for group, dim in zip(search.groups, decisions):
        if dim is not None:
            for i in group.members:
                axes[i][dim] = axis
                cut.add((i, dim))
    # What is added to activations is cut as they are, where all alike are.
    for group in search.groups:
        follow = [_followed(i, axes, search, flow, cut) for i in group.members]
        if follow[0] is not None and len(set(follow)) == 1:
            for i in group.members:
                axes[i][follow[0]] = axis


def _followed(i, axes, search, flow, cut):
    """The dim of a weight that lies as the activations which it meets, None
    if there is none."""
    if any(axes[i]):
        return None
    for dim, size in enumerate(search.weights[i].shape):
        met = flow.follows.get((i, dim), ())
        if met and size % search.shards == 0:
            if all(labels & cut for labels in met):
                return dim
    return None


def _sentence(search, decisions, axis):
    cut = {(g, d) for g, d in enumerate(decisions) if d is not None}
    sent = search.sent(cut, search.events)
    whole = sum(_bytes(v) for v in search.weights)
    here = whole - sum(
        search.groups[g].bytes * (1 - 1 / search.shards) for g, _ in cut
    )
    return (
        f"over {axis}: a process holds {report_text.size_of(here)} of "
        f"{report_text.size_of(whole)} of weights, and sends about "
        f"{report_text.size_of(sent)} a step"
    )


def _runner_up(search, second):
    extra, part, dims = second
    changed = [
        f"{search.groups[g].key} "
        + ("whole" if d is None else f"cut on dim {d}")
        for g, d in zip(part, dims)
    ]
    return (
        f"runner-up: {'; '.join(changed[:4])}: worse by "
        f"{report_text.size_of(extra)} (a byte that is held counts as {WORTH} "
        "that are sent)"
    )


def _factor(model, slots):
    """How often a process holds a trainable weight: with a gradient, and what
    an optimizer keeps, Adam's two where there is none."""
    if slots is None:
        return 4
    weights = [tuple(v.shape) for v in model.trainable_variables]
    largest = max(weights, key=math.prod)
    count = sum(tuple(v.shape) == largest for v in slots)
    return 2 + count // weights.count(largest)


def _fit(weights, axes, sizes, data_axis, budget, factor):
    """Cuts the largest weights by the data axis until a process holds no more
    than the budget; a sentence."""

    def held(i):
        cut = math.prod(sizes[n] for n in axes[i] if n)
        return (
            _bytes(weights[i]) / cut * (factor if weights[i].trainable else 1)
        )

    total = sum(map(held, range(len(weights))))
    count = 0
    for i in sorted(range(len(weights)), key=held, reverse=True):
        if total <= budget:
            break
        shape = weights[i].shape
        free = [
            d
            for d, n in enumerate(shape)
            if axes[i][d] is None and n % sizes[data_axis] == 0
        ]
        if not free or sizes[data_axis] == 1:
            continue
        total -= held(i)
        axes[i][max(free, key=lambda d: shape[d])] = data_axis
        total += held(i)
        count += 1
    text = (
        f"weights, gradients and slots take {report_text.size_of(total)} a "
        f"process, of a budget of {report_text.size_of(budget)}"
    )
    if count:
        text += f", with {count} weights cut over {data_axis} (FSDP)"
    if total > budget:
        text += (
            f". It does not fit, by {report_text.size_of(total - budget)}: "
            "take a mesh of more processes"
        )
    return text


def _keys(weights, axes):
    """Keys that match what is cut alike, and nothing else."""
    cut_of = {v.path: tuple(cut) for v, cut in zip(weights, axes)}
    alike = {}
    for path, cut in cut_of.items():
        if any(cut):
            alike.setdefault((pattern_of(path), cut), []).append(path)
    keys = {}
    for (_, cut), paths in alike.items():
        key = common_pattern(paths)
        if any(
            re.fullmatch(key, path) and other != cut
            for path, other in cut_of.items()
        ):
            key = "|".join(map(re.escape, paths))
        keys[key] = cut
    return _joined(keys)


def common_pattern(paths):
    """A regular expression of paths that differ in numbers alone."""
    split = [re.split(r"(\d+)", path) for path in paths]
    parts = []
    for place, words in enumerate(zip(*split)):
        if place % 2 and len(set(words)) > 1:
            parts.append(r"\d+")
        else:
            parts.append(re.escape(words[0]).replace(r"\-", "-"))
    return "".join(parts)


def _joined(keys):
    """Joins keys of one layout that differ in one part of the path."""
    result = {}
    for key, cut in keys.items():
        parts = key.split("/")
        for other, theirs in list(result.items()):
            others = other.split("/")
            differ = [
                i for i, (a, b) in enumerate(zip(parts, others)) if a != b
            ]
            if (
                theirs == cut
                and len(parts) == len(others)
                and len(differ) == 1
                and "|" not in key
                and (differ[0] < len(parts) - 1)
            ):
                (i,) = differ
                inside = others[i]
                if inside.startswith("(") and inside.endswith(")"):
                    inside = inside[1:-1]
                elif "|" in inside:
                    continue
                others[i] = f"({inside}|{parts[i]})"
                del result[other]
                result["/".join(others)] = cut
                break
        else:
            result[key] = cut
    return result


def code_of(keys):
    """A program that makes such a layout map."""
    lines = ["layout_map = keras.distribution.LayoutMap(mesh)"]
    for key, cut in keys.items():
        quoted = f'r"{key}"' if "\\" in key else f'"{key}"'
        names = ", ".join(f'"{n}"' if n else "None" for n in cut)
        comma = "," if len(cut) == 1 else ""
        lines.append(f"layout_map[{quoted}] = ({names}{comma})")
    return "\n".join(lines)
