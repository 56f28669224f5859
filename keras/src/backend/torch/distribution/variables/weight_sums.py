"""Sums, means and norms of all entries of a weight: of each process one number.

Collective, all of them: every process of the weight's mesh calls it.
"""

import contextlib
import inspect
import threading

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.mesh import together
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import weight_entries


def _sum(x, dim=None, keepdim=False, *, dtype=None):
    if not _is_of_all(x, dim, keepdim):
        return _sum_of_dims(x, dim, keepdim, dtype)
    return _total(torch.sum, x, dtype)


def _sum_of_dims(x, dim, keepdim, dtype):
    """Sums over some dims, without autograd: of shards, added up along the
    axes that cut these dims, and gathered along the others."""
    layout, asks = x.sharding, torch.is_grad_enabled() and x.requires_grad
    dims = (dim,) if isinstance(dim, int) else dim
    if (
        asks
        or not dims
        or layout.is_partial
        or cuts.has_several_on_a_dim(layout.placements)
        or not all(isinstance(d, int) for d in dims)
    ):
        return NotImplemented
    dims = {d % x.ndim for d in dims}
    total = torch.sum(x._local_tensor, tuple(dims), keepdim=True, dtype=dtype)
    if total.dtype not in collectives.SENT:
        return NotImplemented
    levels = laid_out.levels(layout)
    for cut, axis, _ in levels:
        if cut in dims and layout.mesh.size(axis) > 1:
            dist.all_reduce(total, group=layout.mesh.get_group(axis))
    others = [level for level in levels if level[0] not in dims]
    total = laid_out.gather_levels(total, others, layout.mesh)
    return total if keepdim else total.squeeze(tuple(dims))


def are_on_one_mesh(tensors):
    """Whether tensors are weights on one mesh of all processes, or plain, and
    `squared_norms` takes them."""
    meshes = set()
    for x in tensors:
        if sharded.is_weight(x) and not x.sharding.is_partial:
            meshes.add(x.device_mesh)
        elif type(x) not in (torch.Tensor, torch.nn.Parameter):
            return False
    return len(meshes) == 1 and meshes.pop().size() == dist.get_world_size()


def squared_norms(tensors):
    """The sum of squares of each of some gradients, in one small all-reduce.

    Collective, if there are weights among them: every process of their mesh
    calls it.

    Args:
        tensors: weights and plain tensors, on one mesh.

    Returns:
        List of tensors without dims.
    """
    parts = [x._local_tensor if sharded.is_weight(x) else x for x in tensors]
    return add_up([torch.sum(torch.square(x)) for x in parts], tensors)


def add_up(sums, tensors):
    """What each process has added up of its shards, added up over all of them,
    in one all-reduce.

    Of what several processes hold, the first counts.

    Collective, if there are weights among them: every process of their mesh
    calls it.

    Args:
        sums: list of plain tensors, of shapes that are the same on all.
        tensors: for each the weight or plain tensor that it is a sum of, on one
            mesh.

    Returns:
        List of plain tensors, of those shapes and dtypes.
    """
    sums = list(sums)
    of_weights = [i for i, x in enumerate(tensors) if sharded.is_weight(x)]
    if of_weights:
        # Half precision is not added up in half precision.
        dtype = torch.float32
        if any(sums[i].dtype == torch.float64 for i in of_weights):
            dtype = torch.float64
        parts = [
            sums[i].to(dtype).reshape(-1)
            if _counts(tensors[i].sharding)
            else sums[i].new_zeros(sums[i].numel(), dtype=dtype)
            for i in of_weights
        ]
        together = torch.cat(parts)
        dist.all_reduce(together)
        sizes = [part.numel() for part in parts]
        for i, total in zip(of_weights, together.split(sizes)):
            sums[i] = total.view(sums[i].shape).to(sums[i].dtype)
    return sums


def _counts(layout):
    """Whether no process before this one holds the same shard."""
    return all(
        cuts.is_cut(placement) or not layout.mesh.get_local_rank(axis)
        for axis, placement in enumerate(layout.placements)
    )


def _all(x, dim=None, keepdim=False):
    return _truth(torch.all, dist.ReduceOp.MIN, x, dim, keepdim)


def _any(x, dim=None, keepdim=False):
    return _truth(torch.any, dist.ReduceOp.MAX, x, dim, keepdim)


def _truth(func, op, x, dim, keepdim):
    if not _is_of_all(x, dim, keepdim):
        return NotImplemented
    truth = func(x._local_tensor).to(torch.uint8)
    return laid_out.reduce_over_shards(truth, x.sharding, op).to(torch.bool)


def _mean(x, dim=None, keepdim=False, *, dtype=None):
    if not _is_of_all(x, dim, keepdim):
        return NotImplemented
    dtype = dtype or x.dtype
    if not (dtype.is_floating_point or dtype.is_complex) or not x.numel():
        return NotImplemented
    total = _total(torch.sum, x, dtype)
    return total if total is NotImplemented else total / x.numel()


def _total(func, x, dtype):
    # Of an empty shard the sum is zero.
    local = x._local_tensor
    if torch.is_grad_enabled() and x.requires_grad:
        local = laid_out.Local.apply(x)
    total = func(local, dtype=dtype)
    if total.dtype not in collectives.SENT:
        return NotImplemented
    return laid_out.SumOfShards.apply(total, x.sharding)


def _norm(x, ord=None, dim=None, keepdim=False, *, dtype=None):
    """Without autograd: at zero, its gradient is none of a sum of squares."""
    order = 2 if ord in (None, "fro") else ord
    asks = torch.is_grad_enabled() and x.requires_grad
    if asks or not _is_of_all(x, dim, keepdim) or not x.numel():
        return NotImplemented
    if order == float("inf"):
        op = dist.ReduceOp.MAX
    elif order in (1, 2):
        op = dist.ReduceOp.SUM
    else:
        return NotImplemented
    local = x._local_tensor
    if not local.numel():
        local = local.new_zeros(1)
    local = torch.linalg.vector_norm(local, order, dtype=dtype)
    if local.dtype not in collectives.SENT:
        return NotImplemented
    if op == dist.ReduceOp.SUM:
        local = local**order
    total = laid_out.reduce_over_shards(local, x.sharding, op)
    return total if op == dist.ReduceOp.MAX else total ** (1 / order)


def _matrix_norm(x, ord=None, dim=None, keepdim=False, *, dtype=None):
    # Of a matrix, a number as `ord` means another norm.
    if ord is not None and x.ndim != 1:
        return NotImplemented
    return _norm(x, ord, dim, keepdim, dtype=dtype)


def _old_norm(x, p="fro", dim=None, keepdim=False, dtype=None):
    return _norm(x, p, dim, keepdim, dtype=dtype)


def _is_of_all(x, dim, keepdim):
    if keepdim or x.sharding.is_partial:
        return False
    if dim is None or dim == () or dim == []:
        return True
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if not all(isinstance(d, int) for d in dims):
        return False
    return len({d % x.ndim for d in dims}) == x.ndim


def _meet(layout):
    """Tells at once where a process asks alone, behind `if process_id() == 0:`,
    for what all have parts of.

    Within a layer, an update and backward all do the same; of what one data
    shard has whole, it may ask alone.
    """
    if (
        not modes.calls
        and not modes.updates
        and threading.current_thread() is threading.main_thread()
        and layout.mesh.size() == dist.get_world_size()
        and all(
            cuts.is_cut(placement) or layout.mesh.size(axis) == 1
            for axis, placement in enumerate(layout.placements)
        )
    ):
        together.begin("weights that are read")


def _reduction(function):
    signature = inspect.signature(function)

    def reduction(args, kwargs, tracks):
        if "axis" in kwargs:
            kwargs = {**kwargs, "dim": kwargs["axis"]}
            del kwargs["axis"]
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return NotImplemented
        x = args[0] if args else None
        others = (*args[1:], *kwargs.values())
        if not sharded.is_weight(x) or list(weight_entries.tensors_of(others)):
            return NotImplemented
        _meet(x.sharding)
        with contextlib.nullcontext() if tracks else torch.no_grad():
            return function(*args, **kwargs)

    return reduction


REDUCTIONS = {
    "all": _reduction(_all),
    "any": _reduction(_any),
    "sum": _reduction(_sum),
    "mean": _reduction(_mean),
    "norm": _reduction(_old_norm),
    "linalg_norm": _reduction(_matrix_norm),
    "linalg_vector_norm": _reduction(_norm),
}
OF_ONE_NUMBER = {
    "_foreach_norm": torch.linalg.vector_norm,
    "_foreach_max": torch.max,
}
