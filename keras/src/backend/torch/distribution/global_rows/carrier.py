"""A batch that is spread over data shards, and looks whole: `GlobalTensor`.

Its shape is global. It holds local rows in some dim, or our addend of a sum
over data shards that nobody has needed yet. Each torch function that is handed
one goes through the table (see `table`): it runs on local rows where that gives
our rows of what one device computes, and otherwise on all rows, gathered. A
plain tensor is whole, and equal on all processes.

Autograd sees plain local tensors, and two functions that communicate, `Sum` and
`Gather`. The loss of a data shard is its addend, times the number of shards,
since gradients are the mean over data shards (see `rows`): so all gradients on
a shard are of sum_j loss_j, and backward of a sum is a sum.
"""

import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.batch import gathers
from keras.src.backend.torch.distribution.mesh import rows as rows_lib
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded

# On local rows of a gradient that user code was handed: the gradient of which
# they are a part. What is written into them is written into it.


class Sum(torch.autograd.Function):
    """Sum of the addends of data shards; backward: the same of gradients.

    Collective, forward and backward: every process of `group`.
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        if x.is_sparse:  # A gradient of an embedding.
            x = x.to_dense()
        else:
            x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return Sum.apply(collectives.whole_gradient(grad), ctx.group), None


class Gather(torch.autograd.Function):
    """All rows in a dim, from local ones; backward: local rows of the sum.

    Collective, forward and backward: every process of `rows.group`.
    """

    @staticmethod
    def forward(ctx, x, dim, rows):
        ctx.dim, ctx.rows = dim, rows
        y = gathered(x, dim, rows)
        # Autograd lets nobody write into a view that a function returns.
        return y.clone() if y._is_view() else y

    @staticmethod
    def backward(ctx, grad):
        grad = Sum.apply(collectives.whole_gradient(grad), ctx.rows.group)
        return ctx.rows.cut(grad, ctx.dim), None, None


def gathered(x, dim, rows):
    """All rows in a dim, from local ones, without autograd.

    Collective: every process of `rows.group` calls it.
    """
    if not dim:
        return gathers.gather_parts(x.contiguous(), rows, rows.group)
    x = x.movedim(dim, 0).contiguous()
    x = gathers.gather_parts(x, rows, rows.group)
    return x.movedim(0, dim).contiguous()


class GlobalTensor(torch.Tensor):
    """See above. Autograd's graph is that of `local`, not of this box.

    Attributes:
        local: tensor with local rows, or our addend; plain, or a DTensor of the
            model mesh. A process without rows has none.
        at: the dim of the rows, None for an addend.
        rows: `rows.Rows`.
    """

    holds_global_rows = True
    # What computes the whole value, of a result that is put off: see `result`.
    pending = None

    @staticmethod
    def __new__(cls, local, at, rows, shape=None):
        if shape is None:
            shape = local.shape
            if at is not None:
                shape = (*shape[:at], rows.total, *shape[at + 1 :])
        x = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device
        )
        x.local, x.at, x.rows = local, at, rows
        x._whole = None
        x._global_shape = torch.Size(shape)
        return x

    def __init__(self, *args, **kwargs):
        pass

    # As properties of Python they take a tenth of the time.
    shape = property(lambda self: self._global_shape)
    ndim = property(lambda self: len(self._global_shape))
    dtype = property(lambda self: self.local.dtype)
    device = property(lambda self: self.local.device)
    layout = property(lambda self: self.local.layout)
    is_meta = property(lambda self: False)
    is_leaf = property(lambda self: self.local.is_leaf)
    grad_fn = property(lambda self: self.local.grad_fn)
    requires_grad = property(
        lambda self: self.local.requires_grad,
        lambda self, value: self.local.requires_grad_(value),
    )
    T = property(lambda self: self.permute(*reversed(range(self.ndim))))
    mT = property(lambda self: self.transpose(-1, -2))

    @property
    def grad(self):
        grad = self.local.grad
        if grad is None:
            return None
        local = grad / shards_of(self.rows)
        if self.at is None:
            return local  # As our addend has it, so has the sum.
        setattr(local, marks.GRADIENT, (grad, self.rows))
        return self.like(local)

    @grad.setter
    def grad(self, value):
        if value is not None:
            value = cut_rows(value, self.at, self.rows) * shards_of(self.rows)
        self.local.grad = value

    def like(self, local):
        """Other numbers for the same rows, in the same dim."""
        return GlobalTensor(local, self.at, self.rows)

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self):
        return self.ndim

    def ndimension(self):
        return self.ndim

    def numel(self):
        return math.prod(self.shape)

    nelement = numel

    def __len__(self):
        if not self.ndim:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __hash__(self):
        return id(self)

    def __repr__(self, *, tensor_contents=None):
        # Printing must not communicate: often only one process prints.
        what = "our addend" if self.at is None else f"local rows, dim {self.at}"
        return f"GlobalTensor(shape={tuple(self.shape)}, {what}={self.local})"

    def requires_grad_(self, requires_grad=True):
        self.local.requires_grad_(requires_grad)
        return self

    def backward(self, gradient=None, *args, **kwargs):
        """As torch's, of the global value.

        Collective along the data axis: every process of it calls it.
        """
        if gradient is None and self.numel() != 1:
            raise RuntimeError(
                "grad can be implicitly created only for scalar outputs. "
                f"Received: a tensor of shape {tuple(self.shape)}"
            )
        loss = self if gradient is None else (self * gradient).sum()
        of_loss(loss).backward(None, *args, **kwargs)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return dispatch[0](func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(
            f"{func} was handed a batch that is spread over data shards, by "
            "code that asks no `__torch_function__` of it. Hand it whole "
            "tensors: `x = x.clone().detach()` does not help, "
            "`x = torch.stack(list(x))` does."
        )


# Set by `table`, which stands above.
dispatch = [None]


def local_of(x):
    """What a `GlobalTensor` holds; anything else as it is."""
    return x.local if type(x) is GlobalTensor else x


def shards_of(rows):
    """The number of data shards that have rows of a batch."""
    return len(rows.counts)


def is_rows(x):
    """Whether a tensor holds the local rows of a global one."""
    return type(x) is GlobalTensor and x.at is not None


def is_global(x):
    """Whether a tensor stands for one of all rows."""
    return is_rows(x) or is_addend(x)


def is_addend(x):
    """Whether a tensor holds our addend of a sum over data shards."""
    return type(x) is GlobalTensor and x.at is None and x.pending is None


def addend(local, rows):
    """A sum over data shards that is not added up yet."""
    return GlobalTensor(local, None, rows)


def result(local, compute):
    """A value that is computed when it is needed.

    Args:
        local: tensor like the value.
        compute: function without arguments, collective along the data axis.
    """
    x = GlobalTensor(local.detach(), None, None)
    x.pending = compute
    return x


def part_of(x, rows):
    """What a whole tensor, or number, adds up from: our addend of it."""
    if isinstance(x, torch.Tensor) and not (
        x.is_floating_point() or x.is_complex()
    ):
        return x if rows.index == 0 else torch.zeros_like(x)
    if isinstance(x, (bool, int)):
        return x if rows.index == 0 else 0
    return x / shards_of(rows)


def whole(x):
    """A plain tensor, equal on all processes.

    Collective along the data axis, forward and backward: every process of it
    calls it. What was gathered is kept, and gathered again if the program
    writes into local rows or, for autograd, if it was gathered without.
    """
    if type(x) is not GlobalTensor:
        return x
    if x.pending is not None:
        if x._whole is None:
            keep(x, x.pending())
        return x._whole
    needs_graph = x.local.requires_grad and torch.is_grad_enabled()
    kept = x._whole
    if (
        kept is None
        or x._version_of_local != x.local._version
        or (needs_graph and not kept.requires_grad)
    ):
        local = sharded.whole(x.local)
        if x.at is None:
            kept = Sum.apply(local, x.rows.group)
        elif needs_graph:
            kept = Gather.apply(local, x.at, x.rows)
        else:
            kept = gathered(local.detach(), x.at, x.rows)
        sharded.keep_mask(kept, x, whole)
        keep(x, kept)
    return kept


def keep(x, kept):
    """Keeps what a `GlobalTensor` was gathered to, and when."""
    x._whole = kept
    x._version_of_local, x._version_of_whole = x.local._version, kept._version
    x._graph_of_whole = kept.grad_fn


def of_loss(x):
    """What backward begins with: our loss (see above).

    Collective along the data axis if `x` holds rows.
    """
    if is_rows(x):
        x = whole(x)
    if is_addend(x):
        return x.local * shards_of(x.rows)
    return x


def cut_rows(x, at, rows):
    """Local rows of something global, in dim `at`.

    Collective along the data axis if `x` holds others, forward and backward.
    """
    if is_rows(x) and x.at == at and x.rows is rows:
        return x.local
    return rows.cut(leaf_of_all(whole(x), rows), at)


def leaf_of_all(x, rows):
    """A plain tensor about to meet rows: the gradients of the leafs that it is
    made of, and that nobody else reduces, are made those of all rows.

    Collective along the data axis in backward.
    """
    if x.requires_grad and not isinstance(x, DTensor):
        for leaf in [x] if x.is_leaf else _new_leafs(x):
            if not hasattr(leaf, marks.REDUCED):
                _reduce(leaf, rows)
    return x


def _reduce(leaf, rows):
    setattr(leaf, marks.REDUCED, True)
    leaf.register_hook(
        lambda grad: (
            Sum.apply(collectives.whole_gradient(grad), rows.group)
            / shards_of(rows)
        )
    )


def _new_leafs(x):
    """Leafs of a graph, as far as nobody has asked for them before.

    What is behind a gather or a sum has met rows already.
    """
    nodes, leafs = [x.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is None or marks.REDUCED in node.metadata:
            continue
        node.metadata[marks.REDUCED] = True
        if hasattr(node, "variable"):
            leafs.append(node.variable)
        elif not isinstance(node, (Sum._backward_cls, Gather._backward_cls)):
            nodes += [following for following, _ in node.next_functions]
    return leafs


def map_tensors(function, structure):
    """Applies a function to the tensors of arguments or results."""
    if isinstance(structure, torch.Tensor):
        return function(structure)
    if isinstance(structure, torch.Size):
        return structure
    if isinstance(structure, (list, tuple)):
        new = [map_tensors(function, x) for x in structure]
        if hasattr(structure, "_fields"):
            return type(structure)(*new)
        return type(structure)(new)
    if isinstance(structure, dict):
        return {k: map_tensors(function, x) for k, x in structure.items()}
    return structure


def with_a_row(x, rows):
    """Local rows, or one that is nobody's where we have none: much code fails
    on no rows. Autograd sees it as made of local rows."""
    if rows.local:
        return x
    row = (1, *x.shape[1:])
    # Ones: their logarithms, roots and quotients have gradients.
    one = x.new_zeros(row) if _is_of_indices(x) else x.new_ones(row)
    return torch.cat([x, one])


def _is_of_indices(x):
    return not (x.is_floating_point() or x.dtype is torch.bool)


def on_local_rows(function, tensors, rows):
    """What code that knows about rows gives for them: `GlobalTensor`s.

    Args:
        function: takes local tensors, gives tensors with their rows in dim 0.
        tensors: list of `GlobalTensor`s with these rows in dim 0.
        rows: `rows.Rows`.
    """
    with rows_lib.current_rows(rows):
        outputs = function(*(with_a_row(x.local, rows) for x in tensors))
    return map_tensors(lambda y: from_local(y, rows), outputs)


def from_local(y, rows):
    """The `GlobalTensor` of what has an entry in dim 0 for each local row."""
    x = GlobalTensor(y if rows.local else y[:0], 0, rows)
    return sharded.keep_mask(x, y, lambda mask: from_local(mask, rows))
