"""Which process stores which part of a variable, drawn."""

import itertools
import re

from keras.src.distribution import layout_facts

COLORS = (
    "#cfe3f7 #fde2c6 #d3efd0 #f6d0d0 #e4d9f2 #e9dfd6 #fadcec #e4e4e4 #f0f0c8"
).split()


def cells(variable, mesh, dims=None):
    """The parts of a variable, and who stores them.

    Args:
        variable, mesh: of a report's facts.
        dims: pair of dims, None for those that are cut.

    Returns:
        Tuple of the pair of dims, and a list of rows of lists of ranks.
    """
    axes, shape = variable["axes"], mesh["shape"]
    index = {name: i for i, name in enumerate(mesh["axes"])}
    cut = [
        dim
        for dim, names in enumerate(axes)
        if any(shape[index[name]] > 1 for name in names or ())
    ]
    if dims is None:
        rank = len(axes)
        free = [d for d in range(rank) if d not in cut]
        dims = tuple(sorted((cut + free)[:2])) if rank > 1 else (None, 0)
        if not rank:
            dims = (None, None)
    names = [list(axes[d] or ()) if d is not None else [] for d in dims]
    counts = []
    for each in names:
        count = 1
        for name in each:
            count *= shape[index[name]]
        counts.append(count)
    grid = [[[] for _ in range(counts[1])] for _ in range(counts[0])]
    places = itertools.product(*(range(n) for n in shape))
    for process, place in enumerate(places):
        where = []
        for each in names:
            position = 0
            for name in each:
                position = position * shape[index[name]] + place[index[name]]
            where.append(position)
        grid[where[0]][where[1]].append(process)
    return dims, grid


def _find(facts, path):
    for v in facts["variables"]:
        if v["path"] == path or v["path"].endswith(f"/{path}"):
            return v
    raise ValueError(
        "The model has no variable of this path. The first are: "
        f"{[v['path'] for v in facts['variables'][:5]]}. Received: path={path}"
    )


def _ranks(processes):
    """Ranks in a few letters: `0-3,8`."""
    runs = []
    for rank in processes:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ",".join(words) if len(words) < 5 else ",".join(words[:3]) + ",..."


def text(facts, path=None, dims=None):
    """Boxes of text; of the whole model, a line for variables alike."""
    mesh = facts["mesh"]
    if path is None:
        lines = []
        for name, v in _groups(facts):
            _, grid = cells(v, mesh)
            parts = " / ".join(
                "|" + "|".join(f" {_ranks(cell)} " for cell in row) + "|"
                for row in grid
            )
            how = layout_facts.cut_as(v, mesh)
            lines.append(f"{name} {tuple(v['shape'])}  {parts}  {how}")
        return "\n".join(lines)
    v = _find(facts, path)
    dims, grid = cells(v, mesh, dims)
    words = [[_ranks(cell) for cell in row] for row in grid]
    width = max(len(word) for row in words for word in row) + 2
    bar = "+" + "+".join(["-" * width] * len(grid[0])) + "+"
    lines = [_title(v, mesh, dims), bar]
    for row in words:
        lines.append("|" + "|".join(w.center(width) for w in row) + "|")
        lines.append(bar)
    return "\n".join(lines)


def _groups(facts):
    groups = {}
    for v in facts["variables"]:
        groups.setdefault(re.sub(r"\d+", "*", v["path"]), v)
    return groups.items()


def _title(v, mesh, dims):
    drawn = [str(d) for d in dims if d is not None]
    which = f", dims {' and '.join(drawn)}" if len(v["shape"]) > 2 else ""
    how = layout_facts.cut_as(v, mesh)
    return f"{v['path']} {tuple(v['shape'])}{which}: {how}"


def svg(facts, path=None, dims=None):
    """The same, an image: a string."""
    mesh = facts["mesh"]
    shown = (
        [v for _, v in _groups(facts)] if path is None else [_find(facts, path)]
    )
    wide, high, y, parts = 360, 18 if path is None else 40, 4, []
    for v in shown:
        drawn, grid = cells(v, mesh, dims if path is not None else None)
        parts.append(
            f'<text x="4" y="{y + 12}">{_escape(_title(v, mesh, drawn))}</text>'
        )
        y += 18
        width = wide / len(grid[0])
        for row in grid:
            for i, cell in enumerate(row):
                color = COLORS[cell[0] % len(COLORS)] if cell else "#fff"
                x = 4 + i * width
                parts.append(
                    f'<rect x="{x:g}" y="{y}" width="{width:g}" '
                    f'height="{high}" fill="{color}" stroke="#555"/>'
                    f'<text x="{x + width / 2:g}" y="{y + high / 2 + 4:g}" '
                    f'text-anchor="middle">{_ranks(cell)}</text>'
                )
            y += high
        y += 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide + 420}" '
        f'height="{y}" font-family="monospace" font-size="11">'
        f"{''.join(parts)}</svg>"
    )


def _escape(words):
    return words.replace("&", "&amp;").replace("<", "&lt;")
