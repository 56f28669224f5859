"""Dense and EinsumDense on local shards.

Both contract an input with a kernel. On one mesh axis, a dim of the kernel
that is sharded is one of:

- an output dim ("column"): y_j = x W_j. Each process holds columns, uses the
  whole input, and gives its part of the output. The gradient of the input is a
  sum over processes.
- a contracted dim ("row"): y = sum_j x_j W_j. Each process uses its part of
  the input; the output is a sum over processes.
- both an input and an output dim: y_j = x_j W_j, no communication.

So column -> activation -> row communicates once forward and once backward
(Shoeybi et al., 2019).
"""

import string

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src import activations
from keras.src.backend.torch.distribution import collectives
from keras.src.backend.torch.distribution import storage
from keras.src.backend.torch.distribution import styles

# Activations of single numbers: they may be computed on any shard.
ELEMENTWISE = {
    getattr(activations, name)
    for name in (
        "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu "
        "hard_tanh leaky_relu linear log_sigmoid mish relu relu6 selu sigmoid "
        "silu soft_shrink softplus softsign sparse_plus squareplus tanh "
        "tanh_shrink threshold"
    ).split()
    if hasattr(activations, name)
}

COLUMN_INPUT = "_keras_column_input"


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
            and not styles.has_two_shards_on_a_dim(
                getattr(layer._kernel._value, "placements", ())
            )
            and not styles.has_two_shards_on_a_dim(
                getattr(args[0], "placements", ())
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
        The layer's output, as `styles.carry` gives it.
    """
    x, x_placements = styles.local_activation(inputs, context)
    kernel, kernel_placements = storage.operand(
        storage.read_stored(layer._kernel), context
    )
    letters = contraction(layer, inputs.ndim)
    placements, sums, shared = [], [], []
    steps = ()  # what has been done to the input, for those who share it
    for axis in range(context.model_mesh.ndim):
        group = context.model_mesh.get_group(axis)
        kernel_dim = _dim(kernel_placements[axis])
        x_dim = _dim(x_placements[axis])
        if kernel_dim is None:
            if x_dim is not None and letters.inputs[x_dim] in letters.kernel:
                x = _gather(x, x_dim, inputs, group)
                steps += (("gather", axis),)
                x_dim = None
            if x_dim is None:
                placements.append(Replicate())
            else:
                # Rows, say, of a sequence: each process sees its own.
                shared.append(group)
                placements.append(
                    Shard(letters.output.index(letters.inputs[x_dim]))
                )
            continue
        letter = letters.kernel[kernel_dim]
        if letter not in letters.inputs:  # column
            steps += (("column", axis),)
            x = _column_input(x, x_dim, inputs, steps, group)
            placements.append(Shard(letters.output.index(letter)))
            continue
        wanted = letters.inputs.index(letter)
        if x_dim != wanted:
            if x_dim is not None:
                x = _gather(x, x_dim, inputs, group)
            x = collectives.Slice.apply(x, wanted, group)
            steps += (("slice", axis, wanted),)
        if letter in letters.output:
            placements.append(Shard(letters.output.index(letter)))
        else:  # row
            sums.append(group)
            placements.append(Replicate())
    for group in shared:
        kernel = collectives.AllReduceGradient.apply(kernel, group)
    bias = _bias(layer, context, placements, letters)
    shape = letters.output_shape(inputs.shape, layer._kernel.shape)
    y = _contract(layer, x, kernel, None if sums else bias)
    for group in sums:
        y = collectives.AllReduce.apply(y, group)
    if sums and bias is not None:
        y = y + bias
    activation = layer.activation
    if activation is None:
        return styles.carry(y, context, placements, shape)
    if activation in ELEMENTWISE or all(p.is_replicate() for p in placements):
        return styles.carry(activation(y), context, placements, shape)
    return styles.leave(activation(styles.carry(y, context, placements, shape)))


def _contract(layer, x, kernel, bias):
    if layer_equation(layer) is None:
        return torch.nn.functional.linear(x, kernel.t(), bias)
    y = torch.einsum(layer.equation, x, kernel)
    return y if bias is None else y + bias


def _bias(layer, context, placements, letters):
    """The bias, cut as the output is."""
    if layer.bias is None:
        return None
    bias, bias_placements = storage.operand(
        storage.read_stored(layer.bias), context
    )
    offset = len(letters.output) - len(layer.bias.shape)
    for axis, placement in enumerate(placements):
        group = context.model_mesh.get_group(axis)
        dim = _dim(placement)
        own = None if dim is None else dim - offset
        if own is not None and (own < 0 or layer.bias.shape[own] == 1):
            own = None
        stored = _dim(bias_placements[axis])
        if stored != own:
            if stored is not None:
                bias = collectives.AllGather.apply(
                    bias, stored, layer.bias.shape[stored], group
                )
            if own is not None:
                bias = collectives.Slice.apply(bias, own, group)
        if dim is not None and own is None:
            # One bias for all parts of the output.
            bias = collectives.AllReduceGradient.apply(bias, group)
    return bias


def _gather(x, dim, inputs, group):
    return collectives.AllGather.apply(x, dim, inputs.shape[dim], group)


def _column_input(x, x_dim, inputs, steps, group):
    """The whole input, whose gradient is a sum over processes.

    Layers that share an input (query, key and value) share this too, so that
    the gradient is summed once for all of them.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        if x_dim is None:
            return x
        return collectives.all_gather(x, x_dim, inputs.shape[x_dim], group)
    shared = inputs.__dict__.setdefault(COLUMN_INPUT, {})
    key = (steps, x.dtype)
    if key not in shared:
        if x_dim is None:
            shared[key] = collectives.AllReduceGradient.apply(x, group)
        else:
            shared[key] = collectives.AllGatherPartial.apply(
                x, x_dim, inputs.shape[x_dim], group
            )
    return shared[key]


def _dim(placement):
    return placement.dim if placement.is_shard() else None


def layer_equation(layer):
    return getattr(layer, "equation", None)


class Contraction:
    """The letters of an einsum equation, one for each dim.

    >>> c = Contraction("abc,cd->abd")
    >>> c.inputs, c.kernel, c.output
    ('abc', 'cd', 'abd')
    """

    def __init__(self, equation):
        operands, self.output = equation.split("->")
        self.inputs, self.kernel = operands.split(",")

    def output_shape(self, input_shape, kernel_shape):
        sizes = dict(zip(self.kernel, kernel_shape))
        sizes.update(zip(self.inputs, input_shape))
        return tuple(sizes[letter] for letter in self.output)


_ALPHABET = string.ascii_letters


def contraction(layer, ndim):
    """The `Contraction` of a Dense or EinsumDense for inputs of `ndim` dims."""
    cache = layer.__dict__.setdefault("_keras_contractions", {})
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
        cache[ndim] = Contraction(equation)
    return cache[ndim]
