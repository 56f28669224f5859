"""An input contracted with a kernel, on local shards.

A dense projection, an einsum and a convolution all contract. On one mesh axis,
a dim of the kernel that is sharded is one of:

- an output dim ("column"): y_j = x W_j. Each process holds columns, uses the
  whole input, and gives its part of the output. The gradient of the input is a
  sum over processes.
- a contracted dim ("row"): y = sum_j x_j W_j. Each process uses its part of
  the input; the output is a sum over processes.
- both an input and an output dim: y_j = x_j W_j, no communication.

So column -> activation -> row communicates once forward and once backward
(Shoeybi et al., 2019).
"""

import weakref

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.tensors import collectives

COLUMN_INPUT = "_keras_column_input"


class Contraction:
    """The letters of an einsum equation, one for each dim.

    Args:
        equation: string, `"inputs,kernel->output"`.
        uncut: letters of the kernel that cannot be cut for computing (a
            convolution's window, say).
        multiples: dict from letters to a number that shards must divide.
        widths: dict from letters of the kernel to how many elements of the
            output one of its elements becomes (1 for those left out).

    >>> c = Contraction("abc,cd->abd")
    >>> c.inputs, c.kernel, c.output
    ('abc', 'cd', 'abd')
    """

    def __init__(self, equation, uncut="", multiples=None, widths=None):
        operands, self.output = equation.split("->")
        self.inputs, self.kernel = operands.split(",")
        self.uncut = uncut
        self.multiples = multiples or {}
        self.widths = widths or {}

    def can_cut(self, letter, shards):
        """Whether a dim of the kernel may be cut into so many shards."""
        if letter in self.uncut:
            return False
        return self.multiples.get(letter, 0) % shards == 0

    def output_shape(self, input_shape, kernel_shape, local):
        """The global shape of an output with this local shape."""
        sizes = dict(zip(self.inputs, input_shape))
        for letter, size in zip(self.kernel, kernel_shape):
            sizes[letter] = size * self.widths.get(letter, 1)
        # Letters of neither are dims that the contraction makes, whole.
        return tuple(
            sizes.get(letter, size) for letter, size in zip(self.output, local)
        )


class Operands:
    """What this process contracts, and what it gets.

    Attributes:
        x, kernel: plain tensors, our shards.
        placements: those of the result once it is summed, one for each axis.
        sums: axes of `mesh` to sum the result over.
    """

    def __init__(self, x, kernel, placements, sums, mesh):
        self.x, self.kernel = x, kernel
        self.placements, self.sums = placements, sums
        self.mesh = mesh

    def reduced(self, y, requested=None):
        """The sum of the results; `placements` say how it is laid out.

        Collective over `sums`.

        Args:
            y: what this process contracted.
            requested: optional placements, one for each axis of the mesh. Where
                one asks for a shard of the sum, no more is communicated.
        """
        for axis in self.sums:
            group = self.mesh.get_group(axis)
            dim = dim_of(requested[axis]) if requested else None
            taken = [dim_of(p) for p in self.placements]
            if dim is None or dim in taken or y.shape[dim] % group.size():
                y = collectives.AllReduce.apply(y, group)
            else:
                y = collectives.ReduceScatter.apply(y, dim, group)
                self.placements[axis] = Shard(dim)
        return y


def operands(inputs, kernel, kernel_placements, shape, letters, mesh):
    """Cuts and gathers an input and a kernel to fit each other.

    Collective along the model axes, as above.

    Args:
        inputs: tensor, whole (plain) or sharded (a DTensor of `mesh`).
        kernel: plain tensor, our shard.
        kernel_placements: one for each axis of `mesh`.
        shape: the global shape of the kernel.
        letters: the `Contraction`.
        mesh: torch mesh of the model axes.

    Returns:
        `Operands`.
    """
    x, x_placements = activations.local(inputs, mesh)
    if x.device != kernel.device:
        # As Keras's own operations take what a program hands them.
        x = x.to(kernel.device)
    placements, sums, shared = [], [], []
    gathers, columns, slices = [], [], []
    cut_dims = [dim_of(p) for p in kernel_placements]
    for axis in range(mesh.ndim):
        group, shards = mesh.get_group(axis), mesh.size(axis)
        kernel_dim = cut_dims[axis]
        x_dim = dim_of(x_placements[axis])
        if kernel_dim is not None and not letters.can_cut(
            letters.kernel[kernel_dim], shards
        ):
            kernel = collectives.AllGather.apply(
                kernel, kernel_dim, shape[kernel_dim], group
            )
            kernel_dim = None
        if kernel_dim is None and x_dim is not None:
            letter = letters.inputs[x_dim]
            if letter not in letters.kernel:
                # Rows, say, of a sequence: each process sees its own.
                shared.append(group)
                placements.append(Shard(letters.output.index(letter)))
                continue
            kernel_dim = letters.kernel.index(letter)
            if (
                letter in letters.output
                and letters.can_cut(letter, shards)
                and kernel_dim not in cut_dims
            ):
                kernel = collectives.Slice.apply(kernel, kernel_dim, group)
            else:
                kernel_dim = None
        if kernel_dim is None:
            if x_dim is not None:
                gathers.append((axis, x_dim))
            placements.append(Replicate())
            continue
        letter = letters.kernel[kernel_dim]
        if letter not in letters.inputs:  # column
            columns.append((axis, x_dim))
            placements.append(Shard(letters.output.index(letter)))
            continue
        wanted = letters.inputs.index(letter)
        if x_dim != wanted:
            if x_dim is not None:
                gathers.append((axis, x_dim))
            slices.append((axis, wanted))
        if letter in letters.output:
            placements.append(Shard(letters.output.index(letter)))
        else:  # row
            sums.append(axis)
            placements.append(Replicate())
    # What is gathered is gathered before another axis cuts the same dim.
    steps = ()  # what has been done to the input, for those who share it
    for axis, dim in gathers:
        steps += (("gather", axis),)
        x = _gather(x, dim, inputs, mesh.get_group(axis))
    for axis, dim in columns:
        steps += (("column", axis),)
        x = _column_input(x, dim, inputs, steps, mesh.get_group(axis))
    for axis, dim in slices:
        x = collectives.Slice.apply(x, dim, mesh.get_group(axis))
    for group in shared:
        kernel = collectives.AllReduceGradient.apply(kernel, group)
    return Operands(x, kernel, placements, sums, mesh)


def _gather(x, dim, inputs, group):
    return collectives.AllGather.apply(x, dim, inputs.shape[dim], group)


def _column_input(x, x_dim, inputs, steps, group):
    """The whole input, whose gradient is a sum over processes.

    Layers that share an input (query, key and value) share this too, so that
    the gradient is summed once for all of them. It lives while the layer that
    is made of them runs; the input itself has no strong reference to it, as it
    may be a view, which keeps the input: both would stay for ever.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        if x_dim is None:
            return x
        return collectives.all_gather(x, x_dim, inputs.shape[x_dim], group)
    shared = inputs.__dict__.setdefault(
        COLUMN_INPUT, weakref.WeakValueDictionary()
    )
    key = (steps, x.dtype)
    result = shared.get(key)
    if result is None:
        if x_dim is None:
            result = collectives.AllReduceGradient.apply(x, group)
        else:
            result = collectives.AllGatherPartial.apply(
                x, x_dim, inputs.shape[x_dim], group
            )
        shared[key] = result
        if modes.shared is not None and not torch.compiler.is_compiling():
            modes.shared.append(result)
    return result


def dim_of(placement):
    return placement.dim if placement.is_shard() else None
