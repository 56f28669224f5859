"""What is wrong with a model is said before its first step, by all."""

import hashlib

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.mesh import agreement
from keras.src.backend.torch.distribution.mesh import configuration
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.mesh import together
from keras.src.backend.torch.distribution.tensors import sharded

# How many numbers are added up at once.
SUMMED = 1 << 18

# How many steps of training lie between two looks at the weights.
STEPS_BETWEEN = 100


def check_once(model, context):
    """Checks a model before its first step under a distribution.

    Collective on the first call: every process calls it.

    Raises:
        ValueError: if variables were made before the distribution was set, or
            differ between processes.
    """
    if model.__dict__.get(marks.CHECKED) is context:
        return
    variables = model.trainable_variables + model.non_trainable_variables
    check_made_under(variables, context)
    names = configuration.Names(model)
    check_equal(variables, _buffers_of(model), names)
    _give_names(model, variables, names)
    for v in variables:
        if v._gradient_number is not None:
            v._context.reducer.call(v._gradient_number, names.of(v.path))
    check_same_program(model)
    warn = getattr(context.distribution, "warn_of_unmatched_keys", None)
    if warn is not None and process_group.is_first():
        warn([v.path for v in variables])
    model.__dict__[marks.CHECKED] = context


def _give_names(model, variables, names):
    """Lets layers and weights be told from one another: see `mesh.trail`."""
    for layer in model._flatten_layers():
        layer.__dict__[marks.NAME] = names.of(layer.path or layer.name)
    for v in variables:
        if isinstance(v._value, DTensor):
            v._value.__dict__[marks.NAME] = names.of(v.path)


def check_same_program(model):
    """Raises on all processes if they configured a model in different ways.

    Collective: every process calls it.
    """
    agreement.compare(configuration.facts_of_model(model), "in the model")


def facts_of_training(model, all_of_them):
    """What must be the same on all processes while a model is trained.

    Waits for a GPU where `all_of_them`, and only then.

    Args:
        model: a compiled model.
        all_of_them: whether to look at what takes long.

    Returns:
        Dict from names to plain values and numpy arrays.
    """
    facts = {}
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    # Keras 3.15 has no public name for it but one that computes a schedule.
    rate = getattr(optimizer, "_learning_rate", None)
    rate = getattr(rate, "_value", None)
    if rate is not None and (all_of_them or rate.device.type == "cpu"):
        facts["learning rate"] = rate.item()
    if all_of_them:
        facts.update(
            agreement.facts_of_weights(
                model.trainable_variables + model.non_trainable_variables,
                configuration.Names(model),
            )
        )
    return facts


def check_made_under(variables, context):
    """Raises if variables were made before the distribution was set."""
    strangers = [
        v.path
        for v in variables
        if getattr(getattr(v, "_context", None), "mesh", None)
        is not context.mesh
    ]
    if strangers:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        raise ValueError(
            "The model was built before the distribution was set, or under "
            f"another one: {strangers[:5]}{more}. Call "
            "`keras.distribution.set_distribution` (or enter "
            "`distribution.scope()`) before you build the model, or build it "
            "again from its config and load its weights."
        )


def _buffers_of(model):
    """What torch modules in a model keep beside their parameters, by name."""
    # Not of the model at once: to torch, layers in a list are not part of it.
    return {
        f"{layer.path}/{name}": buffer
        for layer in model._flatten_layers()
        for name, buffer in layer.named_buffers()
    }


def check_equal(variables, buffers, names):
    """Compares names, shapes, layouts and values of variables over processes.

    Collective: every process calls it.

    Args:
        variables: list of variables.
        buffers: dict from names to tensors.
        names: `configuration.Names` of the model.
    """
    mine = [
        (
            names.of(v.path),
            tuple(v.shape),
            v.dtype,
            _checksum_of(v),
            _layout_of(v),
            v._gradient_number,
        )
        for v in variables
    ]
    mine += [
        (
            names.of(name),
            tuple(x.shape),
            str(x.dtype),
            checksum(sharded.whole(x)),
            "",
            None,
        )
        for name, x in buffers.items()
    ]
    if together.is_same(_digest(mine), "the first step of a model"):
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if other == first:
            continue
        if len(other) != len(first):
            what = f"{len(first)} variables against {len(other)}"
        else:
            what = next(
                f"{_said(*a)} against {_said(*b)}"
                for a, b in zip(first, other)
                if a != b
            )
        raise ValueError(
            "All processes must build the same model with the same weights. "
            f"Process 0 differs from process {rank}: {what}. Set one seed on "
            "all of them with `keras.utils.set_random_seed`, and take weights "
            "from one source."
        )


def _digest(value):
    """A whole number that float64 holds, of what can be printed."""
    code = hashlib.blake2b(repr(value).encode(), digest_size=6)
    return int.from_bytes(code.digest(), "big")


def _said(name, shape, dtype, value, layout, number):
    by = "drawn by" if isinstance(value, str) else "with sum"
    said = f"{name} {shape} {dtype}{layout} {by} {value}"
    if number is None:
        return said
    return f"{said}, trainable variable {number} of those ever made"


def _layout_of(variable):
    """How it is laid out, in words. Where Keras has numbered its layer
    otherwise, a key of the layout map may match on some processes alone."""
    value = variable._value
    if not isinstance(value, DTensor):
        return ""
    return f" laid out as {tuple(value.placements)}"


def _checksum_of(variable):
    if isinstance(variable._value, DTensor):
        # Each process holds another part: of what was it cut?
        return variable._origin
    return checksum(variable._value)


def checksum(value):
    """The sum of a plain tensor, which processes can compare.

    It is taken in float64, of a piece after the other.
    """
    if value is None:
        return None
    with torch.no_grad():
        total = torch.zeros((), dtype=torch.float64, device=value.device)
        for piece in value.reshape(-1).split(SUMMED):
            total += piece.double().sum()
        return float(total.nan_to_num())
