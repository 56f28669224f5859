"""Tables of a layout report, with a line for each thing: see `report`."""

import collections
import re

from keras.src.distribution import layout_facts


def size_of(count):
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            break
        count /= 1024
    else:
        unit = "GiB"
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


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
