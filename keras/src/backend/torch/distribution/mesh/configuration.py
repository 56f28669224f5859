"""What a model was configured with, as facts that processes compare."""

import base64
import collections
import marshal
import numbers
import re
import zlib

import numpy as np
import torch

from keras.src.backend.torch.distribution.mesh import agreement
from keras.src.utils import naming

# Arguments of `fit` and its like that may differ, or are compared elsewhere.
FREE = {"x", "y", "sample_weight", "validation_data", "callbacks", "verbose"}

# A longer text is no name, but something written down: not bit by bit the same.
LONGEST = 400

# What Keras names the generators of seeds.
SEEDS = "seed_generator"

# Of a layer's configuration: other layers, which are compared by themselves.
NESTED = {"layer", "cell"}


class Names:
    """Names of a model's layers and variables, as processes can compare them.

    Keras numbers what a program gives no name in the order in which it is made:
    where one process has made another model before, a `dense` is a `dense_4`.
    Here such names are numbered anew, by the order in the model.

    Args:
        model: a built `keras.Model`.
    """

    def __init__(self, model):
        self._new = {}
        counts = collections.Counter()
        for layer in model._flatten_layers():
            kind = naming.to_snake_case(type(layer).__name__)
            if layer.name not in self._new and _is_numbered(layer.name, kind):
                number = counts[kind]
                counts[kind] += 1
                self._new[layer.name] = f"{kind}_{number}" if number else kind

    def of(self, path):
        """A path, or a name, with names that all processes have."""
        return "/".join(map(self._of_part, path.split("/")))

    def _of_part(self, name):
        if _is_numbered(name, SEEDS):
            return SEEDS
        return self._new.get(name, name)


def _is_numbered(name, kind):
    return re.fullmatch(rf"{re.escape(kind)}(_\d+)?", name) is not None


def facts_of_model(model):
    """How its layers are configured, and what it is compiled with.

    Args:
        model: a built `keras.Model`.
    """
    facts = {"number of variables": len(model.weights)}
    names = Names(model)
    for layer in model._flatten_layers():
        name = f"layer {names.of(layer.path or layer.name)}"
        facts[name] = type(layer).__name__
        for key, value in _config_of_layer(layer).items():
            if key == "name":
                value = names.of(value)
            if key not in NESTED:
                facts[f"{name}, {key}"] = plain(value)
    facts.update(_facts_of_compile(model))
    return facts


def _facts_of_compile(model):
    said = _said_by(getattr(model, "get_compile_config", dict))
    facts = {f"compile, {key}": plain(value) for key, value in said.items()}
    # As it is now: a learning rate may have been set since.
    optimizer = getattr(model, "optimizer", None)
    facts["compile, optimizer"] = plain(optimizer)
    said = _unnumbered(type(optimizer).__name__, _config_of(optimizer))
    for key, value in said.items():
        facts[f"compile, optimizer, {key}"] = plain(value)
    return facts


def _unnumbered(kind, config):
    """A configuration without the name that Keras has numbered."""
    name = config.get("name")
    if isinstance(name, str) and _is_numbered(name, naming.to_snake_case(kind)):
        config = {key: x for key, x in config.items() if key != "name"}
    return config


def facts_of_arguments(name, arguments):
    """What `fit`, `evaluate` or `predict` was called with.

    Args:
        name: string, the method.
        arguments: dict.
    """
    return {
        f"argument {key} of {name}": plain(value)
        for key, value in arguments.items()
        if key not in FREE
    }


def _config_of_layer(layer):
    from keras.src import models  # Imports the backend.
    from keras.src.utils import torch_utils

    # What these say of themselves has all that they are made of in it, all
    # layers of a graph or all weights of a module, and takes as long.
    whole = (
        models.Functional,
        models.Sequential,
        torch_utils.TorchModuleWrapper,
    )
    if isinstance(layer, whole):
        return {
            "trainable": layer.trainable,
            "dtype": layer.dtype_policy.name,
        }
    return _config_of(layer)


def _config_of(thing):
    if isinstance(thing, type) or not hasattr(thing, "get_config"):
        return {}
    return _said_by(thing.get_config)


def _said_by(get_config):
    """What an object says of itself; nothing if it cannot."""
    try:
        return dict(get_config() or {})
    except Exception:
        # User code may fail in any way. The program has not asked for it, and
        # classes and weights are compared all the same.
        return {}


def plain(value, depth=6):
    """A value of a configuration, as what processes can compare.

    Functions are their names and their code; of what is not known, its class.
    """
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:20]}..."
    if isinstance(value, str):
        return re.sub(" at 0x[0-9a-f]+", "", value)
    if value is None or isinstance(value, (bool, bytes, numbers.Number)):
        return value
    if depth == 0:
        return type(value).__name__
    written = _written_function(value)
    if written is not None:
        # Keras writes it by `marshal`, whose bytes depend on who else refers to
        # what it writes.
        return _text_of(marshal.loads(base64.b64decode(written)))
    if isinstance(value, dict):
        kind, config = value.get("class_name"), value.get("config")
        if isinstance(kind, str) and isinstance(config, dict):
            value = {**value, "config": _unnumbered(kind, config)}
        items = sorted(value.items(), key=lambda item: str(item[0]))
        return {str(key): plain(each, depth - 1) for key, each in items}
    if isinstance(value, (list, tuple)):
        return [plain(each, depth - 1) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(plain(each, depth - 1)) for each in value)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        taken = agreement.sample(value)
        return taken if isinstance(taken, str) else taken.tolist()
    code = getattr(value, "__code__", None)
    return type(value).__name__ if code is None else _text_of(code)


def _written_function(value):
    """The code of a lambda in a configuration of Keras's, None if it is not."""
    if not isinstance(value, dict):
        return None
    if set(value) == {"code", "defaults", "closure"}:  # of the layer `Lambda`
        return value["code"]
    parts = value.get("value")
    if set(value) != {"value"} or not isinstance(parts, (list, tuple)):
        return None
    # Code, defaults and closure.
    is_function = len(parts) == 3 and isinstance(parts[0], str)
    return parts[0] if is_function else None


def _text_of(code):
    return f"{code.co_qualname}, code {zlib.crc32(code.co_code):x}"
