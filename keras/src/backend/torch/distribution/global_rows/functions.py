"""Rules of torch's neural functions and draws."""

import torch
from torch.nn import functional as F

from keras.src.backend.torch.distribution.batch import batch_norm as batch_norms
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_addend
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import leaf_of_all
from keras.src.backend.torch.distribution.global_rows.carrier import map_tensors
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.global_rows.table import align
from keras.src.backend.torch.distribution.global_rows.table import bind
from keras.src.backend.torch.distribution.global_rows.table import rule

# Functions of each entry of dim 0, and the dims that make that one a batch.
OF_A_BATCH = {
    "adaptive_avg_pool1d": 3,
    "adaptive_avg_pool2d": 4,
    "adaptive_avg_pool3d": 5,
    "avg_pool1d": 3,
    "avg_pool2d": 4,
    "avg_pool3d": 5,
    "conv1d": 3,
    "conv2d": 4,
    "conv3d": 5,
    "conv_transpose1d": 3,
    "conv_transpose2d": 4,
    "conv_transpose3d": 5,
    "group_norm": 3,
    "interpolate": 3,
    "max_pool1d": 3,
    "max_pool2d": 4,
    "max_pool3d": 5,
    "pixel_shuffle": 4,
    "pixel_unshuffle": 4,
    "prelu": 2,
}


@rule(" ".join(OF_A_BATCH))
def of_a_batch(func, args, kwargs):
    x, *rest = args if args else (kwargs.get("input"),)
    if not is_rows(x) or x.at or x.ndim < OF_A_BATCH[func.__name__]:
        return NotImplemented
    if not args or x.rows.has_empty:
        return NotImplemented
    others = (rest, {k: v for k, v in kwargs.items() if k != "input"})
    found = []
    map_tensors(found.append, others)
    if any(type(other) is GlobalTensor for other in found):
        return NotImplemented
    rest, kwargs = map_tensors(lambda w: leaf_of_all(w, x.rows), others)
    y = func(x.local, *rest, **kwargs)
    return map_tensors(lambda y: GlobalTensor(y, 0, x.rows), y)


@rule("layer_norm rms_norm")
def normalized_last(func, args, kwargs):
    """Along the last dims, of which `normalized_shape` says how many."""
    names = "input normalized_shape weight bias eps"
    if func.__name__ == "rms_norm":
        names = "input normalized_shape weight eps"
    bound = bind(names, args, kwargs)
    if bound is None or not is_rows(bound.get("input")):
        return NotImplemented
    x, shape = bound.pop("input"), bound.pop("normalized_shape")
    if x.at >= x.ndim - len(shape) or x.rows.has_empty:
        return NotImplemented
    for name in ("weight", "bias"):
        if is_rows(bound.get(name)):
            return NotImplemented
        if bound.get(name) is not None:
            bound[name] = leaf_of_all(whole(bound[name]), x.rows)
    return x.like(func(x.local, shape, **bound))


@rule("pad")
def padded(func, args, kwargs):
    bound = bind("input pad mode value", args, kwargs)
    if bound is None or not is_rows(bound.get("input")):
        return NotImplemented
    x, pad = bound.pop("input"), bound.pop("pad")
    if not isinstance(pad, (list, tuple)) or x.rows.has_empty:
        return NotImplemented
    if x.at >= x.ndim - len(pad) // 2:
        return NotImplemented
    # Modes other than of a constant take dim 0 for rows.
    if bound.get("mode", "constant") != "constant" and x.at:
        return NotImplemented
    return x.like(func(x.local, pad, **bound))


@rule("cosine_similarity")
def similarity(func, args, kwargs):
    bound = bind("x1 x2 dim eps", args, kwargs)
    if bound is None or type(bound.get("dim", 1)) is not int:
        return NotImplemented
    a, b, dim = bound["x1"], bound["x2"], bound.get("dim", 1)
    ndim = max(a.ndim, b.ndim)
    operands = [whole(x) if is_addend(x) else x for x in (a, b)]
    if not any(map(is_rows, operands)):
        return NotImplemented
    aligned = align(operands, ndim)
    if aligned is None:
        return NotImplemented
    rows, at, local = aligned
    dim %= ndim
    if dim == at or rows.has_empty:
        return NotImplemented
    y = func(*local, dim, bound.get("eps", 1e-8))
    return GlobalTensor(y, at - (dim < at), rows)


@rule("cross linalg_cross")
def cross(func, args, kwargs):
    bound = bind("input other dim", args, kwargs)
    if bound is None:
        return NotImplemented
    operands, dim = [bound["input"], bound.get("other")], bound.get("dim", -1)
    if not all(isinstance(x, torch.Tensor) for x in operands):
        return NotImplemented
    shape = operands[0].shape
    if not any(map(is_rows, operands)) or operands[1].shape != shape:
        return NotImplemented
    if func is not torch.linalg.cross and bound.get("dim") is None:
        # The first dim of three; local rows may be three by chance.
        dim = next((d for d, size in enumerate(shape) if size == 3), None)
    if type(dim) is not int or not -len(shape) <= dim < len(shape):
        return NotImplemented
    aligned = align(operands, len(shape))
    if aligned is None or dim % len(shape) == aligned[1]:
        return NotImplemented
    rows, at, local = aligned
    return GlobalTensor(func(*local, dim=dim), at, rows)


@rule("scaled_dot_product_attention")
def attention(func, args, kwargs):
    names = "query key value attn_mask dropout_p is_causal scale enable_gqa"
    bound = bind(names, args, kwargs)
    if bound is None or bound.get("dropout_p"):
        return NotImplemented
    three = [bound.pop(name) for name in ("query", "key", "value")]
    q = three[0]
    if not is_rows(q) or q.at or q.ndim < 3 or q.rows.has_empty:
        return NotImplemented
    if any(x.ndim != q.ndim or x.shape[0] != q.shape[0] for x in three):
        return NotImplemented
    mask = bound.get("attn_mask")
    if mask is not None:
        if mask.ndim == q.ndim and mask.shape[0] == q.rows.total:
            bound["attn_mask"] = carrier.cut_rows(mask, 0, q.rows)
        elif is_rows(mask):
            return NotImplemented
        else:
            bound["attn_mask"] = leaf_of_all(whole(mask), q.rows)
    three = [carrier.cut_rows(x, 0, q.rows) for x in three]
    return GlobalTensor(func(*three, **bound), 0, q.rows)


# ---- statistics --------------------------------------------------------------


@rule("batch_norm instance_norm")
def batch_norm(func, args, kwargs):
    """torch's, of the statistics of all rows.

    Collective along the data axis in training.
    """
    native = func is torch.batch_norm
    if func not in (F.batch_norm, F.instance_norm) and not native:
        return NotImplemented
    x = args[0] if args else kwargs.get("input")
    if not args or not is_rows(x) or x.at or x.ndim < 2:
        return NotImplemented
    others = (args[1:], kwargs)
    found = []
    map_tensors(found.append, others)
    if any(type(other) is GlobalTensor for other in found):
        return NotImplemented
    if func is F.instance_norm and x.ndim < 3:
        return NotImplemented
    names = ("running_mean", "running_var")
    kept = [*args[3 if native else 1 :][:2], *map(kwargs.get, names)]
    if any(y is not None and y.requires_grad for y in kept):
        return NotImplemented  # torch's error.
    rest, kwargs = map_tensors(lambda w: leaf_of_all(w, x.rows), others)
    function = {
        F.batch_norm: batch_norms.batch_norm,
        F.instance_norm: batch_norms.instance_norm,
        torch.batch_norm: batch_norms.native_batch_norm,
    }[func]
    context = x.rows.context
    return carrier.on_local_rows(
        lambda local: function(context, local, *rest, **kwargs), [x], x.rows
    )


# ---- draws -------------------------------------------------------------------


@rule("rand_like randn_like randint_like dropout")
def drawn(func, args, kwargs):
    """Drawn for all rows, from a generator equal everywhere, and cut."""
    x, *rest = args if args else (None,)
    if not is_rows(x):
        return NotImplemented
    if func.__name__ == "dropout":
        bound = bind("input p training inplace", args, kwargs)
        if bound is None or bound.get("inplace") or x.is_complex():
            return NotImplemented
        if func is not F.dropout or not bound.get("training", True):
            return NotImplemented
        ones = torch.ones(x.shape, dtype=x.dtype, device=x.device)
        mask = F.dropout(ones, bound.get("p", 0.5), True)
        return x.like(x.local * x.rows.cut(mask, x.at))
    all_rows = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = func(all_rows, *rest, **kwargs)
    return x.like(x.rows.cut(y, x.at))
