"""Dense and EinsumDense on local shards."""

import functools
import string

import torch
from torch.distributed.tensor import DTensor

from keras.src import activations as functions
from keras.src import layers
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.layers import styles
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.ops import contraction
from keras.src.backend.torch.distribution.ops import linear
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.variables import reading
from keras.src.backend.torch.distribution.variables import resharding
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

# The same in torch, without what Keras's take to come there.
IN_TORCH = {
    functions.relu: torch.relu,
    functions.gelu: torch.nn.functional.gelu,
    functions.silu: torch.nn.functional.silu,
    functions.tanh: torch.tanh,
}


class ProjectionStyle(styles.ShardedStyle):
    """Runs Dense and EinsumDense on local shards where it can."""

    def call(self, layer, context, args, kwargs):
        if not self.applies(layer, args):
            return super().call(layer, context, args, kwargs)
        kernel = reading.read_stored(layer._kernel)
        bias = None if layer.bias is None else reading.read_stored(layer.bias)
        plan = _plan_of(layer, args[0], kernel, bias, context)
        if plan.is_general:
            return super().call(layer, context, args, kwargs)
        if plan.product is None or not linear.may_run(args[0]):
            return project(layer, args[0], context)
        return _project_at_once(layer, args[0], kernel, bias, plan)

    def applies(self, layer, args):
        return (
            len(args) == 1
            and isinstance(args[0], torch.Tensor)
            and args[0].dtype.is_floating_point
            and styles.reads_as_released(layer)
        )


class Plan:
    """How a layer computes with an input of a kind; kept on the layer.

    Args:
        layer: a built Dense or EinsumDense.
        inputs: tensor, whole (plain) or sharded (a DTensor of the model mesh).
        kernel, bias: what is stored of them, perhaps cast. The bias may be
            None.
        context: the `Context`.

    Attributes:
        is_general: whether the layer's own code is to run on DTensors.
        product: the `linear.Product`, None if it is not that simple.
        letters: the `Contraction`.
    """

    def __init__(self, layer, inputs, kernel, bias, context):
        self._made_of = kernel, bias, context
        self._kind = _kind_of(inputs)
        mesh = context.model_mesh
        placements = activations.placements(inputs, mesh)
        self.context = context
        self.product = None
        self.letters = letters_of(layer, inputs.ndim)
        self.is_general = _has_dim_cut_twice(inputs, kernel, bias)
        if self.is_general or not linear.fits(
            inputs, kernel, bias, self.letters
        ):
            return
        product = linear.product(
            self.letters,
            unshard.placements_of_operand(kernel, context),
            placements,
            tuple(mesh.shape),
        )
        ndim = len(self.letters.output)
        if product is None or (
            product.sums and activations.requested(context, ndim)
        ):
            return
        if bias is None or not _bias_steps(
            product.placements,
            unshard.placements_of_operand(bias, context),
            ndim,
            tuple(bias.shape),
        ):
            self.product = product

    def is_of(self, inputs, kernel, bias, context):
        """Whether it was made for these, or for others like them."""
        made_of = self._made_of
        return (
            made_of[0] is kernel
            and made_of[1] is bias
            and made_of[2] is context
            and self._kind == _kind_of(inputs)
        )


def _has_dim_cut_twice(*tensors):
    return any(
        cuts.has_several_on_a_dim(getattr(x, "placements", ())) for x in tensors
    )


def _kind_of(x):
    placements = x._spec.placements if isinstance(x, DTensor) else None
    return x.ndim, x.dtype, x.device, placements


def _plan_of(layer, inputs, kernel, bias, context):
    if torch.compiler.is_compiling():
        # What is kept on a layer would be an effect of what is traced.
        return Plan(layer, inputs, kernel, bias, context)
    plan = layer.__dict__.get(marks.PLAN)
    with private.without_torch_functions():
        if plan is not None and plan.is_of(inputs, kernel, bias, context):
            return plan
    plan = layer.__dict__[marks.PLAN] = Plan(
        layer, inputs, kernel, bias, context
    )
    return plan


def _project_at_once(layer, inputs, kernel, bias, plan):
    """As `project`, in one function of autograd's."""
    context, product = plan.context, plan.product
    mesh = context.model_mesh
    kernel = unshard.stored_or_operand(kernel, context, layer._kernel)
    if bias is not None:
        bias = unshard.stored_or_operand(bias, context, layer.bias)
    with private.without_torch_functions():
        x, _ = activations.local(inputs, mesh)
        x, due = contraction.column_input(
            x, inputs, product.columns, map(mesh.get_group, product.columns)
        )
        groups = [mesh.get_group(axis) for axis in product.sums]
        y = linear.linear(x, kernel, bias, product.contracted, groups, due)
        shape = plan.letters.output_shape(
            inputs.shape, layer._kernel._shape, y.shape
        )
        if layer.activation in ELEMENTWISE or layer.activation is None:
            return _activated(
                layer.activation, y, mesh, product.placements, shape
            )
    return _activated(layer.activation, y, mesh, product.placements, shape)


def is_plain(layer, args):
    """Whether a layer is Keras's `Dense`, and its code a product and a sum of
    plain tensors: `project_plain` is the same in one function of torch's."""
    if type(layer) is not layers.Dense or len(args) != 1:
        return False
    x, kernel, bias = args[0], layer._kernel._value, layer.bias
    if kernel is None:  # Keras looks for shapes, before there are weights.
        return False
    return (
        type(x) is torch.Tensor
        and styles.reads_as_released(layer)
        and kernel.dtype == x.dtype
        and kernel.device == x.device
        and x.dtype.is_floating_point
        and (bias is None or bias._value.dtype == x.dtype)
        and not torch.compiler.is_compiling()
    )


def project_plain(layer, inputs):
    """Activation(inputs . kernel + bias) of plain tensors.

    Collective along the data axes that cut the kernel or the bias.
    """
    kernel = layer._kernel.value
    bias = None if layer.bias is None else layer.bias.value
    y = torch.nn.functional.linear(inputs, kernel.t(), bias)
    activation = layer.activation
    if activation is None:
        return y
    return IN_TORCH.get(activation, activation)(y)


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
    letters = letters_of(layer, inputs.ndim)
    kernel, kernel_placements = reading.operand_of(layer._kernel, context)
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
        y = _contract(layer, cut, None)
        y = cut.reduced(y, activations.requested(context, y.ndim))
        bias = _bias(layer, context, placements, letters)
        if bias is not None:
            y = y + bias
    else:
        bias = _bias(layer, context, placements, letters)
        y = _contract(layer, cut, bias)
    shape = letters.output_shape(inputs.shape, layer._kernel.shape, y.shape)
    mesh = context.model_mesh
    return _activated(layer.activation, y, mesh, placements, shape)


def _activated(activation, y, mesh, placements, shape):
    if activation is None:
        return activations.carry(y, mesh, placements, shape)
    if activation in ELEMENTWISE or all(p.is_replicate() for p in placements):
        activation = IN_TORCH.get(activation, activation)
        return activations.carry(activation(y), mesh, placements, shape)
    y = activations.carry(y, mesh, placements, shape)
    return activations.leave(activation(y))


def _contract(layer, cut, bias):
    if (
        not cut.is_gathered
        or torch.compiler.is_compiling()
        or private.is_in_transform()
    ):
        return _contracted(layer, cut.x, cut.kernel, bias)
    # Of what was gathered, autograd saves the shard.
    with resharding.saving_no_weights():
        return _contracted(layer, cut.x, cut.kernel, bias)


def _contracted(layer, x, kernel, bias):
    if layer_equation(layer) is None:
        return torch.nn.functional.linear(x, kernel.t(), bias)
    y = torch.einsum(layer.equation, x, kernel)
    return y if bias is None else y + bias


def _bias(layer, context, placements, letters):
    """The bias, cut as the output is.

    Collective along the model axes where it is cut otherwise.
    """
    if layer.bias is None:
        return None
    bias, held = reading.operand_of(layer.bias, context)
    steps = _bias_steps(
        tuple(placements),
        tuple(held),
        len(letters.output),
        tuple(layer.bias.shape),
    )
    for function, axis, arguments in steps:
        group = context.model_mesh.get_group(axis)
        bias = function.apply(bias, *arguments, group)
    return bias


@functools.lru_cache(maxsize=4096)
def _bias_steps(placements, held, ndim, shape):
    """How a bias comes to be cut as an output is.

    Args:
        placements: those of the output, one for each axis of the model mesh.
        held: those of the bias.
        ndim: number of dims of the output, of which the bias has the last.
        shape: of the bias.

    Returns:
        In order: an autograd function, the axis along which it acts, and what
        it takes between the bias and the group of that axis.
    """
    offset = ndim - len(shape)
    gathers, slices, sums = [], [], []
    for axis, (placement, own) in enumerate(zip(placements, held)):
        dim, own = contraction.dim_of(placement), contraction.dim_of(own)
        wanted = None if dim is None else dim - offset
        if wanted is not None and (wanted < 0 or shape[wanted] == 1):
            wanted = None
        if own is not None and own != wanted:
            gathers.append((collectives.AllGather, axis, (own, shape[own])))
        if wanted is not None and own != wanted:
            slices.append((collectives.Slice, axis, (wanted,)))
        if placement.is_shard() and wanted is None:
            # One bias for all parts of the output.
            sums.append((collectives.AllReduceGradient, axis, ()))
    # What is gathered is gathered before another axis cuts the same dim.
    return (*gathers, *slices, *sums)


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
