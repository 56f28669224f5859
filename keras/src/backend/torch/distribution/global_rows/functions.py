"""Rules of torch's neural functions, losses, draws, and questions."""

import torch
from torch.nn import functional as F

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.batch import batch_norm as batch_norms
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_addend
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import leaf_of_all
from keras.src.backend.torch.distribution.global_rows.carrier import local_of
from keras.src.backend.torch.distribution.global_rows.carrier import map_tensors
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.global_rows.table import align
from keras.src.backend.torch.distribution.global_rows.table import bind
from keras.src.backend.torch.distribution.global_rows.table import rule
from keras.src.backend.torch.distribution.global_rows.table import with_tensors

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


# ---- losses ------------------------------------------------------------------


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


# ---- questions ---------------------------------------------------------------


@rule(
    """
    new_empty new_full new_ones new_tensor new_zeros is_floating_point
    is_complex is_signed element_size result_type get_device
    is_contiguous is_inference is_conj is_neg is_pinned is_shared
    """
)
def question(func, args, kwargs):
    """What is the same for local rows as for all."""
    args, kwargs = map_tensors(local_of, (args, kwargs))
    return func(*args, **kwargs)


# What local rows say of all.
OF_ALL = """
    device dtype grad_dtype grad_fn is_cpu is_cuda is_ipu is_leaf is_maia
    is_meta is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse
    is_sparse_csr is_vulkan is_xla is_xpu itemsize layout name output_nr
    requires_grad retains_grad volatile _backward_hooks _grad_fn _version
"""
OF_ALL = frozenset(OF_ALL.split())


@rule("__get__")
def attribute(func, args, kwargs):
    name = func.__self__.__name__
    x = args[0]
    if name == "data" and is_global(x):
        # Not `data` of ours: what was gathered must know of writes into it.
        return GlobalTensor(x.local.detach(), x.at, x.rows)
    if name == "nbytes":
        return x.numel() * x.dtype.itemsize
    return func(x.local) if name in OF_ALL else NotImplemented


@rule("__set__")
def set_attribute(func, args, kwargs):
    x, value = args
    if func.__self__.__name__ == "data" and is_global(x):
        if is_rows(x):
            x.local.data = carrier.cut_rows(value, x.at, x.rows)
        elif is_addend(value):
            x.local.data = value.local
        else:
            x.local.data = carrier.part_of(whole(value), x.rows)
        x._whole = None
        return None
    # A box among what torch itself holds would not be seen through.
    return func(whole(x), whole(value))


@rule("__dir__")
def of_the_box(func, args, kwargs):
    with private.as_torch_has_it():
        return func(*args, **kwargs)


@rule("is_same_size")
def is_same_size(func, args, kwargs):
    return args[0].shape == args[1].shape


# ---- autograd ----------------------------------------------------------------


@rule("register_hook retain_grad")
def hooked(func, args, kwargs):
    """Hooks of user code see the gradient of all rows, or of a sum."""
    x, *hooks = args
    if not is_global(x):
        return NotImplemented
    if not hooks:
        return func(x.local)
    shards = carrier.shards_of(x.rows)

    def hook(grad):
        grad = grad / shards
        y = hooks[0](grad if x.at is None else x.like(grad))
        if y is None:
            return None
        y = whole(y) if x.at is None else carrier.cut_rows(y, x.at, x.rows)
        return y * shards

    return func(x.local, hook)


@rule("register_post_accumulate_grad_hook")
def hooked_after(func, args, kwargs):
    x, hook = args
    if not is_rows(x):
        return NotImplemented
    return func(x.local, lambda _: hook(x))


@rule("grad")
def autograd_grad(func, args, kwargs):
    """What one device gets: of local rows, and of whole tensors.

    Collective along the data axis for whole tensors.
    """
    if func is not torch.autograd.grad:
        return NotImplemented
    names = (
        "outputs inputs grad_outputs retain_graph create_graph only_inputs "
        "allow_unused is_grads_batched materialize_grads"
    )
    bound = bind(names, args, kwargs)
    if bound is None or bound.get("is_grads_batched"):
        return NotImplemented

    def as_tuple(x):
        return (x,) if isinstance(x, torch.Tensor) else tuple(x)

    outputs, inputs = map(as_tuple, (bound.pop("outputs"), bound.pop("inputs")))
    given = bound.pop("grad_outputs", None)
    given = (None,) * len(outputs) if given is None else as_tuple(given)
    rows = next(x.rows for x in (*outputs, *inputs) if is_global(x))
    shards = carrier.shards_of(rows)
    losses = [_loss_of(x, g) for x, g in zip(outputs, given)]
    grads = func(
        [x for x, _ in losses],
        [x.local if is_global(x) else x for x in inputs],
        [g for _, g in losses],
        **bound,
    )
    return tuple(_of_input(x, g, shards, rows) for x, g in zip(inputs, grads))


def is_global(x):
    """Whether a tensor stands for one of all rows."""
    return is_rows(x) or is_addend(x)


def _loss_of(x, grad):
    """What backward begins with on this process, and its gradient."""
    if not is_rows(x):
        if grad is None:
            return carrier.of_loss(x), None
        if is_addend(x):
            return x.local, whole(grad) * carrier.shards_of(x.rows)
        return whole(x), whole(grad)
    if grad is None:
        if x.numel() != 1:
            raise RuntimeError(
                "grad can be implicitly created only for scalar outputs. "
                f"Received: a tensor of shape {tuple(x.shape)}"
            )
        grad = torch.ones(x.shape, dtype=x.dtype, device=x.device)
    grad = carrier.cut_rows(grad, x.at, x.rows)
    return x.local, grad * carrier.shards_of(x.rows)


def _of_input(x, grad, shards, rows):
    if grad is None:
        return None
    if is_rows(x):
        return x.like(grad / shards)
    if is_addend(x):
        return grad / shards  # As our addend has it, so has the sum.
    if hasattr(x, marks.REDUCED) or type(x) not in (
        torch.Tensor,
        torch.nn.Parameter,
    ):
        return grad  # By a hook.
    return whole(carrier.addend(grad / shards, rows))
