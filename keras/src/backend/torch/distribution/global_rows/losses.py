"""Rules of torch's losses."""

import torch
from torch.nn import functional as F

from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.global_rows.table import align
from keras.src.backend.torch.distribution.global_rows.table import bind
from keras.src.backend.torch.distribution.global_rows.table import rule
from keras.src.backend.torch.distribution.global_rows.table import with_tensors


@rule(
    """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy
    binary_cross_entropy_with_logits soft_margin_loss"""
)
def losses(func, args, kwargs):
    """Means and sums of losses of single numbers."""
    names = {
        "smooth_l1_loss": "input target size_average reduce reduction beta",
        "huber_loss": "input target reduction delta weight",
        "binary_cross_entropy": (
            "input target weight size_average reduce reduction"
        ),
        "binary_cross_entropy_with_logits": (
            "input target weight size_average reduce reduction pos_weight"
        ),
    }.get(func.__name__, "input target size_average reduce reduction weight")
    bound = bind(names, args, kwargs)
    if bound is None or len(bound) < 2:
        return NotImplemented
    reduction = bound.pop("reduction", "mean")
    bound = {k: v for k, v in bound.items() if v is not None}
    if not bound.keys() <= {
        "input",
        "target",
        "weight",
        "pos_weight",
        "delta",
        "beta",
    } or (
        "weight" in bound
        and func.__name__
        not in ("binary_cross_entropy", "binary_cross_entropy_with_logits")
    ):
        return NotImplemented
    x, target = bound.pop("input"), bound.pop("target")
    others = [v for v in bound.values() if isinstance(v, torch.Tensor)]
    operands = [x, target, *others]
    if not all(isinstance(v, torch.Tensor) for v in (x, target)):
        return NotImplemented
    if not any(map(is_rows, operands)) or x.shape != target.shape:
        return NotImplemented
    if any(v.ndim > x.ndim for v in others):
        return NotImplemented
    aligned = align(operands, x.ndim)
    if aligned is None:
        return NotImplemented
    rows, at, local = aligned
    _, bound = with_tensors((), bound, local[2:])
    y = func(*local[:2], reduction="none", **bound)
    y = GlobalTensor(y, at, rows)
    if reduction == "none":
        return y
    return getattr(torch, reduction)(y)


@rule("cross_entropy nll_loss")
def class_losses(func, args, kwargs):
    """Of classes in dim 1, with no weights of them."""
    names = "input target weight size_average ignore_index reduce reduction"
    if func.__name__ == "cross_entropy":
        names += " label_smoothing"
    bound = bind(names, args, kwargs)
    if bound is None or func not in (F.cross_entropy, F.nll_loss):
        return NotImplemented
    bound = {k: v for k, v in bound.items() if v is not None}
    reduction = bound.pop("reduction", "mean")
    if {"weight", "size_average", "reduce"} & bound.keys():
        return NotImplemented
    x, target = bound.pop("input"), bound.pop("target")
    if not is_rows(x) or x.at or x.ndim < 2 or not target.ndim:
        return NotImplemented
    if x.rows.has_empty:
        return NotImplemented
    if target.shape[0] != x.rows.total or reduction == "none" and x.ndim < 2:
        return NotImplemented
    target = carrier.cut_rows(target, 0, x.rows)
    if reduction == "none":
        y = func(x.local, target, reduction="none", **bound)
        return GlobalTensor(y, 0, x.rows)
    y = func(x.local, target, reduction="sum", **bound)
    y = carrier.addend(y, x.rows)
    if reduction == "sum":
        return y
    if target.is_floating_point():
        return y / (x.numel() // x.shape[1])
    valid = (target != bound.get("ignore_index", -100)).sum()
    return y / whole(carrier.addend(valid.to(y.dtype), x.rows))
