"""Dense and EinsumDense on local shards."""

import string

import torch

from keras.src import activations as functions
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.layers import styles
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.ops import contraction
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.variables import reading
from keras.src.backend.torch.distribution.variables import unshard

# Activations of single numbers: they may be computed on any shard.
ELEMENTWISE = {
    getattr(functions, name)
    for name in (
        "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu "
        "hard_tanh leaky_relu linear log_sigmoid mish relu relu6 selu sigmoid "
        "silu soft_shrink softplus softsign sparse_plus squareplus tanh "
        "tanh_shrink threshold"
    ).split()
    if hasattr(functions, name)
}


class ProjectionStyle(styles.ShardedStyle):
    """Runs Dense and EinsumDense on local shards where it can."""

    def call(self, layer, context, args, kwargs):
        if not self.applies(layer, args):
            return super().call(layer, context, args, kwargs)
        return project(layer, args[0], context)

    def applies(self, layer, args):
        # LoRA and quantisation read the kernel in their own ways.
        return (
            len(args) == 1
            and isinstance(args[0], torch.Tensor)
            and args[0].is_floating_point()
            and layer.quantization_mode is None
            and not layer.lora_enabled
            and not layer._remat_mode
            and not cuts.has_several_on_a_dim(
                getattr(layer._kernel._value, "placements", ())
            )
            and not cuts.has_several_on_a_dim(
                getattr(args[0], "placements", ())
            )
            and not (
                layer.bias is not None
                and cuts.has_several_on_a_dim(
                    getattr(layer.bias._value, "placements", ())
                )
            )
        )


def project(layer, inputs, context):
    """Activation(inputs . kernel + bias), on local shards.

    Collective along the model axes, as above.

    Args:
        layer: a built Dense or EinsumDense.
        inputs: floating-point tensor, whole (plain) or sharded (a DTensor of
            the model mesh).
        context: the `Context`.

    Returns:
        The layer's output, as `activations.carry` gives it.
    """
    kernel, kernel_placements = unshard.operand(
        reading.read_stored(layer._kernel), context
    )
    letters = letters_of(layer, inputs.ndim)
    cut = contraction.operands(
        inputs,
        kernel,
        kernel_placements,
        tuple(layer._kernel.shape),
        letters,
        context.model_mesh,
    )
    placements = cut.placements
    if cut.sums:
        y = _contract(layer, cut.x, cut.kernel, None)
        y = cut.reduced(y, activations.requested(context, y.ndim))
        bias = _bias(layer, context, placements, letters)
        if bias is not None:
            y = y + bias
    else:
        bias = _bias(layer, context, placements, letters)
        y = _contract(layer, cut.x, cut.kernel, bias)
    shape = letters.output_shape(inputs.shape, layer._kernel.shape, y.shape)
    mesh = context.model_mesh
    return _activated(layer.activation, y, mesh, placements, shape)


def _activated(activation, y, mesh, placements, shape):
    if activation is None:
        return activations.carry(y, mesh, placements, shape)
    if activation in ELEMENTWISE or all(p.is_replicate() for p in placements):
        return activations.carry(activation(y), mesh, placements, shape)
    y = activations.carry(y, mesh, placements, shape)
    return activations.leave(activation(y))


def _contract(layer, x, kernel, bias):
    if layer_equation(layer) is None:
        return torch.nn.functional.linear(x, kernel.t(), bias)
    y = torch.einsum(layer.equation, x, kernel)
    return y if bias is None else y + bias


def _bias(layer, context, placements, letters):
    """The bias, cut as the output is."""
    if layer.bias is None:
        return None
    bias, bias_placements = unshard.operand(
        reading.read_stored(layer.bias), context
    )
    offset = len(letters.output) - len(layer.bias.shape)
    wanted = []
    for placement in placements:
        dim = contraction.dim_of(placement)
        own = None if dim is None else dim - offset
        if own is not None and (own < 0 or layer.bias.shape[own] == 1):
            own = None
        wanted.append(own)
    groups = [context.model_mesh.get_group(a) for a in range(len(placements))]
    held = [contraction.dim_of(p) for p in bias_placements]
    # What is gathered is gathered before another axis cuts the same dim.
    for group, dim, own in zip(groups, held, wanted):
        if dim is not None and dim != own:
            bias = collectives.AllGather.apply(
                bias, dim, layer.bias.shape[dim], group
            )
    for group, dim, own in zip(groups, held, wanted):
        if own is not None and dim != own:
            bias = collectives.Slice.apply(bias, own, group)
    for group, placement, own in zip(groups, placements, wanted):
        if placement.is_shard() and own is None:
            # One bias for all parts of the output.
            bias = collectives.AllReduceGradient.apply(bias, group)
    return bias


def layer_equation(layer):
    """The equation of an `EinsumDense`, None for a `Dense`."""
    return getattr(layer, "equation", None)


_ALPHABET = string.ascii_letters


def letters_of(layer, ndim):
    """The `Contraction` of a Dense or EinsumDense for inputs of `ndim` dims."""
    cache = layer.__dict__.setdefault(marks.CONTRACTIONS, {})
    if ndim not in cache:
        equation = layer_equation(layer)
        if equation is None:
            equation = "...x,xy->...y"
        equation = equation.replace(" ", "")
        if "..." in equation:
            named = equation.split(",")[0].replace("...", "")
            unused = [c for c in _ALPHABET if c not in equation]
            batch = "".join(unused[: ndim - len(named)])
            equation = equation.replace("...", batch)
        cache[ndim] = contraction.Contraction(equation)
    return cache[ndim]
