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

import dataclasses
import functools
import weakref

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.tensors import collectives


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
        self._key = (
            equation,
            uncut,
            *self.multiples.items(),
            None,
            *self.widths.items(),
        )

    def __eq__(self, other):
        return isinstance(other, Contraction) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

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
        is_gathered: whether `x` may bear the mark of `GatheredAgain`.
    """

    def __init__(self, x, kernel, placements, sums, mesh, is_gathered=False):
        self.x, self.kernel = x, kernel
        self.placements, self.sums = placements, sums
        self.mesh, self.is_gathered = mesh, is_gathered

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


@dataclasses.dataclass(frozen=True)
class AxisPlan:
    """What is done along one axis of the mesh, before the contraction.

    Attributes:
        gathers_kernel, cuts_kernel: dim of the kernel, or None.
        gathers_input, cuts_input: dim of the input, or None.
        is_column: whether outputs are cut: the gradient of the input is a sum.
        column_dim: dim of the input that it is gathered along, or None.
        has_own_rows: whether each process sees rows of its own: the gradient of
            the kernel is a sum.
        sums: whether the result is to be summed.
        placement: of the result, once it is.
    """

    gathers_kernel: int | None = None
    cuts_kernel: int | None = None
    gathers_input: int | None = None
    cuts_input: int | None = None
    is_column: bool = False
    column_dim: int | None = None
    has_own_rows: bool = False
    sums: bool = False
    placement: Replicate | Shard = Replicate()


def plan_axis(letters, kernel_dim, input_dim, shards, cut_dims):
    """The `AxisPlan` of an axis. Does nothing.

    Args:
        letters: the `Contraction`.
        kernel_dim, input_dim: the dims that the axis cuts, or None.
        shards: int, the size of the axis.
        cut_dims: the dims of the kernel that any axis cuts.
    """
    gathers_kernel = None
    if kernel_dim is not None:
        if not letters.can_cut(letters.kernel[kernel_dim], shards):
            gathers_kernel, kernel_dim = kernel_dim, None
    cuts_kernel = None
    if kernel_dim is None and input_dim is not None:
        letter = letters.inputs[input_dim]
        if letter not in letters.kernel:
            # Rows, say, of a sequence: each process sees its own.
            return AxisPlan(
                gathers_kernel,
                has_own_rows=True,
                placement=Shard(letters.output.index(letter)),
            )
        dim = letters.kernel.index(letter)
        if (
            letter in letters.output
            and letters.can_cut(letter, shards)
            and dim not in cut_dims
        ):
            cuts_kernel = kernel_dim = dim
    if kernel_dim is None:
        return AxisPlan(gathers_kernel, gathers_input=input_dim)
    letter = letters.kernel[kernel_dim]
    if letter not in letters.inputs:
        return AxisPlan(
            gathers_kernel,
            cuts_kernel,
            is_column=True,
            column_dim=input_dim,
            placement=Shard(letters.output.index(letter)),
        )
    wanted, gathers_input, cuts_input = letters.inputs.index(letter), None, None
    if input_dim != wanted:
        gathers_input, cuts_input = input_dim, wanted
    stays = letter in letters.output  # Else it is a row: what it sums over.
    return AxisPlan(
        gathers_kernel,
        cuts_kernel,
        gathers_input=gathers_input,
        cuts_input=cuts_input,
        sums=not stays,
        placement=(
            Shard(letters.output.index(letter)) if stays else Replicate()
        ),
    )


@functools.lru_cache(maxsize=4096)
def plan(letters, kernel_dims, input_dims, sizes):
    """The `AxisPlan` of each axis."""
    return tuple(
        plan_axis(letters, *dims, kernel_dims)
        for dims in zip(kernel_dims, input_dims, sizes)
    )


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
    x, input_placements = activations.local(inputs, mesh)
    if x.device != kernel.device:
        # As Keras's own operations take what a program hands them.
        x = x.to(kernel.device)
    plans = plan(
        letters,
        tuple(map(dim_of, kernel_placements)),
        tuple(map(dim_of, input_placements)),
        tuple(mesh.shape),
    )
    groups = [mesh.get_group(axis) for axis in range(mesh.ndim)]
    for each, group in zip(plans, groups):
        dim = each.gathers_kernel
        if dim is not None:
            kernel = collectives.AllGather.apply(kernel, dim, shape[dim], group)
        if each.cuts_kernel is not None:
            kernel = collectives.Slice.apply(kernel, each.cuts_kernel, group)
    # What is gathered is gathered before another axis cuts the same dim.
    steps = ()  # what has been done to the input, for those who share it
    for axis, each in enumerate(plans):
        if each.gathers_input is not None:
            steps += (("gather", axis),)
            x = _gather(x, each.gathers_input, inputs, groups[axis])
    for axis, each in enumerate(plans):
        if each.is_column:
            steps += (("column", axis),)
            x, _ = _column_input(
                x, each.column_dim, inputs, steps, groups[axis]
            )
    for each, group in zip(plans, groups):
        if each.cuts_input is not None:
            x = collectives.Slice.apply(x, each.cuts_input, group)
        if each.has_own_rows:
            kernel = collectives.AllReduceGradient.apply(kernel, group)
    return Operands(
        x,
        kernel,
        [each.placement for each in plans],
        [axis for axis, each in enumerate(plans) if each.sums],
        mesh,
        any(each.column_dim is not None for each in plans),
    )


def _gather(x, dim, inputs, group):
    return collectives.AllGather.apply(x, dim, inputs.shape[dim], group)


def column_input(x, inputs, axes, groups):
    """A whole input of which these axes compute parts of the outputs.

    Collective along them in backward: the gradient is a sum.

    Args:
        x: plain tensor, our shard.
        inputs: what it is the shard of, which other layers may share.
        axes: axes of the mesh.
        groups: their process groups.

    Returns:
        The input, and the `collectives.GradientSum` that its gradient is due
        for. None where there is no sum, or one after another.
    """
    steps, due = (), None
    for axis, group in zip(axes, groups):
        steps += (("column", axis),)
        x, due = _column_input(x, None, inputs, steps, group)
    return x, due if len(axes) == 1 else None


def _column_input(x, x_dim, inputs, steps, group):
    """The whole input, whose gradient is a sum over processes; and what it is
    due for, or None.

    Layers that share an input (query, key and value) share this too, so that
    the gradient is summed once for all of them. It lives while the layer that
    is made of them runs; the input itself has no strong reference to it, as it
    may be a view, which keeps the input: both would stay for ever.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        if x_dim is not None:
            x = collectives.all_gather(x, x_dim, inputs.shape[x_dim], group)
        return x, None
    shared = inputs.__dict__.setdefault(
        marks.COLUMN_INPUT, weakref.WeakValueDictionary()
    )
    key = (steps, x.dtype)
    result = shared.get(key)
    if result is None:
        if x_dim is None:
            due = collectives.GradientSum(group)
            result = collectives.AllReduceGradient.apply(x, group, due)
            setattr(result, marks.DUE, due)
        else:
            how = x_dim, inputs.shape[x_dim], group
            result = collectives.AllGatherPartial.apply(x, *how)
            if not torch.compiler.is_compiling():
                collectives.GatheredAgain(x, *how).mark(result)
        shared[key] = result
        if modes.shared is not None and not torch.compiler.is_compiling():
            modes.shared.append(result)
    due = getattr(result, marks.DUE, None)
    if due is not None:
        due.users += 1
    return result, due


def dim_of(placement):
    """The dim that a placement shards, or None."""
    return placement.dim if placement.is_shard() else None
