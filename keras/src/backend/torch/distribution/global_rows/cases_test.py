"""Proof of the table, by hand: what torch's own samples do not ask.

Indices, views and writes, numbers, autograd, lists, and functions whose samples
have no batch. Each is compared with plain torch: see `table_test`.
"""

import copy
import operator
import pickle
import types

import pytest
import torch
from torch.nn import functional as F

from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows import entry_points
from keras.src.backend.torch.distribution.global_rows import table
from keras.src.backend.torch.distribution.global_rows.table_test import BY_HAND
from keras.src.backend.torch.distribution.global_rows.table_test import Addend
from keras.src.backend.torch.distribution.global_rows.table_test import Case
from keras.src.backend.torch.distribution.global_rows.table_test import InRows
from keras.src.backend.torch.distribution.global_rows.table_test import Whole
from keras.src.backend.torch.distribution.global_rows.table_test import check
from keras.src.backend.torch.distribution.global_rows.table_test import (
    has_gradient,
)
from keras.src.backend.torch.distribution.global_rows.table_test import ran
from keras.src.backend.torch.distribution.global_rows.table_test import recorded  # noqa: F401
from keras.src.backend.torch.distribution.global_rows.table_test import seed
from keras.src.backend.torch.distribution.mesh import rows as rows_lib


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def ints(*shape, most=4):
    return torch.randint(0, most, shape)


def cases_of(functions, tensors, world, everywhere=True, addends=True):
    """Cases of functions by name, whose first tensor is spread in all ways.

    Args:
        functions: dict of functions of the tensors.
        tensors: function without arguments, gives a list of tensors.
        world: int, number of processes.
        everywhere: whether rows are put in other dims than 0, too.
        addends: whether the first tensor is an addend, too.
    """
    seed()
    tensors = tensors()
    first, *rest = tensors
    whole = [Whole() for _ in rest]
    cases = []
    for name, function in functions.items():
        for dim in range(first.ndim if everywhere else 1):
            n = first.shape[dim]
            shapes = [rows_lib.split_evenly(n, world, 0).counts]
            shapes.append((0,) * (world - 1) + (n,))
            for counts in shapes:
                cases.append((name, function, [InRows(dim), *whole], counts))
            if n % 2 == 0:
                counts = rows_lib.split_evenly(n // 2, world, 0).counts
                cases.append((name, function, [InRows(dim, 2), *whole], counts))
            for i, other in enumerate(rest):
                for at in {dim, dim - first.ndim + other.ndim}:
                    if 0 <= at < other.ndim and other.shape[at] == n:
                        kinds = [InRows(dim), *whole]
                        kinds[i + 1] = InRows(at)
                        cases.append((name, function, kinds, shapes[0]))
        if addends and has_gradient(first):
            counts = (1,) * world
            cases.append((name, function, [Addend(), *whole], counts))
    cases = [
        Case(name, function, tensors, kinds, [counts, counts])
        for name, function, kinds, counts in cases
    ]
    for case in cases:
        case.may_raise = case.name in MAY_RAISE
    return cases


# What transforms capture they cannot gather; a sum is no leaf.
MAY_RAISE = {
    "grad that captures",
    "hook after",
    "jacrev",
    "vmap",
    "vmap that captures",
}


def written(write):
    """A function that writes into a copy, and shows what became of it."""

    def function(x, *others):
        y = x * 1
        shown = write(y, *others)
        return y if shown is None else (y, shown)

    return function


def on_view(view, write):
    def change(x, *others):
        write(view(x), *others)

    return written(change)


M = torch.tensor([True, False, True, True, False, True])
INDEXING = {
    "int": lambda x: x[1],
    "last": lambda x: x[-1],
    "out of range": lambda x: x[9],
    "slice": lambda x: x[1:4],
    "step": lambda x: x[::2],
    "half": lambda x: x[: len(x) // 2],
    "column": lambda x: x[:, 0],
    "columns": lambda x: x[:, 1:3],
    "none": lambda x: x[None],
    "none inside": lambda x: x[:, None],
    "ellipsis": lambda x: x[..., 0],
    "ellipsis and none": lambda x: x[..., None, 1],
    "all of it": lambda x: x[:],
    "everything": lambda x: x[...],
    "entry": lambda x: x[2, 1],
    "too many": lambda x: x[0, 0, 0, 0, 0],
    "list": lambda x: x[[0, 2, 1]],
    "tensor": lambda x: x[torch.tensor([3, 0])],
    "tensor of a column": lambda x: x[:, torch.tensor([1, 0])],
    "two tensors": lambda x: x[torch.tensor([0, 1]), torch.tensor([1, 2])],
    "mask": lambda x: x[M],
    "mask of values": lambda x: x[x > 0],
    "a number": lambda x: x[True],
    "sorted": lambda x: x[torch.argsort(x[:, 0].sum(-1))],
    "arange": lambda x: x[torch.arange(len(x)), 0],
    "diagonal": lambda x: x[:, :].diagonal(),
    "numpy int": lambda x: x[torch.tensor(1)],
}
WRITES = {
    "int": written(lambda x: x.__setitem__(1, 3.0)),
    "slice": written(lambda x: x.__setitem__(slice(1, 3), 0)),
    "column": written(lambda x: x.__setitem__((slice(None), 0), 2.0)),
    "column of x": written(lambda x: x.__setitem__((slice(None), 0), x[:, 1])),
    "tensor": written(lambda x: x.__setitem__(0, torch.ones(2))),
    "rows": written(lambda x: x.__setitem__(slice(None), x * 2)),
    "mask": written(lambda x: x.__setitem__(x > 0, 0.0)),
    "mask of rows": written(lambda x: x.__setitem__(M, 5.0)),
    "index": written(lambda x: x.__setitem__(torch.tensor([0, 3]), 5.0)),
    "ellipsis": written(lambda x: x.__setitem__((..., 0), 1)),
    "add": written(lambda x: operator.iadd(x, 1) is x),
    "add of itself": written(lambda x: x.add_(x.detach())),
    "mul": written(lambda x: x.mul_(2).add_(1) is x),
    "zero": written(lambda x: x.zero_() is x),
    "fill": written(lambda x: x.fill_(2) is x),
    "copy": written(lambda x: x.copy_(torch.ones(x.shape[-1])) is x),
    "relu": written(lambda x: F.relu(x, inplace=True) * 2),
    "relu by position": written(lambda x: F.relu(x, True) * 2),
    "relu_": written(lambda x: torch.relu_(x) is x),
    "view": on_view(lambda x: x.view(6, -1), lambda x: x.mul_(3)),
    "flat view": on_view(lambda x: x.view(-1), lambda x: x.mul_(3)),
    "reshaped": on_view(lambda x: x.reshape(6, -1), lambda x: x.mul_(3)),
    "transposed": on_view(lambda x: x.transpose(0, 1), lambda x: x[0].mul_(3)),
    "part": on_view(lambda x: x[:, 0], lambda x: x.add_(1)),
    "part of rows": on_view(lambda x: x[1:3], lambda x: x.add_(1)),
    "row": on_view(lambda x: x[2], lambda x: x.zero_()),
    "row set": on_view(lambda x: x[2], lambda x: x.__setitem__(0, 4.0)),
    "narrow": on_view(lambda x: x.narrow(0, 1, 2), lambda x: x.mul_(2)),
    "select": on_view(lambda x: x.select(0, 0), lambda x: x.mul_(2)),
    "chunk": on_view(lambda x: x.chunk(2)[1], lambda x: x.mul_(2)),
    "unbind": on_view(lambda x: x.unbind()[1], lambda x: x.mul_(2)),
    "expand": on_view(lambda x: x.squeeze(), lambda x: x.mul_(2)),
    "unsqueezed": on_view(lambda x: x.unsqueeze(0), lambda x: x.mul_(2)),
    "iterated": on_view(lambda x: list(x)[1], lambda x: x.mul_(2)),
    "T": on_view(lambda x: x.mT, lambda x: x[0].mul_(2)),
    "after gather": written(lambda x: (x.sort(0), x.mul_(2), x[1:3] * 2)[2]),
    "a gathered result": lambda x: x[1:3].clone().mul_(3) + x[1:3],
    "out": written(lambda x: torch.add(x, 1, out=x) is x),
    "scatter": written(
        lambda x: x.scatter_(0, torch.zeros(1, 2, 2, dtype=int), 5.0) is x
    ),
    "index_fill": written(lambda x: x.index_fill_(0, torch.tensor([1]), 0)),
    "index_add": written(
        lambda x: x.index_add_(0, torch.tensor([1]), torch.ones(1, 2, 2)) is x
    ),
    "masked_fill": written(lambda x: x.masked_fill_(x > 0, 0.0) is x),
    "clamp": written(lambda x: x.clamp_(min=0) is x),
    "no_grad": lambda x: no_grad_write(x * 1),
}


def no_grad_write(x):
    with torch.no_grad():
        x += 1
        x[0] = 0
    return x * x.detach()


def set_data(x):
    x = x.detach()
    x.data = x * 2
    return x + 1


def hooked_after(x):
    seen = []
    x.requires_grad_().register_post_accumulate_grad_hook(
        lambda x: seen.append(x.grad * 1)
    )
    (x * x).mean().backward()
    return seen[0]


def attack(x):
    """Steps along the gradient, as of an adversary."""
    delta = torch.zeros_like(x, requires_grad=True)
    for _ in range(3):
        ((x + delta) ** 3).mean().backward()
        delta.data = (delta + 0.1 * delta.grad.sign()).clamp(-0.15, 0.15)
        delta.grad.mul_(0.5)
        torch.nn.utils.clip_grad_norm_([delta], 0.3)
    delta.grad.zero_()
    (x * delta).sum().backward()
    return delta * 1, delta.grad * 1


SHAPES = {
    "flat": lambda x: x.reshape(-1),
    "two": lambda x: x.reshape(6, -1),
    "list": lambda x: x.reshape([2, -1, 2]),
    "half": lambda x: x.reshape(2, 3, 4),
    "keyword": lambda x: torch.reshape(x, shape=(-1, 2)),
    "view": lambda x: x.view(-1, 2),
    "view dtype": lambda x: x.detach().view(torch.int32),
    "bad": lambda x: x.reshape(5, -1),
    "bad two": lambda x: x.reshape(-1, -1),
    "flatten": lambda x: x.flatten(1),
    "flatten all": lambda x: torch.flatten(x),
    "flatten first": lambda x: torch.flatten(x, end_dim=1),
    "unflatten": lambda x: x.unflatten(0, (2, -1)),
    "ravel": lambda x: x.ravel(),
    "one": lambda x: x.reshape(1, 6, 1, -1),
    "size": lambda x: x.reshape(x.size(0), x.size(1) * x.size(2)),
    "shape": lambda x: x.reshape(x.shape[0], -1),
    "as": lambda x: x.reshape_as(torch.ones(6, 4)),
    "there and back": lambda x: x.reshape(-1, 2).view(x.shape),
    "T": lambda x: x.reshape(6, 4).T,
    "mT": lambda x: x.mT,
    "permute": lambda x: x.permute(2, 0, 1),
    "permute list": lambda x: torch.permute(x, dims=[1, 0, 2]),
    "movedim": lambda x: x.movedim([0, 1], [-1, 0]),
    "expand": lambda x: x[None].expand(3, -1, -1, -1),
    "expand list": lambda x: x.expand([2, 6, 2, 2]),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat rows": lambda x: x.repeat(2, 1, 1),
    "repeat more": lambda x: x.repeat(2, 1, 1, 1),
    "tile": lambda x: torch.tile(x, (2,)),
    "tile rows": lambda x: torch.tile(x, (2, 1, 1)),
    "interleave": lambda x: x.repeat_interleave(2, 0),
    "interleave inside": lambda x: x.repeat_interleave(2, dim=1),
    "squeeze": lambda x: x[:, None, :1].squeeze(),
    "squeeze dim": lambda x: x[:, None].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "stack": lambda x: torch.stack([x, x * 2], 1),
    "stack rows": lambda x: torch.stack([x, x], 0),
    "cat rows": lambda x: torch.cat([x, x]),
    "cat inside": lambda x: torch.cat([x, x * 2], dim=-1),
    "cat whole": lambda x: torch.cat([x, torch.ones(6, 2, 2)], 1),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack((x, x)),
    "split": lambda x: x.split(2),
    "split inside": lambda x: torch.split(x, [1, 1], dim=1),
    "split sizes": lambda x: x.split(1, -1),
    "chunk": lambda x: torch.chunk(x, 2, 1),
    "unbind": lambda x: x.unbind(1),
    "flip": lambda x: x.flip(0),
    "flip varargs": lambda x: x.flip(1, 2),
    "flip list": lambda x: torch.flip(x, [1]),
    "roll": lambda x: torch.roll(x, 1),
    "roll inside": lambda x: torch.roll(x, 1, 1),
    "rot90": lambda x: torch.rot90(x),
    "tril": lambda x: torch.tril(x),
    "pad": lambda x: F.pad(x, (1, 2)),
    "pad rows": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "unfold": lambda x: x.unfold(0, 2, 1),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 2)),
    "broadcast": lambda x: torch.broadcast_tensors(x, torch.ones(2, 6, 2, 2)),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0], x[:, 0, 0], indexing="ij"),
    "atleast": lambda x: torch.atleast_3d(x),
    "foreach": lambda x: torch._foreach_mul([x, x + 1], 2.0),
    "foreach norm": lambda x: torch._foreach_norm([x, x[0]]),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "where keywords": lambda x: torch.where(
        condition=x > 0, input=x, other=x * 2
    ),
    "where positions": lambda x: torch.where(x > 0),
    "renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
    "index_select": lambda x: x.index_select(0, torch.tensor([2, 0])),
    "index_select inside": lambda x: torch.index_select(
        x, dim=1, index=torch.tensor([1, 1, 0])
    ),
    "index_select by rows": lambda x: x[0].index_select(
        1, (x[:, 0, 0] > 0).long()
    ),
    "cumsum rows": lambda x: x.cumsum(0),
    "axis": lambda x: torch.sum(x, axis=1, keepdims=True),
    "amax axis": lambda x: torch.amax(x, dim=1),
    "amax rows": lambda x: (x * 0).amax(0) + x.amin(),
    "max": lambda x: (x * 0 + 1).max(),
    "max two": lambda x: torch.max(x, 1),
    "minimum": lambda x: torch.min(x, x * 2),
    "named": lambda x: torch.max(x, dim=0).values,
    "sort": lambda x: torch.sort(x, 1)[0],
    "topk": lambda x: torch.topk(x, 1, dim=-1).values,
    "norm": lambda x: x.norm(dim=-1) + torch.norm(x, 2, 1),
    "norm all": lambda x: x.norm(),
    "linalg": lambda x: torch.linalg.norm(x, dim=-1),
    "nested": lambda x: torch.linalg.vector_norm(x, ord=1, dim=(1, 2)),
    "var": lambda x: (x.var(0), x.std(), torch.var_mean(x, 0, correction=0)),
    "einsum": lambda x: torch.einsum("abc,abd->cd", x, x),
    "einsum dots": lambda x: torch.einsum("...bc->...cb", x),
    "tensordot": lambda x: torch.tensordot(x, x, dims=([0, 1], [0, 1])),
    "matmul T": lambda x: x.flatten(1) @ x.flatten(1).T,
    "cov": lambda x: x.flatten(1).T @ x.flatten(1),
    "cdist": lambda x: torch.cdist(x.flatten(1), x.flatten(1) + 1),
    "half and back": lambda x: x.double().float().half().float(),
    "type": lambda x: (x.type(), x.type(torch.float64)),
    "to": lambda x: x.to(torch.float64).to(x),
    "type_as": lambda x: x.type_as(torch.ones(1).double()),
    "bool": lambda x: (x > 0).all() | (x > 0).any(0).any(),
    "count": lambda x: (x > 0).sum() + (x > 0).int().sum(0),
    "mean of ints": lambda x: (x > 0).long().sum(0).float().mean(),
    "detach": lambda x: x - x.detach().mean(0),
    "data": lambda x: x.data.mean(0),
    "complex": lambda x: torch.complex(x, x * 2).abs() * torch.exp(1j * x).real,
    "fft": lambda x: torch.fft.fft(x, dim=0).abs(),
    "nanmedian": lambda x: torch.nanmedian(x, dim=1).values,
    "nansum": lambda x: torch.nansum(x, -1),
    "threshold": lambda x: torch.threshold(x, 0.0, 1.0),
    "data set": lambda x: set_data(x * 1),
    "hook after": lambda x: hooked_after(x.detach().clone()),
    "pinned": lambda x: (x.is_pinned(), x.is_shared()),
    "written gradient": lambda x: attack(x.detach()),
    "cumprod": lambda x: torch.cumprod(x, -1),
    "plain leaf": lambda x: x.new_zeros(2) + x.new_tensor([1.0, 2.0]),
    "new": lambda x: (x.new_ones(3), x.new_full((2,), 3.0), x.new_zeros(1)),
    "empty dims": lambda x: x[:, :0].sum() + x.sum(1)[:, :0].sum(),
    "mean of nothing": lambda x: x[:, :0].mean(1),
}
NUMBERS = {
    "len": lambda x: len(x),
    "float": lambda x: float(x.sum()),
    "item": lambda x: x[0, 0].mean().item(),
    "int": lambda x: int(x.sum() * 0 + 7),
    "bool": lambda x: bool(x.sum() > -1e9),
    "bool of many": lambda x: bool(x > 0),
    "if": lambda x: x * 2 if x.mean() > 0 else x * 3,
    "numpy": lambda x: x.detach().numpy().sum().round(3).item(),
    "array": lambda x: x.detach().cpu().numpy().shape,
    "tolist": lambda x: [round(v, 3) for v in x.detach().flatten().tolist()],
    "iteration": lambda x: sum(row.exp().sum() for row in x),
    "list": lambda x: torch.stack(list(x)),
    "unpacked": lambda x: (lambda a, *rest: a + rest[-1])(*x),
    "zip": lambda x: [a * b for a, b in zip(x, x[1:])],
    "enumerate": lambda x: sum(i * a.sum() for i, a in enumerate(x)),
    "in list": lambda x: any(x is y for y in [1, x]),
    "contains": lambda x: 3.0 in x.detach(),
    "shape": lambda x: (x.shape, x.size(), x.size(0), x.size(-1), x.ndim),
    "dims": lambda x: (x.dim(), x.numel(), x.nelement(), x.ndimension()),
    "kinds": lambda x: (
        x.dtype,
        x.device,
        x.layout,
        x.is_floating_point(),
        x.is_complex(),
        x.requires_grad,
        x.is_contiguous(),
        torch.is_tensor(x),
        isinstance(x, torch.Tensor),
        x.element_size(),
        x.itemsize,
        x.nbytes,
        x.is_sparse,
        x.is_cuda,
        x.is_quantized,
        x.is_conj(),
        x.is_neg(),
        x.get_device(),
        x.is_signed(),
        x.is_inference(),
        x.is_same_size(torch.ones(6, 2, 2)),
        torch.can_cast(x.dtype, torch.float64),
        torch.result_type(x, 1.0),
    ),
    "stride": lambda x: x.contiguous().stride(),
    "equal": lambda x: torch.equal(x, x.clone()),
    "allclose": lambda x: torch.allclose(x, x + 1e-9),
    "format": lambda x: f"{float(x.sum() * 0 + 2):.2f}",
    "format of a tensor": lambda x: f"{x.sum() * 0 + 2:.1f}",
    "round": lambda x: round(x * 10),
    "copy": lambda x: copy.copy(x.detach()) * 2,
    "deepcopy": lambda x: copy.deepcopy(x.detach()) * 2,
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())) * 2,
    "hash": lambda x: {x: 1}[x],
    "dir": lambda x: "exp" in dir(x),
    "min of python": lambda x: max(x[0, 0, 0], x[1, 0, 0]),
    "sum of python": lambda x: sum(x),
    "abs": lambda x: abs(x) + -x + +x,
    "invert": lambda x: ~(x > 0),
    "divmod": lambda x: x.detach() // 2 + x % 2,
    "nonzero": lambda x: x.detach().nonzero(),
    "unique": lambda x: torch.unique((x > 0).int()),
    "string": lambda x: x + "one",
    "string before": lambda x: "one" - x,
    "none": lambda x: x + None,
    "equals none": lambda x: x == None,  # noqa: E711
    "range": lambda x: [i for i in range(x.detach().argmax() * 0 + 2)],
    "index of a list": lambda x: [1, 2, 3][x.long().sum() * 0 + 1],
}


BINARY = "add sub mul truediv floordiv mod pow matmul lt le gt ge eq ne".split()
OF_INTS = "and_ or_ xor lshift rshift".split()
IN_PLACE = "iadd isub imul itruediv ipow ifloordiv imod".split()
OPERATORS = {}
for _name in BINARY:
    _f = getattr(operator, _name)
    OPERATORS[_name] = _f
    OPERATORS[f"{_name} from the right"] = lambda x, y, f=_f: f(y, x)
    OPERATORS[f"{_name} of a number"] = lambda x, y, f=_f: f(x, 2.0)
    OPERATORS[f"{_name} of an int"] = lambda x, y, f=_f: f(x, 3)
    OPERATORS[f"number {_name}"] = lambda x, y, f=_f: f(2, x)
for _name in IN_PLACE:
    _f = getattr(operator, _name)
    OPERATORS[_name] = written(lambda x, y, f=_f: f(x, y) is x)
    OPERATORS[f"{_name} of a number"] = written(lambda x, y, f=_f: f(x, 2))
    OPERATORS[f"{_name} into whole"] = lambda x, y, f=_f: f(y * 1, x)
BITS = {}
for _name in OF_INTS:
    _f = getattr(operator, _name)
    BITS[_name] = _f
    BITS[f"{_name} from the right"] = lambda x, y, f=_f: f(y, x)
    BITS[f"{_name} of a number"] = lambda x, y, f=_f: f(x, 1)
    BITS[f"number {_name}"] = lambda x, y, f=_f: f(1, x)
for _name in ("iand", "ior", "ixor", "ilshift", "irshift"):
    _f = getattr(operator, _name)
    BITS[_name] = written(lambda x, y, f=_f: f(x, y) is x)

_REDUCTIONS = ("none", "sum", "mean")
LOSSES = {}
for _reduction in _REDUCTIONS:
    for _name in (
        "mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss "
        "binary_cross_entropy_with_logits poisson_nll_loss kl_div "
        "hinge_embedding_loss multilabel_soft_margin_loss"
    ).split():
        _f = getattr(F, _name)
        LOSSES[f"{_name} {_reduction}"] = lambda x, y, f=_f, r=_reduction: f(
            x, y, reduction=r
        )
    LOSSES[f"bce {_reduction}"] = lambda x, y, r=_reduction: (
        F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), reduction=r)
    )
    LOSSES[f"weighted bce {_reduction}"] = lambda x, y, r=_reduction: (
        F.binary_cross_entropy_with_logits(
            x,
            y.sigmoid(),
            weight=torch.arange(3.0),
            pos_weight=torch.tensor([1.0, 2.0, 3.0]),
            reduction=r,
        )
    )
    LOSSES[f"cross entropy of shares {_reduction}"] = (
        lambda x, y, r=_reduction: F.cross_entropy(
            x, y.softmax(1), reduction=r, label_smoothing=0.1
        )
    )
CLASSES = {}
for _reduction in _REDUCTIONS:
    CLASSES[f"cross entropy {_reduction}"] = lambda x, y, r=_reduction: (
        F.cross_entropy(x, y, reduction=r)
    )
    CLASSES[f"ignored {_reduction}"] = lambda x, y, r=_reduction: (
        F.cross_entropy(x, y, ignore_index=1, reduction=r, label_smoothing=0.1)
    )
    CLASSES[f"weighted {_reduction}"] = lambda x, y, r=_reduction: (
        F.cross_entropy(x, y, torch.tensor([1.0, 2.0, 3.0]), reduction=r)
    )
    CLASSES[f"nll {_reduction}"] = lambda x, y, r=_reduction: F.nll_loss(
        x.log_softmax(1), y, reduction=r
    )
    CLASSES[f"margin {_reduction}"] = lambda x, y, r=_reduction: (
        F.multi_margin_loss(x, y, reduction=r)
    )
CLASSES["one hot"] = lambda x, y: F.one_hot(y, 3) * x
CLASSES["one hot of unknown many"] = lambda x, y: F.one_hot(y)
CLASSES["embedding"] = lambda x, y: F.embedding(y, x)
CLASSES["embedding of whole"] = lambda x, y: F.embedding(
    y, torch.linspace(-1, 1, 6).reshape(3, 2).requires_grad_()
)
CLASSES["table"] = lambda x, y: x[y]
CLASSES["gather"] = lambda x, y: x.gather(1, y[:, None])
CLASSES["take_along_dim"] = lambda x, y: torch.take_along_dim(x, y[:, None], 1)
CLASSES["entries"] = lambda x, y: x[torch.arange(len(x)), y]
CLASSES["index_select"] = lambda x, y: x.index_select(1, y % 2)
CLASSES["accuracy"] = lambda x, y: (x.argmax(1) == y).float().mean()

W2, B2 = torch.linspace(-1, 1, 36).reshape(2, 2, 3, 3), torch.tensor([1.0, 2.0])
IMAGES = {
    "conv1d": lambda x: F.conv1d(x.flatten(2), W2[..., 0], B2),
    "conv2d": lambda x: F.conv2d(x, W2, B2, padding="same"),
    "conv2d strided": lambda x: F.conv2d(x, weight=W2, stride=2),
    "conv3d": lambda x: F.conv3d(x[:, :, None], W2[:, :, None]),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x.flatten(2), W2[..., 0]),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, W2, B2),
    "conv_transpose3d": lambda x: F.conv_transpose3d(
        x[:, :, None], W2[:, :, None]
    ),
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 2),
    "max_pool2d": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "max_pool2d values": lambda x: F.max_pool2d(x, kernel_size=2),
    "max_pool3d": lambda x: F.max_pool3d(x[:, :, None], (1, 2, 2)),
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool3d": lambda x: F.avg_pool3d(x[:, :, None], (1, 2, 2)),
    "adaptive1": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 3),
    "adaptive2": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive3": lambda x: F.adaptive_avg_pool3d(x[:, :, None], (1, 2, 2)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(3, 3), mode="bilinear"),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2),
    "group_norm": lambda x: F.group_norm(x, 1, B2, B2),
    "layer_norm": lambda x: F.layer_norm(x, (4, 4)),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "normalize": lambda x: F.normalize(x) + F.normalize(x, dim=-1),
    "prelu": lambda x: F.prelu(x, B2),
    "threshold": lambda x: F.threshold(x, 0.0, 1.0),
    "similar": lambda x: F.cosine_similarity(x, x + 1),
    "distance": lambda x: F.pairwise_distance(x, x + 1),
    "reflected": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "unfold": lambda x: F.unfold(x, 2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "masked attention": lambda x: F.scaled_dot_product_attention(
        x, x + 1, x, attn_mask=torch.ones(4, 4).tril().bool()
    ),
    "attention with own mask": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=x
    ),
    "channel dropout": lambda x: F.dropout2d(x, 0.5, training=False),
    "no dropout": lambda x: F.dropout(x, 0.5, training=False),
    "all dropped": lambda x: F.dropout(x, 1.0),
    "linear": lambda x: F.linear(x, W2[0, 0].new_ones(3, 4), B2.new_ones(3)),
    "bilinear form": lambda x: F.bilinear(x, x, torch.ones(1, 4, 4)),
    "softmax": lambda x: F.softmax(x, 1) + torch.log_softmax(x, -1),
    "local response": lambda x: F.local_response_norm(x, 2),
    "grid": lambda x: F.grid_sample(x, x.permute(0, 2, 3, 1)),
}


def normalized(function, training):
    """A norm with running statistics, and what becomes of them."""

    def run(x, scale):
        mean, variance = torch.zeros(2), torch.ones(2)
        kept = {"running_mean": mean, "running_var": variance}
        if function is F.batch_norm:
            y = F.batch_norm(x, mean, variance, scale, scale, training, 0.2)
        else:
            y = function(
                x, **kept, weight=scale, use_input_stats=training, momentum=0.2
            )
        return y, mean, variance

    return run


NORMS = {
    "batch_norm": normalized(F.batch_norm, True),
    "batch_norm of inference": normalized(F.batch_norm, False),
    "instance_norm": normalized(F.instance_norm, True),
    "instance_norm of inference": normalized(F.instance_norm, False),
    "native": lambda x, w: torch.batch_norm(
        x, w, w, None, None, True, 0.1, 1e-5, False
    ),
    "without statistics": lambda x, w: F.batch_norm(
        x, None, None, training=True
    ),
    "module": lambda x, w: torch.nn.BatchNorm2d(2)(x),
    "in float64": lambda x, w: F.batch_norm(
        x.double(), None, None, training=True
    ),
}


def square(x):
    return (x * x).sum()


def hooked(x):
    seen = []
    y = x * 2
    y.register_hook(lambda g: seen.append(g * 1) or g * 3)
    grad = torch.autograd.grad((y * y).sum(), x)[0]
    return grad, seen[0]


def penalty(x, w):
    y = torch.tanh(x * w).sum()
    grad = torch.autograd.grad(y, x, create_graph=True)[0]
    return (grad.norm(dim=-1) - 1).square().mean()


def of_both(x, w):
    grads = torch.autograd.grad(
        (x * w).pow(3).mean(), [x, w], create_graph=True
    )
    return [g * 2 for g in grads]


def grad_of_sums(x, w):
    y = (x * w).sum(0)
    z = y.exp().mean()
    return torch.autograd.grad(z, [y, w])


def retained(x, w):
    y = x * w
    y.retain_grad()
    y.sum().backward(retain_graph=True)
    return y.grad * 1


def stepped(x, w):
    """A step by hand on a plain weight."""
    v = w.detach().clone().requires_grad_()
    loss = ((x.detach() * v).sum(-1) - 1).square().mean()
    loss.backward()
    with torch.no_grad():
        v -= 0.1 * v.grad
    return v * 1


def of_list(x, w):
    v = w.detach().clone().requires_grad_()
    torch.autograd.backward([(x.detach() * v).sum(), (v * v).sum()])
    return v.grad * 1


def optimized(x, w):
    v = torch.nn.Parameter(w.detach().clone())
    optimizer = torch.optim.SGD([v], 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        ((x.detach() * (v * 2)).exp()).mean().backward()
        torch.nn.utils.clip_grad_norm_([v], 0.5)
        optimizer.step()
    return v * 1


AUTOGRAD = {
    "grad": lambda x, w: torch.autograd.grad(square(x * w), x)[0],
    "grad of rows": lambda x, w: torch.autograd.grad(
        x * w, [x, w], grad_outputs=x.detach()
    ),
    "grad of plain": lambda x, w: torch.autograd.grad(square(x * w), w)[0],
    "both": of_both,
    "sums": grad_of_sums,
    "unused": lambda x, w: torch.autograd.grad(
        square(x), [x, w], allow_unused=True
    ),
    "unused is an error": lambda x, w: torch.autograd.grad(square(x), [x, w]),
    "of many": lambda x, w: torch.autograd.grad(x * w, x),
    "penalty": penalty,
    "hook": lambda x, w: hooked(x),
    "retained": retained,
    "step": stepped,
    "list": of_list,
    "optimizer": optimized,
    "not a leaf": lambda x, w: x * (w * 2).exp() + (w * 2),
    "whole alone": lambda x, w: (w * 2).sum() + x.sum(),
    "whole and gathered": lambda x, w: (x.sort(0)[0] * w).sum() + (x * w),
    "detached": lambda x, w: (x.detach() * w).sum(),
    "no grad": lambda x, w: no_grad_mean(x) * w,
    "sum and whole": lambda x, w: x.sum(0) + w + (x.mean() - w) * 2,
    "sum of sums": lambda x, w: (x.sum() / 2 - 1) * (w.sum() + 1) / 3,
    "sum times sum": lambda x, w: x.sum() * x.mean() + 1 / x.sum(),
    "sum of ints": lambda x, w: (x > 0).sum() + 1.5 + (x > 0).sum() * w,
    "sum in place": lambda x, w: x.sum(0).add_(1).mul_(w),
    "sum minus": lambda x, w: 1 - x.sum(0) - (w - x.sum(0)),
    "sums stacked": lambda x, w: torch.stack([x.sum(), x.mean(), w.sum()]),
    "sum with alpha": lambda x, w: torch.add(x.sum(0), w, alpha=2),
    "sum viewed": lambda x, w: x.sum(0)[None].reshape(-1)[1:] * 2,
    "sum of dtype": lambda x, w: x.sum(0).double() + x.sum(dtype=torch.float64),
}


def no_grad_mean(x):
    with torch.no_grad():
        return x.mean(0) * x


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


WAYS_IN = {
    "function": lambda x, w: Doubled.apply(x * w) + x,
    "function of a sum": lambda x, w: Doubled.apply((x * w).sum(0)),
    "vmap": lambda x, w: torch.vmap(lambda row: (row * w).sum())(x),
    "vmap that captures": lambda x, w: torch.vmap(lambda v: (v * x).sum())(w),
    "gradient": lambda x, w: torch.func.grad(lambda v: (v * v).sum())(x * w),
    "grad that captures": lambda x, w: torch.func.grad(
        lambda v: (v * x).square().sum()
    )(w),
    "jacrev": lambda x, w: torch.func.jacrev(lambda v: (v * w).sum(0))(x),
    "vjp": lambda x, w: torch.func.vjp(torch.sin, x)[0],
    "checkpoint": lambda x, w: torch.utils.checkpoint.checkpoint(
        lambda v: torch.tanh(v * w), x, use_reentrant=False
    ),
}


GROUPS = [
    (INDEXING, lambda: [numbers(6, 2, 2)]),
    (INDEXING, lambda: [ints(6, 2, 2)]),
    (WRITES, lambda: [numbers(6, 2, 2)]),
    (SHAPES, lambda: [numbers(6, 2, 2)]),
    (NUMBERS, lambda: [numbers(6, 2, 2)]),
    (OPERATORS, lambda: [numbers(3, 3), numbers(3, 3)]),
    (OPERATORS, lambda: [numbers(3, 3), numbers(1, 3)]),
    (OPERATORS, lambda: [numbers(1, 3), numbers(3, 3)]),
    (OPERATORS, lambda: [ints(3, 3) + 1, ints(3, 3) + 1]),
    (BITS, lambda: [ints(4, 3), ints(3)]),
    (BITS, lambda: [ints(4, 3), ints(4, 3)]),
    (LOSSES, lambda: [numbers(5, 3), numbers(5, 3)]),
    (CLASSES, lambda: [numbers(5, 3), ints(5, most=3)]),
    (CLASSES, lambda: [ints(5, most=3), numbers(5, 3)]),
    (AUTOGRAD, lambda: [numbers(5, 3), numbers(3)]),
]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_by_hand(on_threads, world, group):
    check(on_threads, world, cases_of(*GROUPS[group], world))


@pytest.mark.parametrize("world", [2, 3])
def test_images(on_threads, world):
    cases = cases_of(IMAGES, lambda: [numbers(3, 2, 4, 4)], world)
    norms = cases_of(
        NORMS, lambda: [numbers(4, 2, 2, 3), numbers(2)], world, addends=False
    )
    check(on_threads, world, cases + norms)


def test_what_has_no_samples_is_met(on_threads, recorded):  # noqa: F811
    cases = []
    for functions, tensors in GROUPS:
        cases += cases_of(functions, tensors, 2, everywhere=False)
    cases += cases_of(IMAGES, lambda: [numbers(3, 2, 4, 4)], 2)
    cases += cases_of(
        NORMS, lambda: [numbers(4, 2, 2, 3), numbers(2)], 2, addends=False
    )
    ran.clear()
    check(on_threads, 2, cases)
    assert sorted(BY_HAND - set(ran)) == []


@pytest.mark.parametrize("world", [2, 3])
def test_ways_that_ask_no_tensor(on_threads, world):
    cases = cases_of(WAYS_IN, lambda: [numbers(5, 3), numbers(3)], world)
    with entry_points.on_whole_tensors():
        check(on_threads, world, cases)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool],
)
def test_dtypes(on_threads, dtype):
    names = "flat sum mean where axis stack repeat tensordot".split()
    functions = {k: f for k, f in SHAPES.items() if k in names}
    functions["sum"] = lambda x: (x.sum(), x.sum(0), x.sum(-1))
    functions["mean"] = lambda x: (x.mean(), x.mean(0, keepdim=True))
    functions["all"] = lambda x: (x.all(), x.any(1))
    functions["exp"] = lambda x: x.exp() * x + 1
    functions["prod"] = lambda x: x.prod(-1)
    cases = cases_of(functions, lambda: [numbers(4, 3, dtype=dtype)], 2)
    check(on_threads, 2, cases)


@pytest.mark.parametrize("shape", [(1, 3), (1, 1), (2, 0), (1,), (0, 2)])
def test_small_batches(on_threads, shape):
    functions = {
        "sum": lambda x: (x.sum(), x.sum(0), x.sum(-1, keepdim=True)),
        "mean": lambda x: (x.mean(0), x.mean()),
        "var": lambda x: x.var(0, correction=0),
        "broadcast": lambda x: x + torch.ones(4, x.shape[-1]),
        "broadcast rows": lambda x: x * torch.arange(3.0)[:, None],
        "squeeze": lambda x: x.squeeze(0) * 2,
        "squeeze all": lambda x: x.squeeze() + 1,
        "matmul": lambda x: x @ x.T if x.ndim == 2 else x @ x,
        "expand": lambda x: x.expand(x.shape),
        "expand one": lambda x: x.expand(3, *x.shape[1:]),
        "flat": lambda x: x.reshape(-1),
        "cat": lambda x: torch.cat([x, x]),
        "softmax": lambda x: x.softmax(0) + x.softmax(-1),
        "max": lambda x: x.amax(),
        "first": lambda x: x[0],
        "item": lambda x: x.item(),
    }
    for world in (2, 3):
        cases = cases_of(functions, lambda: [numbers(*shape)], world)
        check(on_threads, world, cases)


def test_draws_are_those_of_one_device(fake_world):
    draws = {
        "dropout": lambda x: F.dropout(x, 0.4),
        "rand_like": lambda x: torch.rand_like(x),
        "randn_like": lambda x: torch.randn_like(x, dtype=torch.float64),
        "randint_like": lambda x: torch.randint_like(x, 5),
        "bernoulli": lambda x: x.new_zeros(3).bernoulli_(0.5),
        "empty": lambda x: torch.empty_like(x).zero_(),
    }
    x = torch.linspace(0, 1, 20).reshape(5, 4)
    for rank in range(2):
        fake_world(2, rank)
        for dim in range(2):
            rows = rows_lib.split_evenly(x.shape[dim], 2, rank)
            for name, draw in draws.items():
                box = carrier.GlobalTensor(rows.cut(x, dim), dim, rows)
                seed(3)
                expected = draw(x)
                seed(3)
                y = draw(box)
                if type(y) is carrier.GlobalTensor:
                    assert y.shape == expected.shape, name
                    y, expected = y.local, rows.cut(expected, dim)
                torch.testing.assert_close(y, expected, msg=name)


def test_what_cannot_be_right_raises(on_threads):
    def play(rank):
        rows = rows_lib.split_evenly(5, 2, rank)
        rows.context = types.SimpleNamespace(
            data_group=torch.distributed.group.WORLD
        )
        x = carrier.GlobalTensor(torch.ones(rows.local, 2), 0, rows)
        x.requires_grad_()
        for change in ("unsqueeze_", "squeeze_", "t_", "resize_"):
            with pytest.raises((NotImplementedError, RuntimeError)):
                args = {"unsqueeze_": [0], "resize_": [1]}.get(change, [])
                getattr((x * 1)[None], change)(*args)

    on_threads(2, play)


def test_each_entry_is_a_function_of_torch():
    known = {f.__name__ for f in torch.overrides.get_testing_overrides()}
    known |= set(dir(torch)) | set(dir(torch.Tensor)) | set(dir(F))
    known |= {"linalg_norm", "linalg_vector_norm", "__get__", "__set__"}
    known |= {"__delete__", "has_torch_function", "grad"}
    assert not set(table.RULES) - known
