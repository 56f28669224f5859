"""Rules of autograd: hooks, and `torch.autograd.grad`."""

import torch

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows.carrier import is_addend
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.global_rows.table import bind
from keras.src.backend.torch.distribution.global_rows.table import rule


@rule("register_hook retain_grad")
def hooked(func, args, kwargs):
    """Hooks of user code see the gradient of all rows, or of a sum."""
    x, *hooks = args
    if not carrier.is_global(x):
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
    rows = next(x.rows for x in (*outputs, *inputs) if carrier.is_global(x))
    shards = carrier.shards_of(rows)
    losses = [_loss_of(x, g) for x, g in zip(outputs, given)]
    grads = func(
        [x for x, _ in losses],
        [x.local if carrier.is_global(x) else x for x in inputs],
        [g for _, g in losses],
        **bound,
    )
    return tuple(_of_input(x, g, shards, rows) for x, g in zip(inputs, grads))


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
