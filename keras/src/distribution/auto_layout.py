"""A layout map that is found, and not written: `LayoutMap.auto`.

A model is traced once (`processes.flows`), cuts over a model axis are searched
for (`layout_search`), and then, until a process holds no more than the budget,
the largest weights are cut by the data axis (FSDP).
"""

import math

from keras.src.distribution import layout_keys
from keras.src.distribution import processes
from keras.src.distribution import report_text
from keras.src.distribution.layout_facts import bytes_of
from keras.src.distribution.layout_search import WORTH
from keras.src.distribution.layout_search import Search


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
    return layout_keys.keys_of(weights, axes), "\n".join(notes)


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
    whole = sum(bytes_of(v, v.shape) for v in search.weights)
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
            bytes_of(weights[i], weights[i].shape)
            / cut
            * (factor if weights[i].trainable else 1)
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
