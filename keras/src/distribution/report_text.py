"""The text of a layout report: see `report`."""

import collections
import difflib
import re

from keras.src.distribution import layout_advice
from keras.src.distribution import layout_facts

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


def size_of(count):
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            break
        count /= 1024
    else:
        unit = "GiB"
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


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
            f"  at the peak of a step: {size_of(peak)}, with gradients, "
            "activations and what is gathered"
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


def group_of(collective):
    """The group of layers that a collective belongs to."""
    if collective["for"] == "activations":
        return re.sub(r"\d+", "*", collective["layer"])
    return {
        "weights": f"weights cut over {collective['axes']} (FSDP)",
        "gradients": "gradients",
    }.get(collective["for"], "loss, logs and the like")


def totals(collective_list):
    """Dict from `"all_reduce"` and the like to [number, bytes]."""
    found = {}
    for c in collective_list:
        entry = found.setdefault(c["op"], [0, 0])
        entry[0] += 1
        entry[1] += c["bytes"]
    return found


def _step(facts, limit):
    groups = collections.defaultdict(list)
    for c in facts["collectives"]:
        groups[group_of(c)].append(c)
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


def variables(facts):
    """All variables, a line each."""
    rows = [("variable", "shape", "cut as", "here", "whole", "a process")]
    for v in facts["variables"]:
        rows.append(
            (
                v["path"],
                str(tuple(v["shape"])),
                layout_facts.cut_as(v, facts["mesh"]),
                str(tuple(v["stored_shape"])),
                size_of(v["bytes"]),
                size_of(v["stored"]),
            )
        )
    return "\n".join(table(rows, "<"))


def collectives(facts):
    """All collectives of a step, a line each."""
    rows = [("collective", "over", "for", "layer", "", "shapes", "bytes")]
    for c in facts["collectives"]:
        rows.append(
            (
                c["op"].replace("_", "-"),
                c["axes"],
                c["for"],
                c["layer"] or "",
                c["direction"],
                ", ".join(str(tuple(s)) for s in c["shapes"]),
                str(c["bytes"]),
            )
        )
    return "\n".join(table(rows, "<"))


def difference(a, b):
    """What the second of two reports has otherwise."""
    lines = []
    before = {v["path"]: v for v in a["variables"]}
    changed = collections.defaultdict(list)
    for v in b["variables"]:
        other = before.get(v["path"])
        now = layout_facts.cut_as(v, b["mesh"])
        was = other and layout_facts.cut_as(other, a["mesh"])
        if was != now:
            path = re.sub(r"\d+", "*", v["path"])
            changed[path, was or "not there", now].append(v)
    rows = [("variable", "is", "becomes")]
    rows += [
        (f"{path} x{len(vs)}" if len(vs) > 1 else path, was, now)
        for (path, was, now), vs in changed.items()
    ]
    lines += table(rows, "<") if changed else ["the same cuts"]

    def groups(facts):
        found = collections.defaultdict(lambda: [0, 0])
        for c in facts["collectives"]:
            key = f"{group_of(c)}: {c['op'].replace('_', '-')} {c['axes']}"
            found[key][0] += 1
            found[key][1] += c["bytes"]
        return found

    first, second = groups(a), groups(b)
    rows = [("a step's collectives", "are", "become")]
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            rows.append((key, *(_counted(g.get(key)) for g in (first, second))))
    sums = []
    for facts in (a, b):
        carried = sum(c["bytes"] for c in facts["collectives"])
        sums.append(_counted([len(facts["collectives"]), carried]))
    rows.append(("in all", *sums))
    held = [
        size_of(
            sum(v["stored"] * (1 + v["trainable"]) for v in facts["variables"])
            + facts["slots"]["stored"]
        )
        for facts in (a, b)
    ]
    rows.append(("a process holds", *held))
    return "\n".join([*lines, "", *table(rows, "<")])


def _counted(entry):
    return "-" if entry is None else f"{entry[0]}, {size_of(entry[1])}"


def _short(text):
    return text if len(text) <= WIDTH else f"...{text[3 - WIDTH :]}"


def table(rows, numbers=">"):
    """Columns of one width: the first two to the left, others as said."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [
            x.ljust(width) if i < 2 or numbers == "<" else x.rjust(width)
            for i, (x, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
