"""What a layout report advises, and why: from what a dry run has counted."""

import re

from keras.src.distribution import layout_facts

# What is less than this share of a step's bytes is not worth a line.
SMALL = 0.02


def of(facts):
    """Advice, what saves most first: a list of strings.

    Args:
        facts: of a `Report`.
    """
    total = sum(c["bytes"] for c in facts["collectives"]) or 1
    found = [
        *_rows_of_whole_inputs(facts),
        *_widths(facts),
        *_outputs_by_chance(facts),
        *_gathered_logits(facts),
        *_uneven(facts),
    ]
    found.sort(key=lambda pair: -pair[0])
    return [text for size, text in found if size >= SMALL * total]


def _alike(text):
    return re.sub(r"\d+", "*", text)


def _model_cuts(variable, mesh):
    """Pairs of a dim and a model axis that cuts it."""
    sizes = dict(zip(mesh["axes"], mesh["shape"]))
    return [
        (dim, name)
        for dim, names in enumerate(variable["axes"])
        for name in names or ()
        if sizes[name] > 1 and name not in mesh["batch"]
    ]


def _of_layer(facts, group, direction, op):
    return [
        c
        for c in facts["collectives"]
        if c["for"] == "activations"
        and _alike(c["layer"]) == group
        and c["direction"] == direction
        and c["op"] == op
    ]


def _groups(facts):
    """One variable of each group of those alike, and their layers' group."""
    groups = {}
    for v in facts["variables"]:
        groups.setdefault(_alike(v["path"]), v)
    for path, variable in groups.items():
        yield path, path.rpartition("/")[0], variable


def _rows_of_whole_inputs(facts):
    """Row parallel layers whose input is whole: to sum is all they gain."""
    mesh = facts["mesh"]
    sizes = dict(zip(mesh["axes"], mesh["shape"]))
    found = {}
    for path, layer, v in _groups(facts):
        summed = [
            (dim, name)
            for dim, name in _model_cuts(v, mesh)
            if v["roles"][dim] == layout_facts.IN
        ]
        if not summed:
            continue
        forward = _of_layer(facts, layer, "forward", "all_reduce")
        # Backward of the slice that was taken of a whole input.
        backward = _of_layer(facts, layer, "backward", "all_gather")
        dim, name = summed[0]
        free = [
            i
            for i, role in enumerate(v["roles"])
            if role == layout_facts.OUT
            and v["shape"][i] % sizes[name] == 0
            and i not in [cut for cut, _ in _model_cuts(v, mesh)]
        ]
        if not forward or not backward or not free:
            continue
        axes = [
            names and (names[0] if len(names) == 1 else tuple(names))
            for names in v["axes"]
        ]
        # A data axis that cuts it cuts the other dim then.
        axes[dim], axes[free[0]] = axes[free[0]], name
        # Query, key and value are one piece of advice.
        parent = layer.rpartition("/")[0] or layer
        entry = found.setdefault((parent, tuple(axes)), [[], [], []])
        entry[0].append(path)
        entry[1] += forward
        entry[2] += backward
    largest = {}
    for (parent, _), entry in found.items():
        size = sum(c["bytes"] for c in entry[1] + entry[2])
        largest[parent] = max(largest.get(parent, 0), size)
    for (parent, axes), (paths, forward, backward) in found.items():
        if sum(c["bytes"] for c in forward + backward) < largest[parent]:
            # Once the others are cut otherwise, its input is not whole.
            continue
        yield (
            sum(c["bytes"] for c in forward + backward),
            f"{' and '.join(paths)}: cut on the dim that is summed over, of a "
            f"whole input: {len(forward)} all-reduces forward, {len(backward)} "
            f"all-gathers backward. {axes} cuts the outputs: none forward.",
        )


def _widths(facts):
    """Embeddings cut by width, whose rows are gathered after them."""
    gathered = [
        c
        for c in facts["collectives"]
        if c["for"] == "activations"
        and c["direction"] == "forward"
        and c["op"] == "all_gather"
    ]
    for path, _, v in _groups(facts):
        for dim, name in _model_cuts(v, facts["mesh"]):
            here = [c for c in gathered if c["axes"] == name]
            if v["roles"][dim] == layout_facts.WIDTH and here:
                yield (
                    sum(c["bytes"] for c in here),
                    f"{path} is cut by width, and what it hands on is gathered "
                    f"by {_alike(here[0]['layer'])}. ({name!r}, None) cuts the "
                    "vocabulary: one all-reduce.",
                )
                break


def _outputs_by_chance(facts):
    """Keys of weights that lay out an output too."""
    for key, path in facts["outputs"].items():
        if not key.endswith("/output"):
            yield (
                sum(c["bytes"] for c in facts["collectives"]),
                f"the key {key!r} matches {path!r} too, and lays out that "
                "output. End it as the variable's path does.",
            )


def _gathered_logits(facts):
    size = sum(
        c["bytes"]
        for c in facts["collectives"]
        if c["for"] == "others" and c["op"] == "all_gather"
    )
    if size:
        yield (
            size,
            "what the model returns is gathered from shards. With a key of the "
            "last layer's '/output' and "
            "SparseCategoricalCrossentropy(from_logits=True) it stays cut.",
        )


def _uneven(facts):
    """Dims that the axes which cut them do not divide."""
    sizes = dict(zip(facts["mesh"]["axes"], facts["mesh"]["shape"]))
    for path, layer, v in _groups(facts):
        for dim, name in _model_cuts(v, facts["mesh"]):
            if v["shape"][dim] % sizes[name]:
                size = sum(
                    c["bytes"]
                    for c in facts["collectives"]
                    if c["layer"] and _alike(c["layer"]) == layer
                )
                yield (
                    size,
                    f"{path}: {name} ({sizes[name]}) does not divide dim {dim} "
                    f"of {tuple(v['shape'])}, so what follows is gathered.",
                )
                break
