"""From a layout map to a parallel plan, and from a plan to running modules."""

import functools

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.parallel import parallelize_module

from keras.src import tree
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.layers import styles
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import storage
from keras.src.backend.torch.distribution.variables import unshard


def create(module, layout_map):
    """`{module name: ParallelStyle}` of what a layout map shards.

    Args:
        module: a Keras layer or model, or any torch module. Paths are Keras's
            variable paths (`"model/dense/kernel"`), and for torch modules
            their parameters' names with slashes (`"encoder/linear/weight"`).
        layout_map: `keras.distribution.LayoutMap`, or a dict from paths to
            `TensorLayout`s.

    Returns:
        Dict. A Keras layer's name in it is that of `named_keras_layers`, a
        torch module's that of `named_modules`.
    """
    plan = {}
    for name, layer in named_keras_layers(module):
        layouts = {}
        for variable in own_variables(layer):
            layout = _layout(layout_map, variable.path)
            if layout is not None and any(layout.axes):
                layouts[variable.name] = layout
        if layouts:
            plan[name] = style_class(layer)(layouts)
    for name, torch_module in named_torch_modules(module):
        layouts = {}
        for key, _ in torch_module.named_parameters(recurse=False):
            path = f"{name}.{key}".lstrip(".").replace(".", "/")
            layout = _layout(layout_map, path)
            if layout is not None and any(layout.axes):
                layouts[key] = layout
        if layouts:
            plan[name] = TorchModuleStyle(layouts)
    return plan


def parallelize(module, device_mesh, plan):
    """Applies a plan through torch's `parallelize_module`.

    Collective where a torch module's parameters are cut: every process of
    `device_mesh` calls it.

    Args:
        module: a Keras layer or model, or any torch module.
        device_mesh: torch mesh that the styles of the plan refer to.
        plan: dict of `create`, or one written by hand with torch's own styles
            for torch modules.

    Returns:
        `module`.

    Raises:
        ValueError: if the plan names a module that there is not, or would
            replace parameters that Keras has taken as variables already.
    """
    if isinstance(plan, ParallelStyle):
        plan = {"": plan}
    layers = dict(named_keras_layers(module))
    modules = dict(module.named_modules())
    for name, style in plan.items():
        if isinstance(style, styles.ShardedStyle) and name in layers:
            target = layers[name]
        else:
            target = modules.get(name, layers.get(name))
        if target is None:
            known = sorted({*layers, *modules})[:10]
            raise ValueError(
                f"The plan names a module that there is not: '{name}'. "
                f"The first of those there are: {known}"
            )
        if not isinstance(style, styles.ShardedStyle) or not hasattr(
            target, "_flatten_layers"
        ):
            _check_not_taken(target, name)
        parallelize_module(target, device_mesh, style)
    return module


def _check_not_taken(module, name):
    taken = [
        key
        for key, parameter in module.named_parameters()
        if hasattr(parameter, marks.TAKEN)
    ]
    if taken:
        raise ValueError(
            f"The parameters {taken} of the module '{name}' are variables of "
            "a Keras layer already, and a plan would replace them. Apply the "
            "plan first, then hand the module to Keras."
        )


def style_of(layer, context):
    """The style of a layer that owns a variable sharded over a model axis.

    Or of a recurrent layer with any sharded variable, itself or in its cells.

    Layers get their style when they are built; one whose variables came later
    gets it here. None for any other layer.
    """
    repeats = is_recurrent(layer)
    own = layer.variables if repeats else own_variables(layer)
    if not own:
        return None
    known = layer.__dict__.get(marks.STYLE_DECISION)
    if known is None or known[0] is not context or known[1] != len(own):
        style = None
        if repeats:
            if any(unshard.is_laid_out_by(v._value, context) for v in own):
                style = styles.RECURRENT
        elif any(unshard.is_model_sharded(v._value, context) for v in own):
            style = layer.__dict__.get(marks.STYLE) or style_class(layer)()
        known = layer.__dict__[marks.STYLE_DECISION] = (
            context,
            len(own),
            style,
        )
    return known[2]


def is_recurrent(layer):
    """Whether a layer repeats a cell."""
    return isinstance(layer, _recurrent())


@functools.cache
def _recurrent():
    from keras.src.layers import RNN

    return RNN


def named_keras_layers(module, prefix=""):
    """Keras layers in a layer, itself first, by name: `""`, `"dense"`, ..."""
    if not hasattr(module, "_flatten_layers"):
        return
    seen = set()
    stack = [(prefix, module)]
    while stack:
        name, layer = stack.pop(0)
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        yield name, layer
        for child in layer._layers:
            stack.append((f"{name}.{child.name}".lstrip("."), child))


def named_torch_modules(module):
    """Torch modules in a module that are no Keras layers, by name."""
    for name, child in module.named_modules():
        if not hasattr(child, "_flatten_layers") and not isinstance(
            child, torch.nn.ParameterDict
        ):
            yield name, child


def own_variables(layer):
    """The variables of a layer without those of the layers in it."""
    return layer._trainable_variables + layer._non_trainable_variables


def style_class(layer):
    """The style that runs layers of this class fastest."""
    from keras.src.backend.torch.distribution.layers.lookup import LookupStyle
    from keras.src.backend.torch.distribution.layers.projection import (
        ProjectionStyle,
    )
    from keras.src.layers import Dense
    from keras.src.layers import EinsumDense
    from keras.src.layers import Embedding

    for known, weight, style in (
        (Dense, "kernel", ProjectionStyle),
        (EinsumDense, "kernel", ProjectionStyle),
        (Embedding, "embeddings", LookupStyle),
    ):
        # A subclass with a call of its own may do anything, and one may compute
        # with something else than the weight.
        if isinstance(layer, known) and all(
            getattr(type(layer), name) is getattr(known, name)
            for name in ("call", weight)
        ):
            return style
    return styles.ShardedStyle


def _layout(layout_map, path):
    if isinstance(layout_map, dict):
        return layout_map.get(path)
    return layout_map.use(path)


class TorchModuleStyle(styles.ShardedStyle):
    """Shards the parameters of a torch module that is no Keras layer.

    Its code runs on DTensors: plain inputs enter as `Replicate`, and its
    outputs leave whole.
    """

    def _apply(self, module, device_mesh):
        def partition(name, module, mesh):
            for key, parameter in module.named_parameters(recurse=False):
                placements = sharded.replicate(mesh)
                if key in self.layouts:
                    placements = context_lib.layout_placements(
                        self.layouts[key], mesh, parameter.shape, key
                    )
                shard = storage.shard(parameter.detach(), mesh, placements)
                module.register_parameter(
                    key,
                    torch.nn.Parameter(
                        shard, requires_grad=parameter.requires_grad
                    ),
                )

        def enter(module, inputs, mesh):
            replicate = sharded.replicate(mesh)
            return tree.map_structure(
                lambda x: (
                    sharded.Enter.apply(x, mesh, replicate, tuple(x.shape))
                    if isinstance(x, torch.Tensor)
                    and not isinstance(x, DTensor)
                    else x
                ),
                inputs,
            )

        def leave(module, outputs, mesh):
            return tree.map_structure(sharded.whole, outputs)

        return distribute_module(module, device_mesh, partition, enter, leave)
