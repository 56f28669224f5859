"""DTensors as carriers, and the two borders between them and plain tensors.

Plain tensors are whole and equal on the processes of a data shard, so torch's
implicit replication lets them meet DTensors anywhere, and a gradient can reach
a border in either form. `Enter` and `Leave` take both.
"""

import contextlib
import functools
import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate

from keras.src.backend.common.masking import get_keras_mask
from keras.src.backend.common.masking import set_keras_mask
from keras.src.backend.torch.distribution import private


@functools.lru_cache(maxsize=4096)
def _spec(mesh, mesh_id, placements, shape, dtype):
    # Meshes of another process group may be equal, but are not the same.
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    meta = private.TensorMeta(torch.Size(shape), tuple(reversed(stride)), dtype)
    return private.DTensorSpec(mesh, placements, tensor_meta=meta)


def wrap(local, mesh, placements, shape, kind=DTensor):
    """A DTensor around a local shard. Does not communicate, nor check.

    Args:
        local: this process's shard.
        mesh: torch mesh.
        placements: tuple, one placement for each axis of `mesh`.
        shape: tuple, the global shape.
        kind: the class of the result.
    """
    spec = _spec(mesh, id(mesh), tuple(placements), tuple(shape), local.dtype)
    local = local.contiguous()  # As the strides of the specification say.
    return kind(local, spec, requires_grad=local.requires_grad)


def replicate(mesh):
    """The placements of a whole tensor."""
    return (Replicate(),) * mesh.ndim


def keep_mask(y, x, function=lambda mask: mask):
    """Gives `y`, which was made of `x`, the Keras mask of `x`.

    Args:
        y: tensor.
        x: tensor.
        function: what was done to `x`, for its mask.

    Returns:
        `y`.
    """
    mask = get_keras_mask(x)
    if mask is not None:
        set_keras_mask(y, function(mask))
    return y


def local_of(x):
    """The local shard of a DTensor, without autograd; shares its memory."""
    return private.local_tensor(x)


def is_weight(x):
    """Whether a tensor is a weight as it is stored (`weights.ShardedTensor`),
    which has a way of its own with torch's functions."""
    return isinstance(x, DTensor) and hasattr(type(x), "sharding")


def is_whole(x):
    """Whether every process holds all of a DTensor."""
    # Not `is_shard`: a strided shard says False to it, and is not whole.
    return all(p.is_replicate() for p in x.placements)


def summed(x):
    """A DTensor without partial sums.

    Collective along the axes where `x` is partial.
    """
    if any(p.is_partial() for p in x.placements):
        x = Sum.apply(x)
    return x


def reduced(x):
    """A DTensor without partial sums, and without strided shards.

    Collective along the axes where `x` is partial or strided.
    """
    x = summed(x)
    for axis, placement in enumerate(x.placements):
        # Of a dim that a reshape has merged, DTensor makes a strided shard.
        # Nobody but DTensor can read it: it is none for `is_shard`.
        if not (placement.is_shard() or placement.is_replicate()):
            placements = list(x.placements)
            placements[axis] = Replicate()
            x = x.redistribute(placements=placements)
    return x


class Sum(torch.autograd.Function):
    """Partial sums, or means, become whole.

    Backward: the gradient of each addend is that of the whole, whatever the
    addends are of. (torch's own makes a partial gradient an addend of the
    same kind, and fails where a sum would have to become a mean.)
    """

    @staticmethod
    def forward(ctx, x):
        ctx.placements = [
            Replicate() if p.is_partial() else p for p in x.placements
        ]
        ctx.mesh = x.device_mesh
        return x.redistribute(placements=ctx.placements)

    @staticmethod
    def backward(ctx, grad):
        if not isinstance(grad, DTensor):
            grad = enter_whole(grad, ctx.mesh)
        if list(grad.placements) != ctx.placements:
            grad = grad.redistribute(placements=ctx.placements)
        return grad


def has_unlike_shards(x):
    """Whether processes hold shards of different sizes."""
    shards = {}  # by dim
    for axis, placement in enumerate(x.placements):
        if placement.is_shard():
            n = shards.get(placement.dim, 1) * x.device_mesh.size(axis)
            shards[placement.dim] = n
    return any(x.shape[dim] % n for dim, n in shards.items())


def has_empty_shard(x):
    """Whether some process holds nothing of a DTensor."""
    sizes = {}  # of the smallest shard, by dim
    for axis, placement in enumerate(x.placements):
        if placement.is_shard():
            shards = x.device_mesh.size(axis)
            size = sizes.get(placement.dim, x.shape[placement.dim])
            # Shards have a size of ceil(size / shards) but for the last ones.
            sizes[placement.dim] = size - (shards - 1) * -(-size // shards)
            if size and sizes[placement.dim] <= 0:
                return True
    return False


class Enter(torch.autograd.Function):
    """A local shard becomes a DTensor."""

    @staticmethod
    def forward(ctx, local, mesh, placements, shape):
        ctx.mesh, ctx.placements, ctx.shape = mesh, tuple(placements), shape
        return wrap(local.view_as(local).detach(), mesh, placements, shape)

    @staticmethod
    def backward(ctx, grad):
        # Under `create_graph=True`, in grad mode, each border is the other's
        # gradient.
        again = torch.is_grad_enabled()
        if not isinstance(grad, DTensor):
            # Plain tensors are whole: let every axis take its own part.
            if ctx.placements == replicate(ctx.mesh):
                return grad, None, None, None
            grad = enter_whole(grad, ctx.mesh)
        if tuple(grad.placements) != ctx.placements:
            grad = grad.redistribute(placements=ctx.placements)
        return Leave.apply(grad) if again else local_of(grad), *(None,) * 3


class Leave(torch.autograd.Function):
    """A DTensor becomes its local shard."""

    @staticmethod
    def forward(ctx, x):
        ctx.mesh, ctx.placements = x.device_mesh, tuple(x.placements)
        ctx.shape = tuple(x.shape)
        local = local_of(x)
        # A new tensor, no view of an input: layers write into what they get.
        return local.clone() if is_whole(x) else local.view_as(local)

    @staticmethod
    def backward(ctx, grad):
        if isinstance(grad, DTensor):
            if tuple(grad.placements) == ctx.placements:
                return grad
            return grad.redistribute(placements=ctx.placements)
        enter = Enter.apply if torch.is_grad_enabled() else wrap
        return enter(grad.contiguous(), ctx.mesh, ctx.placements, ctx.shape)


def enter_whole(x, mesh):
    """A tensor that is equal on all processes of a mesh, as a DTensor.

    Its gradient becomes plain where a graph is made, and only there.
    """
    enter = Enter.apply if torch.is_grad_enabled() else wrap
    return enter(x, mesh, replicate(mesh), tuple(x.shape))


def whole(x):
    """A plain, whole tensor; anything but a DTensor is returned as it is.

    Collective along the axes where `x` is sharded or partial.
    """
    if not isinstance(x, DTensor):
        return x
    if is_weight(x):
        return x.whole()
    x = reduced(x)
    if not is_whole(x):
        x = x.redistribute(placements=replicate(x.device_mesh))
    return Leave.apply(x)


class ImplicitReplication:
    """Plain tensors may meet DTensors as long as this object is kept."""

    def __init__(self):
        private.allow_implicit_replication(True)
        weakref.finalize(self, private.allow_implicit_replication, False)


@contextlib.contextmanager
def implicit_replication():
    """Within it, plain tensors may meet DTensors."""
    previous = private.implicit_replication()
    private.allow_implicit_replication(True)
    try:
        yield
    finally:
        private.allow_implicit_replication(previous)
