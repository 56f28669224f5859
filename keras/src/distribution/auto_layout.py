"""A layout map that is found, and not written: `LayoutMap.auto`.

A model is traced (`processes.flows`), cuts over model axes are searched for
(`layout_plan`), and then, until a process holds no more than the budget, the
largest weights are cut by the data axis (FSDP). Several model axes cut dims of
their own, or are joined to one axis, whichever costs less.
"""

import functools
import math
import typing
import warnings

from keras.src.distribution import layout_keys
from keras.src.distribution import processes
from keras.src.distribution.layout_facts import bytes_of
from keras.src.distribution.layout_plan import Plan
from keras.src.distribution.layout_search import WORTH
from keras.src.distribution.report_tables import size_of


class Found(typing.NamedTuple):
    """What is found.

    Attributes:
        keys: dict from keys to tuples of axis names.
        mesh: that they are of.
        code: string, a program that makes the layout map.
        explanation: string, what was decided, and what else could have been.
        sent: dict from model axes to bytes that a process sends in a step.
    """

    keys: dict
    mesh: typing.Any
    code: str
    explanation: str
    sent: dict


def find(
    model, mesh, batch_size=None, budget=None, x=None, batch_dim_name=None
):
    """See `LayoutMap.auto`. Returns what is `Found`."""
    names = list(mesh.axis_names)
    sizes = dict(zip(names, (int(n) for n in mesh.shape)))
    batch = batch_dim_name or names[0]
    batch = (batch,) if isinstance(batch, str) else tuple(batch)
    data = math.prod(sizes[n] for n in batch)
    flows = processes.flows()
    made = flows.make(model, x)
    rows = batch_size if x is None else len(_first(x))
    rows = max(1, -(-(rows or data) // data))
    traced = functools.cache(lambda shards: flows.trace(made, shards, rows, x))
    weights = list({id(v): v for v in made.variables}.values())
    own = {n: sizes[n] for n in names if n not in batch and sizes[n] > 1}
    plan, notes, code = Plan(weights, traced, own), [], []
    if len(own) > 1:
        one = {"_".join(own): math.prod(own.values())}
        joined = Plan(weights, traced, one)
        # Of what costs as much, the mesh as it is.
        plan, other = sorted((plan, joined), key=Plan.cost)
        notes.append(_other_axes(other))
        if plan is joined:
            mesh, line = _joined(mesh, list(own), plan.sizes)
            code.append(line)
    if own:
        notes[:0] = [
            _sentence(plan),
            *(_runner_up(plan, axis) for axis, s in plan.second.items() if s),
            *_unused(plan, batch),
        ]
    if budget is not None:
        data_axis = max(batch, key=sizes.get)
        factor = _factor(made, flows.slots_of(made))
        sizes |= plan.sizes
        notes.append(_fit(weights, plan.axes, sizes, data_axis, budget, factor))
    keys = layout_keys.keys_of(weights, plan.axes)
    code.append(layout_keys.code_of(keys))
    return Found(keys, mesh, "\n".join(code), "\n".join(notes), plan.sent())


def _first(x):
    from keras.src import tree

    return tree.flatten(x)[0]


def _joined(mesh, model_axes, sizes):
    """A mesh of the same devices whose last axis joins some axes, and a line
    that makes it."""
    names = list(mesh.axis_names)
    kept = [n for n in names if n not in model_axes]
    order = [names.index(n) for n in (*kept, *model_axes)]
    shape = [int(mesh.shape[names.index(n)]) for n in kept]
    shape = (*shape, *sizes.values())
    kept += sizes
    devices = mesh.devices.transpose(order).flatten()
    moved = "" if order == sorted(order) else f".transpose({order})"
    quoted = ", ".join(f'"{n}"' for n in kept)
    line = (
        f"mesh = keras.distribution.DeviceMesh(\n    {shape}, [{quoted}], "
        f"mesh.devices{moved}.flatten()\n)"
    )
    return type(mesh)(shape, kept, devices), line


def _sends(plan):
    return " and ".join(
        size_of(count) + (f" over {axis}" if len(plan.sizes) > 1 else "")
        for axis, count in plan.sent().items()
    )


def _sentence(plan):
    whole = sum(bytes_of(v, v.shape) for v in plan.weights)
    return (
        f"over {' and '.join(plan.sizes)}: a process holds "
        f"{size_of(plan.held())} of {size_of(whole)} "
        f"of weights, and sends about {_sends(plan)} a step"
    )


def _other_axes(plan):
    """What model axes would do that are joined, or that are not."""
    how = "each by itself" if len(plan.sizes) > 1 else "as one axis"
    return (
        f"why not {how}: a process would hold "
        f"{size_of(plan.held())}, and send about {_sends(plan)}"
    )


def _runner_up(plan, axis):
    extra, changed = plan.second[axis]
    words = [
        f"{group.key} " + ("whole" if dim is None else f"cut on dim {dim}")
        for group, dim in changed
    ]
    if words[2:]:
        words = [*words[:2], f"{len(words[2:])} more"]
    over = f" over {axis}" if len(plan.sizes) > 1 else ""
    text = f"runner-up{over}: {'; '.join(words)}: "
    if extra < 1:
        return text + "as good"
    return (
        f"{text}worse by {size_of(extra)} (a byte that is held "
        f"counts as {WORTH} that are sent)"
    )


def _unused(plan, batch):
    """Sentences about axes that cut nothing, which are warnings too."""
    found = []
    for axis, size in plan.sizes.items():
        if plan.cut_by(axis):
            continue
        names = ", ".join(f'"{n}"' for n in (*batch, axis))
        text = (
            f"{axis} ({size}) cuts nothing, as it divides no dim where that "
            "would be worth it: its processes hold and compute the same. It "
            f"could split batches instead: batch_dim_name=({names})"
        )
        warnings.warn(f"LayoutMap.auto: {text}", stacklevel=4)
        found.append(text)
    return found


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
        f"weights, gradients and slots take {size_of(total)} a "
        f"process, of a budget of {size_of(budget)}"
    )
    if count:
        text += f", with {count} weights cut over {data_axis} (FSDP)"
    if total > budget:
        text += (
            f". It does not fit, by {size_of(total - budget)}: "
            "take a mesh of more processes"
        )
    return text
