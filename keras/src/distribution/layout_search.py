"""The search for the cuts of a layout map: see `auto_layout`.

Variables that are alike but for the numbers in their paths are decided on
together. Each is left whole, or cut on a dim that the model axis divides; a
layout is judged by the bytes that a process sends in a step, on the model axis
alone, and those that it holds. Where a block ends in a sum of branches
activations are whole, so blocks are searched apart: all choices of one, or,
where these are too many, choices that no change of one variable betters. Of
several model axes each is searched for in turn, among the dims that are left;
what others cut by then is so much smaller.

As in Megatron-LM (Shoeybi et al., 2019), what comes out pairs a layer whose
outputs are cut with one whose inputs are. Of search, sharing between repeated
blocks and costs after Alpa (Zheng et al., 2022).
"""

import collections
import itertools
import math

from keras.src.distribution.layout_facts import bytes_of
from keras.src.distribution.layout_keys import pattern_of
from keras.src.distribution.layout_keys import without_numbers

# A byte that a process holds may cost so many that it sends in a step. Held
# bytes are computed with, reduced over data shards and updated by an optimizer,
# and there are activations beside them.
WORTH = 30
# Variables of less than this share of all bytes are whole, or follow others.
SMALL = 0.015
CHOICES = 4096
NOTHING = frozenset()


class Group:
    """Variables that are decided on together.

    Attributes:
        members: list of indices.
        key: string, a regular expression of their paths.
        dims: the choices: dims to cut, and None.
        bytes: number, of all of them, of which other axes leave so many.
    """

    def __init__(self, key):
        self.key, self.members, self.dims, self.bytes = key, [], [None], 0


class Search:
    """The search for the cuts over one model axis.

    Args:
        weights, flow: what `processes.flows().trace` gives.
        shards: int, the size of the axis.
        others: list of what other model axes cut, pairs of a set of labels
            (pairs of an index and a dim) and the size of the axis.
    """

    def __init__(self, weights, flow, shards, others=()):
        self.flow, self.shards, self.others = flow, shards, others
        self.groups = _groups(weights, flow, shards, others)
        self.group_of = {
            i: g for g, group in enumerate(self.groups) for i in group.members
        }
        total = sum(group.bytes for group in self.groups)
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
            size = e["bytes"] / _parts(e["around"], self.others)
            more = e["more"] / _parts(e["more_around"], self.others)
            if e["kind"] == "column":
                columns[e["origin"]].append((labels, others, size))
            else:
                counted[e["kind"], labels, others, size, more] += 1
        for given in columns.values():
            counted["columns", frozenset(given), None, 0, 0] += 1
        return counted

    def _labels(self, labels):
        found = ((self.group_of[i], d) for i, d in labels)
        return frozenset((g, d) for g, d in found if d in self.groups[g].dims)

    def best(self):
        """The decisions: a list of a dim or None for each group, and what
        comes next: the cost that it adds, and pairs of a group and a dim that
        it has otherwise."""
        decisions = [None] * len(self.groups)
        second = None
        for part, events in self._apart():
            ranked = self._ranked(part, events)
            cost, chosen = ranked[0]
            for g, dim in zip(part, chosen):
                decisions[g] = dim
            for other_cost, other in ranked[1:]:
                if second is None or other_cost - cost < second[0]:
                    changed = [
                        (self.groups[g], new)
                        for g, old, new in zip(part, chosen, other)
                        if old != new
                    ]
                    second = other_cost - cost, changed
        return decisions, second

    def _apart(self):
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

    def sent_by(self, labels):
        """Bytes that a process sends in a step where labels are cut."""
        return self.sent(self._labels(labels), self.events)

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


def _parts(labels, others):
    """Into how many parts others cut what has these labels."""
    return math.prod(shards for cut, shards in others if labels & cut)


def _groups(weights, flow, shards, others):
    live = set()
    for event in flow.events:
        if event["kind"] != "gather":
            live |= event["labels"] | event["others"]
    live -= flow.follows.keys()
    live -= NOTHING.union(*(cut for cut, _ in others))
    alike = [
        (without_numbers(v.path), tuple(v.shape), v.dtype) for v in weights
    ]
    turns = _turns(alike, flow.events)
    groups = {}
    for i, v in enumerate(weights):
        shape = tuple(v.shape)
        labels = {(i, d) for d in range(len(shape))}
        dims = [
            d for d, n in enumerate(shape) if (i, d) in live and not n % shards
        ]
        kind = *alike[i], tuple(dims), turns[i]
        group = groups.setdefault(kind, Group(pattern_of(v.path)))
        group.members.append(i)
        group.dims = [None, *dims]
        group.bytes += bytes_of(v, shape) / _parts(labels, others)
    return list(groups.values())


def _turns(alike, events):
    """0 or 1 for each weight: of those that are alike and follow upon each
    other, every other one has 1, as what one hands on cut the next may sum."""
    turns = collections.Counter()
    for e in events:
        if e["kind"] == "contract":
            for i, _ in e["labels"]:
                for j, _ in e["others"]:
                    if i != j and alike[i] == alike[j]:
                        turns[j] = 1 - turns[i]
    return turns
