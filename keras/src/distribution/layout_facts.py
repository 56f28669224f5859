"""What a layout does to the variables of a model, as plain facts."""

import math
import re

from keras.src import backend
from keras.src.distribution import processes
from keras.src.utils import dtype_utils

IN, OUT, VOCABULARY, WIDTH = "in", "out", "vocabulary", "width"


def of_model(model, distribution, optimizer=None):
    """Facts of a model that was built under a distribution.

    Args:
        model: a built model, compiled or not.
        distribution: `keras.distribution.Distribution`.
        optimizer: defaults to the model's own.

    Returns:
        Dict of what JSON knows: "mesh", "variables", a list of `of_variable`,
        "slots", bytes of the optimizer's variables, whole and here, "keys",
        of the layout map, and "outputs", a dict from keys that lay out outputs
        to the first layer's path.
    """
    roles = roles_of(model)
    mesh = distribution.device_mesh
    layout_map = getattr(distribution, "_layout_map", {})
    weights = {id(v): v for v in model.variables}.values()
    if optimizer is None:
        optimizer = getattr(model, "optimizer", None)
    slots = [] if optimizer is None else optimizer.variables
    return {
        "mesh": {
            "axes": list(mesh.axis_names),
            "shape": [int(n) for n in mesh.shape],
            "batch": list(distribution.batch_axis_names),
        },
        "variables": [of_variable(v, distribution, roles) for v in weights],
        "slots": {
            "optimizer": optimizer and type(optimizer).__name__,
            "bytes": sum(bytes_of(v, v.shape) for v in slots),
            "stored": sum(bytes_of(v, stored_shape(v)) for v in slots),
        },
        "keys": {key: list(layout_map[key].axes) for key in layout_map},
        "outputs": outputs_of(model, layout_map),
    }


def of_variable(variable, distribution, roles):
    """Facts of one variable: a dict."""
    path = variable.path
    layout = distribution.get_variable_layout(variable)
    axes = [None] * len(variable.shape)
    for dim, names in enumerate(layout.axes if layout is not None else ()):
        if dim < len(axes) and names is not None:
            axes[dim] = [names] if isinstance(names, str) else list(names)
    key_of = getattr(distribution, "key_of", lambda path: None)
    here = stored_shape(variable)
    return {
        "path": path,
        "shape": list(variable.shape),
        "stored_shape": list(here),
        "dtype": backend.standardize_dtype(variable.dtype),
        "trainable": bool(variable.trainable),
        "key": key_of(path),
        "axes": axes,
        "roles": list(roles.get(id(variable), [None] * len(axes))),
        "bytes": bytes_of(variable, variable.shape),
        "stored": bytes_of(variable, here),
    }


def stored_shape(variable):
    return processes.stored_shape(variable)


def bytes_of(variable, shape):
    """Bytes of a variable, if it had this shape."""
    dtype = backend.standardize_dtype(variable.dtype)
    return math.prod(shape) * dtype_utils.dtype_size(dtype) // 8


def roles_of(model):
    """What each dim of a layer's weights is to it.

    Returns:
        Dict from ids of variables to lists with, for each dim, `IN` where the
        layer sums over it, `OUT` where its outputs have it, `VOCABULARY` or
        `WIDTH`; None for any other.
    """
    from keras.src.layers import Dense
    from keras.src.layers import EinsumDense
    from keras.src.layers import Embedding
    from keras.src.layers.convolutional.base_conv import BaseConv

    roles = {}
    for layer in model._flatten_layers():
        if not layer.built:
            continue
        bias = getattr(layer, "bias", None)
        if isinstance(layer, EinsumDense):
            letters = re.split(",|->", layer.equation)
            roles[id(layer._kernel)] = [
                OUT if letter in letters[2] else IN
                for letter in letters[1].replace(".", "")
            ]
        elif isinstance(layer, Dense):
            roles[id(layer._kernel)] = [IN, OUT]
        elif isinstance(layer, Embedding):
            roles[id(layer._embeddings)] = [VOCABULARY, WIDTH]
        elif isinstance(layer, BaseConv):
            kernel = layer._kernel
            spatial = [None] * (len(kernel.shape) - 2)
            roles[id(kernel)] = [*spatial, IN, OUT]
        else:
            continue
        if bias is not None:
            roles[id(bias)] = [OUT] * len(bias.shape)
    return roles


def outputs_of(model, layout_map):
    """The first output that a key lays out: dict from keys to paths."""
    paths = [f"{layer.path}/output" for layer in model._flatten_layers()]
    found = {}
    for key in layout_map:
        for path in paths:
            if re.fullmatch(key, path):
                found[key] = path
                break
    return found


def cut_as(variable, mesh):
    """In words how a variable is cut.

    Args:
        variable: of `of_variable`.
        mesh: of `of_model`.
    """
    sizes = dict(zip(mesh["axes"], mesh["shape"]))
    words = []
    for dim, (names, role) in enumerate(
        zip(variable["axes"], variable["roles"])
    ):
        for name in names or ():
            if sizes[name] == 1:
                continue
            if name in mesh["batch"]:
                words.append(f"FSDP over {name}")
                continue
            kind = {
                OUT: "column",
                IN: "row",
                VOCABULARY: "vocabulary",
                WIDTH: "width",
            }.get(role, f"dim {dim}")
            words.append(f"{kind} over {name}")
    return ", ".join(sorted(words, key=lambda w: w.startswith("F"))) or "whole"
