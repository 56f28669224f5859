"""Losses of targets `y` and predictions `p`, both `(rows, CLASSES)`."""

import numpy as np
import torch

import keras
from integration_tests.user_code.running import note
from integration_tests.user_code.running import squares
from keras import ops


def few(y):
    """Some of the rows, at least one."""
    return max(1, int(0.7 * len(y)))


SIZES = {
    "len": lambda y, p: squares(y, p).sum() / len(y),
    "shape": lambda y, p: squares(y, p).sum() / y.shape[0],
    "negative shape": lambda y, p: squares(y, p).sum() / y.shape[-2],
    "size": lambda y, p: squares(y, p).sum() / p.size(0),
    "size of all": lambda y, p: squares(y, p).sum() / p.size()[0],
    "ops.shape": lambda y, p: ops.sum(squares(y, p)) / ops.shape(y)[0],
    "ops.size": lambda y, p: ops.sum(squares(y, p)) / ops.size(y),
    "numel": lambda y, p: squares(y, p).sum() / y.numel(),
    "shape.numel": lambda y, p: squares(y, p).sum() / y.shape.numel(),
    "product of shape": lambda y, p: squares(y, p).sum() / np.prod(p.shape),
    "tensor of a size": lambda y, p: (
        squares(y, p).sum() / torch.tensor(float(y.shape[0]))
    ),
    "ones like": lambda y, p: squares(y, p).sum() / torch.ones_like(y).sum(),
    "square of a size": lambda y, p: squares(y, p).sum() / len(y) ** 2 * 3,
    "root of a size": lambda y, p: squares(y, p).sum() / np.sqrt(len(y)) / 3,
    "unpacked shape": lambda y, p: [
        squares(y, p).sum() / (n * k) for n, k in [y.shape]
    ][0],
    "noted size": lambda y, p: (note(len(y)), squares(y, p).mean())[1],
    "stride and layout": lambda y, p: (
        squares(y, p).mean() * (1 + p.stride(0)) * p.is_contiguous() / 4
    ),
    "year": lambda y, p: (
        (torch.round(y * 5) + 2018.0 - 2018.0) % 3 * squares(y, p)
    ).mean(),
    "primes": lambda y, p: (squares(y, p) * 1009 / 1013 * 89 / 83).mean(),
    "size of a constant": lambda y, p: (
        squares(y, p).mean() * torch.ones(2018).sum() / 2018
    ),
}
SLICES = {
    "half": lambda y, p: squares(
        y[: (len(y) + 1) // 2], p[: (len(y) + 1) // 2]
    ).mean(),
    "seven of ten": lambda y, p: squares(y[: few(y)], p[: few(y)]).mean(),
    "every other": lambda y, p: squares(y[::2], p[::2]).mean(),
    "every third from the second": lambda y, p: (
        squares(y[1::3], p[1::3]).sum() / len(y)
    ),
    "neighbours": lambda y, p: (
        squares(y, p).mean() + squares(p[1:], p[:-1]).sum() / len(y)
    ),
    "last": lambda y, p: squares(y[-1], p[-1]).mean() + squares(y, p).mean(),
    "first": lambda y, p: squares(y[0], p[0]).mean() + squares(y, p).mean(),
    "first three": lambda y, p: squares(y[:3], p[:3]).mean(),
    "but the first": lambda y, p: squares(y[1:], p[1:]).sum() / 3,
    "ellipsis": lambda y, p: squares(y[..., 0], p[..., 1]).mean(),
    "new axis": lambda y, p: squares(y[:, None, :2], p[:, :2, None]).mean(),
    "list of rows": lambda y, p: squares(y[[0, -1]], p[[0, -1]]).mean(),
    "row and column": lambda y, p: squares(y[0, 1], p[-1, 2]),
    "halves compared": lambda y, p: (
        squares(p[: len(p) // 2], p[-(len(p) // 2) or len(p) :]).sum() / len(y)
    ),
    "narrow": lambda y, p: squares(
        y.narrow(0, 0, few(y)), p.narrow(0, len(y) - few(y), few(y))
    ).mean(),
    "split": lambda y, p: sum(
        squares(a, b).mean() for a, b in zip(y.split(2), p.split(2))
    ),
    "chunk": lambda y, p: torch.chunk(squares(y, p), 2)[0].mean(),
    "tensor_split": lambda y, p: (
        torch.tensor_split(squares(y, p), 3)[0].sum() / len(y)
    ),
    "select": lambda y, p: squares(y, p).select(0, len(y) // 2).mean(),
    "unfold": lambda y, p: squares(y, p).unfold(0, 1, 2).mean(),
    "as_strided": lambda y, p: (
        squares(y, p).contiguous().as_strided((len(y),), (3,)).mean()
    ),
    "diagonal": lambda y, p: squares(y, p).diagonal().mean(),
    "tail": lambda y, p: squares(y, p).flatten()[-2:].mean(),
    "ops.slice": lambda y, p: ops.mean(
        ops.slice(squares(y, p), (0, 0), (few(y), 2))
    ),
    "ops.take": lambda y, p: ops.mean(
        ops.take(squares(y, p), [0, len(y) - 1], axis=0)
    ),
    "ops.split": lambda y, p: ops.mean(ops.split(squares(y, p), [1])[0]),
    "ops.unstack": lambda y, p: (
        sum(ops.unstack(ops.mean(squares(y, p), axis=1))) / len(y)
    ),
}
ORDERS = {
    "sort": lambda y, p: squares(
        torch.sort(y, dim=0).values, torch.sort(p, dim=0).values
    ).mean(),
    "sort of a row": lambda y, p: squares(ops.sort(y), ops.sort(p)).mean(),
    "argsort": lambda y, p: squares(y[torch.argsort(y[:, 0])], p).mean(),
    "topk": lambda y, p: torch.topk(
        squares(y, p).mean(1), min(2, len(y))
    ).values.mean(),
    "ops.top_k": lambda y, p: ops.mean(
        ops.top_k(ops.mean(squares(y, p), axis=1), few(y))[0]
    ),
    "kthvalue": lambda y, p: (
        squares(y, p).kthvalue(few(y), dim=0).values.mean()
    ),
    "median": lambda y, p: squares(y, p).median(dim=0).values.mean(),
    "median of all": lambda y, p: squares(y, p).median(),
    "ops.median": lambda y, p: ops.mean(ops.median(squares(y, p), axis=0)),
    "quantile": lambda y, p: torch.quantile(
        squares(y, p), 0.3, dim=0, keepdim=True
    ).mean(),
    "ops.quantile": lambda y, p: ops.quantile(squares(y, p), 0.8),
    "cumsum": lambda y, p: ops.cumsum(squares(y, p), axis=0).mean() / len(y),
    "cumprod": lambda y, p: torch.cumprod(torch.tanh(p - y), dim=0).mean(),
    "cummax": lambda y, p: squares(y, p).cummax(dim=0).values.mean(),
    "logcumsumexp": lambda y, p: torch.logcumsumexp(p - y, dim=0).mean(),
    "diff": lambda y, p: (
        torch.diff(p - y, dim=0, prepend=y[:1]).square().mean()
    ),
    "flip": lambda y, p: squares(y, torch.flip(p, [0])).mean(),
    "flip of all dims": lambda y, p: squares(y, p.flip(0, 1)).mean(),
    "flipud": lambda y, p: squares(y, torch.flipud(p)).mean(),
    "fliplr": lambda y, p: squares(y, torch.fliplr(p)).mean(),
    "ops.flip": lambda y, p: ops.mean(squares(y, ops.flip(p))),
    "roll": lambda y, p: squares(y, torch.roll(p, 1, 0)).mean(),
    "roll of a flat tensor": lambda y, p: squares(y, p.roll(2)).mean(),
    "rot90": lambda y, p: squares(y, torch.rot90(p, 2)).mean(),
    "permutation": lambda y, p: squares(
        y, p[torch.arange(len(y) - 1, -1, -1)]
    ).mean(),
    "argmax of rows": lambda y, p: squares(
        y[p[:, 0].argmax()], p[p[:, 0].argmin()]
    ).mean(),
    "ranks": lambda y, p: (
        (y.argsort(dim=0).argsort(dim=0) * squares(y, p)).mean() / len(y)
    ),
    "trapezoid": lambda y, p: torch.trapezoid(squares(y, p), dim=0).mean(),
    "positions": lambda y, p: (
        (torch.arange(len(y))[:, None] * squares(y, p)).mean() / len(y)
    ),
    "ops.arange": lambda y, p: ops.mean(
        ops.expand_dims(ops.cast(ops.arange(ops.shape(y)[0]), "float32"), 1)
        * squares(y, p)
    ),
    "linspace": lambda y, p: (
        torch.linspace(0, 1, len(y))[:, None] * squares(y, p)
    ).sum(),
    "even rows": lambda y, p: squares(y, p)[
        torch.arange(len(y)) % 2 == 0
    ].mean(),
}


REDUCTIONS = {
    "squares": lambda y, p: ops.sum(squares(y, p)) / 10,
    "root": lambda y, p: ops.sqrt(ops.mean(squares(y, p))),
    "mean over rows": lambda y, p: ops.mean(squares(y, p), axis=0),
    "mean of a row": lambda y, p: ops.mean(squares(y, p), axis=-1),
    "mean with keepdims": lambda y, p: squares(y, p).mean(0, keepdim=True),
    "mean of means": lambda y, p: squares(p.mean(0), y.mean(0)).mean(),
    "sum in double": lambda y, p: (squares(y, p).double().sum() / 9).float(),
    "sum of a dtype": lambda y, p: (
        torch.sum(squares(y, p), dim=0, dtype=torch.float64).float() / len(y)
    ),
    "centred": lambda y, p: squares(y - y.mean(0), p - p.mean(0)).mean(),
    "variance": lambda y, p: squares(y, p).mean() + p.var(correction=0),
    "std": lambda y, p: ops.std(p - y) + ops.std(p - y, axis=0).mean(),
    "moments": lambda y, p: sum(ops.moments(y - p, axes=[0, 1])),
    "largest": lambda y, p: ops.max(ops.abs(y - p)),
    "largest of columns": lambda y, p: torch.amax(squares(y, p), 0).mean(),
    "smallest of columns": lambda y, p: squares(y, p).min(dim=0)[0].mean(),
    "aminmax": lambda y, p: sum(torch.aminmax(p - y, dim=0)).square().mean(),
    "logsumexp": lambda y, p: torch.logsumexp(p - y, 0).mean(),
    "logsumexp of all": lambda y, p: ops.logsumexp(p - y),
    "softmax over rows": lambda y, p: (
        ops.softmax(p, axis=0) * squares(y, p)
    ).sum(),
    "log_softmax over rows": lambda y, p: (
        -(y.softmax(0) * p.log_softmax(0)).sum()
    ),
    "product": lambda y, p: torch.prod(torch.tanh(p - y), 0).mean(),
    "nansum": lambda y, p: (
        torch.nansum(torch.where(y > 0.3, squares(y, p), torch.nan)) / 9
    ),
    "sum of a product of sums": lambda y, p: (p.sum(0) * y.sum(0)).sum() / 99,
    "fraction": lambda y, p: (y - p).abs().sum() / y.abs().sum(),
    "of shares": lambda y, p: (y - p).abs().mean() / (1 + p.abs().mean()),
    "harmonic": lambda y, p: 1 / (1 / (0.1 + squares(y, p))).mean(),
    "geometric": lambda y, p: (0.1 + squares(y, p)).log().mean().exp(),
    "count": lambda y, p: (
        squares(y, p).sum() / torch.count_nonzero(torch.sign(y) - 1)
    ),
    "three sums": lambda y, p: (
        (p.sum() ** 2 + p.sum(0).prod() + p.sum(1).square().sum()) / 1e3
    ),
    "dice": lambda y, p: (
        1 - (2 * (y * p).sum() + 1) / (y.square().sum() + p.square().sum() + 1)
    ),
}


def for_each_row(y, p):
    total = 0.0
    for i, (target, value) in enumerate(zip(y, p)):
        total = total + squares(target, value).mean() * (i + 1)
    return total / len(y)


def by_recursion(y, p):
    state = torch.zeros(3)
    for i in range(len(y)):
        state = torch.tanh(state + p[i] - y[i])
    return state.square().mean()


def halving(y, p):
    value = squares(y, p).sum()
    while value > 1.0:
        value = value / 2
    return value


def through_numpy(y, p):
    order = np.argsort(y.detach().cpu().numpy()[:, 0])
    return squares(y[order.copy()], p).mean()


def branch(y, p):
    loss = squares(y, p).mean()
    if float(y.mean()) > 0.0321:
        return loss * 2
    return loss


def branches_on_rows(y, p):
    rows = [r if (r > 0.1234).any() else r * 2 for r in p - y]
    return torch.stack(rows).square().mean()


def temperatures(y, p):
    scale = p.detach().std(correction=0).item()
    return squares(y, p).mean() / (1 + scale)


NUMBERS = {
    "item": lambda y, p: squares(y, p).mean() / (1 + y.abs().max().item()),
    "float": lambda y, p: squares(y, p).mean() * float(y.abs().mean()),
    "int": lambda y, p: squares(y, p).sum() / (1 + int((y > 0).sum())),
    "bool": lambda y, p: squares(y, p).mean() * (2 - bool((y > 1.111).any())),
    "if of a tensor": lambda y, p: (
        squares(y, p).mean() if y.sum() > 0.123 else (y - p).abs().mean()
    ),
    "maximum of numbers": lambda y, p: max(
        squares(y[:, 0], p[:, 0]).mean(), squares(y[:, 1], p[:, 1]).mean()
    ),
    "tolist": lambda y, p: (
        torch.tensor(y.tolist()).square().mean() * squares(y, p).mean()
    ),
    "sum of Python": lambda y, p: sum(squares(y, p).mean(1)) / len(y),
    "format": lambda y, p: (
        squares(y, p).mean() * len(f"{float(y.abs().sum()):.0f}")
    ),
    "numpy of targets": lambda y, p: (
        squares(y, p).mean() * float(np.abs(y.cpu().numpy()).mean())
    ),
    "numpy weights": lambda y, p: (
        squares(y, p) * torch.as_tensor(np.abs(np.asarray(y.cpu())))
    ).mean(),
    "numpy of predictions": lambda y, p: (
        squares(y, p).mean() * np.cosh(p.detach().cpu().numpy()).mean()
    ),
    "ops.convert_to_numpy": lambda y, p: ops.mean(
        squares(y, p) * ops.convert_to_tensor(ops.convert_to_numpy(y) > 0)
    ),
    "in": lambda y, p: squares(y, p).mean() * (1 + (y[0, 0] in y)),
    "unpacked rows": lambda y, p: squares(
        torch.stack([*y]), torch.stack([*p])
    ).mean(),
    "reversed": lambda y, p: squares(torch.stack(list(reversed(y))), p).mean(),
    "unbind": lambda y, p: (
        sum(squares(a, b).sum() for a, b in zip(y.unbind(), p.unbind()))
        / len(y)
    ),
    "divmod": lambda y, p: squares(y, p).mean() * (1 + divmod(len(y), 3)[1]),
    "keras noise": lambda y, p: squares(
        y, p + 0.1 * keras.random.normal(ops.shape(p), seed=3)
    ).mean(),
}
for function in (
    for_each_row,
    by_recursion,
    halving,
    through_numpy,
    branch,
    branches_on_rows,
    temperatures,
):
    NUMBERS[function.__name__] = function
