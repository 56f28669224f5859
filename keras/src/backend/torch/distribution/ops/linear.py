"""x W + b on local shards, as one autograd function.

What `contraction` does in steps, each a node of autograd's, is one node here,
for the cuts that need no more than Megatron's two sums (Shoeybi et al., 2019):
W cut by its outputs, or by what it sums over. The bias is added in the product,
or in place after the sum; the gradient of a weight is made as its shard.
"""

import dataclasses
import functools

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.ops import contraction
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded


@dataclasses.dataclass(frozen=True)
class Product:
    """A contraction that is a product of matrices, on every axis of a mesh.

    Attributes:
        contracted: how many dims are summed over: the last ones of the input,
            the first ones of the kernel.
        columns: axes that cut outputs: the gradient of the input is a sum.
        sums: axes over which the result is a sum.
        placements: of the result, one for each axis.
    """

    contracted: int
    columns: tuple
    sums: tuple
    placements: tuple


@functools.lru_cache(maxsize=4096)
def product(letters, kernel_placements, input_placements, sizes):
    """The `Product` that a contraction is; None if it is not that simple.

    Args:
        letters: the `Contraction`.
        kernel_placements, input_placements: tuples, one for each axis.
        sizes: tuple, of the axes.
    """
    contracted = contracted_dims(letters)
    if contracted is None:
        return None
    plans = contraction.plan(
        letters,
        tuple(map(contraction.dim_of, kernel_placements)),
        tuple(map(contraction.dim_of, input_placements)),
        sizes,
    )
    for each in plans:
        moved = (
            each.gathers_kernel,
            each.cuts_kernel,
            each.gathers_input,
            each.cuts_input,
            each.column_dim,
        )
        if each.has_own_rows or any(dim is not None for dim in moved):
            return None
    return Product(
        contracted,
        tuple(i for i, each in enumerate(plans) if each.is_column),
        tuple(i for i, each in enumerate(plans) if each.sums),
        tuple(each.placement for each in plans),
    )


def contracted_dims(letters):
    """How many dims `...ab,abcd->...cd` sums over, None for other equations.

    >>> contracted_dims(contraction.Contraction("xyab,abc->xyc"))
    2
    """
    summed = [x for x in letters.kernel if x in letters.inputs]
    n = len(summed)
    rows, outputs = letters.inputs[:-n], letters.kernel[n:]
    if (
        n
        and not letters.uncut
        and letters.kernel[:n] == letters.inputs[-n:] == "".join(summed)
        and letters.output == rows + outputs
    ):
        return n
    return None


def fits(x, kernel, bias, letters):
    """Whether these are of one dtype, the bias of all outputs or None."""
    if contracted_dims(letters) is None or x.dtype != kernel.dtype:
        return False
    outputs = len(letters.kernel) - contracted_dims(letters)
    return x.device == kernel.device and (
        bias is None or (bias.dtype == x.dtype and bias.ndim == outputs)
    )


def may_run(x):
    """Whether nothing around transforms what is computed with a tensor."""
    return not (
        torch.compiler.is_compiling()
        or private.is_in_transform()
        or torch.is_autocast_enabled(x.device.type)
    )


def linear(x, kernel, bias, contracted, groups, due=None):
    """x W + b of local shards.

    Collective along `groups`; in backward along the group that the gradient
    of `x` is due for a sum over.

    Args:
        x: plain tensor, our shard.
        kernel, bias: our shards, plain; or weights as they are stored, that no
            data axis cuts. The bias may be None.
        contracted: int, how many dims are summed over.
        groups: process groups over which the product is summed.
        due: the `collectives.GradientSum` of `x`, or None.

    Returns:
        Plain tensor, our shard.
    """
    return Linear.apply(x, kernel, bias, contracted, groups, due)


class Linear(torch.autograd.Function):
    """Sum over processes of x W, plus b.

    Backward: the gradient of the input is our addend, or our part. If nobody
    else adds to it, it is summed while that of the weight is computed.

    Collective along the groups in forward; along the one of that sum in
    backward; under `create_graph=True` in the
    backward of backward.
    """

    @staticmethod
    def forward(ctx, x, kernel, bias, contracted, groups, due):
        ctx.contracted, ctx.groups, ctx.due = contracted, groups, due
        ctx.layouts = _layout_of(kernel), _layout_of(bias)
        w, b = _local(kernel), _local(bias)
        ctx.save_for_backward(x, kernel)
        ctx.shape_of_bias = None if b is None else b.shape
        rows, matrix = _rows(x, contracted), _matrix(w, contracted)
        if b is not None and not groups:
            y = torch.addmm(b.reshape(-1), rows, matrix)
        else:
            y = torch.mm(rows, matrix)
        for group in groups:
            dist.all_reduce(y, group=group)
        if b is not None and groups:
            y += b.reshape(-1)
        return y.view(x.shape[: x.ndim - contracted] + w.shape[contracted:])

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad)
        x, kernel = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if again and ctx.due is not None:
            # What is computed here makes a gradient of `x` as well.
            ctx.due.users += 1
        w = kernel
        if ctx.layouts[0] is not None:
            w = laid_out.Local.apply(kernel) if again else _local(kernel)
        n = ctx.contracted
        grads = [None, None, None]
        outputs = w.ndim - n
        if ctx.needs_input_grad[2]:
            flat = _matrix(grad, grad.ndim - outputs)
            grads[2] = flat.sum(0).view(ctx.shape_of_bias)
        if again:
            for group in ctx.groups:
                grad = collectives.AllReduceGradient.apply(grad, group)
        grad = _rows(grad, outputs)
        work = None
        if ctx.needs_input_grad[0]:
            grads[0] = (grad @ _matrix(w, n).t()).view(x.shape)
            if ctx.due is not None:
                work = ctx.due.begin(grads[0])
        if ctx.needs_input_grad[1]:
            grads[1] = (_rows(x, n).t() @ grad).view(w.shape)
        if work is not None:
            work.wait()
        for i, layout in enumerate(ctx.layouts, 1):
            if layout is not None and grads[i] is not None:
                grads[i] = layout.carry(grads[i])
        return *grads, None, None, None


def _layout_of(x):
    return laid_out.layout_of(x) if sharded.is_weight(x) else None


def _local(x):
    return getattr(x, "_local_tensor", x)


def _rows(x, dims):
    """A matrix of what is in the last dims, a row for each of the others."""
    return _matrix(x, x.ndim - dims)


def _matrix(x, dims):
    """A matrix of a tensor, with a row for each entry of the first dims."""
    shape = x.shape
    return x.reshape(shape[:dims].numel(), shape[dims:].numel())
