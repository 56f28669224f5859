"""The text of a layout report: see `report`."""

import collections
import difflib
import re

from keras.src.distribution import layout_advice
from keras.src.distribution import layout_facts
from keras.src.distribution.report_tables import group_of
from keras.src.distribution.report_tables import size_of
from keras.src.distribution.report_tables import table
from keras.src.distribution.report_tables import totals

LINES, WIDTH = 25, 34
# How many keys, groups of layers, whole variables and pieces of advice are
# told: the first that fit into so many lines.
LIMITS = ((9, 12, 2, 3), (7, 8, 2, 3), (6, 7, 2, 3), (5, 6, 1, 3), (5, 5, 1, 2))


def summary(facts):
    """At most 25 lines.

    Args:
        facts: of a `Report`.
    """
    advice = layout_advice.of(facts)
    for keys, groups, largest, pieces in LIMITS:
        parts = [
            [_mesh(facts)],
            _keys(facts, keys),
            _memory(facts, largest),
            _step(facts, groups)
            + [f"advice: {line}" for line in advice[:pieces]],
        ]
        lines = [line for part in parts for line in (*part, "")][:-1]
        if len(lines) > LINES:
            lines = [line for line in lines if line]
        if len(lines) <= LINES:
            break
    return "\n".join(lines)


def _mesh(facts):
    mesh = facts["mesh"]
    product = " x ".join(
        f"{n} {s}" for n, s in zip(mesh["axes"], mesh["shape"])
    )
    total = 1
    for size in mesh["shape"]:
        total *= size
    rows = f"; a batch of {facts['rows']} rows" if facts.get("rows") else ""
    return (
        f"mesh {product} = {total} processes{rows}, split over "
        f"{' and '.join(mesh['batch'])}"
    )


def _keys(facts, limit):
    found = collections.defaultdict(list)
    for v in facts["variables"]:
        found[v["key"]].append(v)
    rows = [("key", "cut as", "variables", "whole", "a process")]
    keys = sorted(
        (key for key in found if key is not None),
        key=lambda key: -sum(v["bytes"] for v in found[key]),
    )
    for key in keys[:limit]:
        rows.append(_key_row(_short(key), found[key], facts["mesh"]))
    if keys[limit:]:
        others = [v for key in keys[limit:] for v in found[key]]
        name = f"({len(keys[limit:])} more keys)"
        rows.append(_key_row(name, others, facts["mesh"]))
    if found[None]:
        rows.append(_key_row("(no key)", found[None], facts["mesh"]))
    lines = table(rows)
    unmatched = [
        key
        for key in facts["keys"]
        if key not in found and key not in facts["outputs"]
    ]
    if unmatched:
        nearest = _nearest(
            unmatched[0], [v["path"] for v in facts["variables"]]
        )
        lines.append(
            f"{_short(unmatched[0])}  matches nothing; nearest: {nearest}"
        )
    if unmatched[1:]:
        lines.append(f"matching nothing too: {', '.join(unmatched[1:])}")
    return lines


def _key_row(name, variables, mesh):
    cuts = collections.Counter(layout_facts.cut_as(v, mesh) for v in variables)
    words = "; ".join(word for word, _ in cuts.most_common(2))
    if len(cuts) > 2:
        words += "; ..."
    return (
        name,
        words,
        str(len(variables)),
        size_of(sum(v["bytes"] for v in variables)),
        size_of(sum(v["stored"] for v in variables)),
    )


def _nearest(key, paths):
    """The path that a key which matches none may have meant."""
    letters = re.sub(r"[^\w/]+", "", key.replace("\\d", ""))

    def likeness(path):
        end = "/".join(path.split("/")[-2:])
        return difflib.SequenceMatcher(None, letters, end).ratio()

    return max(paths, key=likeness) if paths else "the model has no variables"


def _memory(facts, limit):
    variables, slots = facts["variables"], facts["slots"]

    def total(name):
        weights = sum(v[name] for v in variables)
        gradients = sum(v[name] for v in variables if v["trainable"])
        return weights, gradients, slots[name]

    here, whole = total("stored"), total("bytes")
    lines = [
        f"a process holds: weights {size_of(here[0])} + gradients "
        f"{size_of(here[1])} + {slots['optimizer'] or 'slots'} "
        f"{size_of(here[2])} = {size_of(sum(here))} "
        f"(one device: {size_of(sum(whole))})"
    ]
    if facts.get("peak") is not None:
        peak = here[0] + here[2] + facts["peak"]
        lines.append(
            f"  at the peak of a step: {size_of(peak)} of tensors, with "
            "gradients, activations and what is gathered; not of code and "
            "Python"
        )
    sizes = [
        n
        for n, axis in zip(facts["mesh"]["shape"], facts["mesh"]["axes"])
        if n > 1
    ]
    left = [
        v
        for v in variables
        if v["stored"] == v["bytes"] and v["bytes"] > sum(whole) / 100
    ]
    if sizes:
        left.sort(key=lambda v: -v["bytes"])
        for v in left[:limit]:
            lines.append(f"  whole: {_saving(v, facts['mesh'])}")
    return lines


def _saving(variable, mesh):
    """What cutting a variable would save: its largest dim that divides."""
    size, axis = max(zip(mesh["shape"], mesh["axes"]))
    fits = [n for n in variable["shape"] if n % size == 0]
    text = f"{variable['path']} {tuple(variable['shape'])} "
    text += size_of(variable["bytes"])
    if not fits:
        return text
    dim = variable["shape"].index(max(fits))
    axes = [None] * len(variable["shape"])
    axes[dim] = axis
    saved = variable["bytes"] // size
    return f"{text}, would be {size_of(saved)} as {tuple(axes)}"


def _step(facts, limit):
    groups = _groups(facts["collectives"])
    size = {g: sum(c["bytes"] for c in cs) for g, cs in groups.items()}
    ordered = sorted(groups, key=lambda g: -size[g])
    rows = [("a step hands to collectives, for", "forward", "backward")]
    for group in ordered[:limit]:
        rows.append((_short(group), *_directions(groups[group])))
    if ordered[limit:]:
        others = [c for group in ordered[limit:] for c in groups[group]]
        name = f"({len(ordered[limit:])} more groups)"
        rows.append((name, *_directions(others)))
    number = len(facts["collectives"])
    if not number:
        return ["a step communicates nothing"]
    every = ", ".join(
        f"{n} {op.replace('_', '-')}"
        for op, (n, _) in sorted(totals(facts["collectives"]).items())
    )
    line = (
        f"= {number} collectives, {size_of(sum(size.values()))} a process: "
        f"{every}"
    )
    if not facts["steady"]:
        line += " (no two steps were alike: of the last one)"
    return [*table(rows, "<"), line]


def _groups(collective_list):
    """Dict from names of groups to their collectives. Keras numbers no first
    layer of a class: `dense` is one of `dense_*`."""
    alike, names = collections.defaultdict(list), {}
    for c in collective_list:
        name = group_of(c)
        key = re.sub(r"_?\*", "", name)
        names[key] = max(names.get(key, ""), name, key=len)
        alike[key].append(c)
    return {names[key]: found for key, found in alike.items()}


def _directions(collective_list):
    forward, backward = [], []
    for c in collective_list:
        (forward if c["direction"] == "forward" else backward).append(c)
    return _cell(forward), _cell(backward)


def _cell(collective_list):
    if not collective_list:
        return "-"
    kinds = collections.defaultdict(list)
    for c in collective_list:
        kinds[c["op"], c["axes"]].append(c["bytes"])
    parts = [
        f"{len(sizes)} {op.replace('_', '-')} {axes} {size_of(sum(sizes))}"
        for (op, axes), sizes in sorted(
            kinds.items(), key=lambda item: -sum(item[1])
        )
    ]
    if len(parts) > 2:
        parts = [*parts[:2], f"{len(parts) - 2} more kinds"]
    return ", ".join(parts)


def _short(text):
    return text if len(text) <= WIDTH else f"...{text[3 - WIDTH :]}"
