"""A plot of what `scale.py` measured, as SVG, written by hand."""

import math

WIDTH, HEIGHT, LEFT, TOP = 300, 180, 46, 30
COLORS = {
    "data": "#1b6ca8",
    "fsdp": "#c0392b",
    "tensor": "#27823b",
    "hybrid": "#8e44ad",
}
PANELS = {
    "milliseconds of a step of `fit`": lambda e: 1e3 * e["times"]["step"],
    "milliseconds to set up": lambda e: 1e3 * e["times"]["set up"],
    "MiB of memory": lambda e: e["times"]["memory"] / 2**20,
    "collectives of a step": lambda e: e["counts"]["fit"][0],
}


def of_scale(found):
    """The text of an SVG file.

    Args:
        found: list of what `scale.measure` gives.
    """
    parts = [_panel(i, *each, found) for i, each in enumerate(PANELS.items())]
    legend = "".join(
        f'<text x="{LEFT + 90 * i}" y="{2 * (HEIGHT + 60) + 14}" '
        f'fill="{color}">{name}</text>'
        for i, (name, color) in enumerate(COLORS.items())
    )
    width, height = 2 * (WIDTH + 60), 2 * (HEIGHT + 60) + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} '
        f'{height}" font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f"{''.join(parts)}{legend}</svg>\n"
    )


def _panel(number, title, value, found):
    x0 = LEFT + number % 2 * (WIDTH + 60)
    y0 = TOP + number // 2 * (HEIGHT + 60)
    sizes = sorted({each["size"] for each in found})
    most = 1.15 * max(map(value, found)) or 1.0
    low, high = math.log2(sizes[0]), math.log2(sizes[-1])

    def place(size, y):
        across = (math.log2(size) - low) / ((high - low) or 1)
        return x0 + WIDTH * across, y0 + HEIGHT * (1 - y / most)

    drawn = [
        f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{title}</text>',
        f'<rect x="{x0}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" '
        'fill="none" stroke="#999"/>',
    ]
    for size in sizes:
        x, _ = place(size, 0)
        drawn.append(
            f'<text x="{x:.0f}" y="{y0 + HEIGHT + 14}" '
            f'text-anchor="middle">{size:,}</text>'
        )
    for share in (0, 0.5, 1):
        _, y = place(sizes[0], share * most)
        drawn.append(
            f'<text x="{x0 - 4}" y="{y + 4:.0f}" text-anchor="end">'
            f"{share * most:.3g}</text>"
        )
    for layout, color in COLORS.items():
        own = [each for each in found if each["layout"] == layout]
        points = [place(each["size"], value(each)) for each in own]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" '
            'stroke-width="2"/>'
        )
        drawn += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
            for x, y in points
        ]
    return "".join(drawn)
