"""Proof of the table from torch's own samples, function by function.

Each function that a rule knows, and each other one of torch's, is handed the
samples that torch tests it with: with rows in every dim of every tensor, in
two tensors at once, as an addend, without rows on some data shards, by
position and by keyword, as function, method, in place and operator. What comes
out, its gradients and errors must be those of plain torch.

Threads play the processes; all meet after each case, so that one that goes
another way is found at once.
"""

import functools
import inspect
import itertools
import os
import random
import threading
import types
import warnings
import zlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal import common_methods_invocations as methods
from torch.utils import _pytree as pytree

from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows import rules  # noqa: F401
from keras.src.backend.torch.distribution.global_rows import table
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.mesh import rows as rows_lib

# How much is tried of a function: cases of all that its samples give.
CASES = int(os.environ.get("CASES_OF_EACH_FUNCTION", 12))
CASES_WITHOUT_RULE = 2
MOST_NUMBERS = 2000  # in a sample

# What draws has no value to compare; what is uninitialized neither.
DRAWS = set(
    """bernoulli cauchy dropout dropout2d dropout3d empty exponential fractional
    geometric jiterator lowrank multinomial normal poisson rand randint randn
    resize
    rrelu sparse strided uniform""".split()
)
# Python's operators, as torch's functions; those in place are the same.
OPERATORS = {
    "and": "bitwise_and",
    "floordiv": "floor_divide",
    "invert": "bitwise_not",
    "lshift": "bitwise_left_shift",
    "mod": "remainder",
    "or": "bitwise_or",
    "pos": "positive",
    "rshift": "bitwise_right_shift",
    "truediv": "true_divide",
    "xor": "bitwise_xor",
}

ran = {}


@pytest.fixture
def recorded(monkeypatch):
    """Counts in `ran` how often each rule has had an answer."""

    def recording(name, rule):
        def record(func, args, kwargs):
            y = rule(func, args, kwargs)
            if y is not NotImplemented:
                ran[name] = ran.get(name, 0) + 1
            return y

        return record

    for name, rule in table.RULES.items():
        monkeypatch.setitem(table.RULES, name, recording(name, rule))


# ---- one case ----------------------------------------------------------------


class Whole:
    """A tensor as it is on one device."""

    def __repr__(self):
        return "whole"

    def enter(self, x, counts, rank):
        return x.detach().clone().requires_grad_(x.requires_grad)

    def share(self, grad, counts, rank):
        return grad


class InRows:
    """Rows in a dim, `entries` for each."""

    def __init__(self, dim, entries=1, batch=0):
        self.dim, self.entries, self.batch = dim, entries, batch

    def __repr__(self):
        return f"rows in {self.dim} x{self.entries} of {self.batch}"

    def enter(self, x, batches, rank):
        rows = batches[self.batch].with_entries(self.entries)
        local = rows.cut(x, self.dim).detach().clone()
        local.requires_grad_(x.requires_grad)
        return GlobalTensor(local, self.dim, rows)

    def share(self, grad, batches, rank):
        return (
            batches[self.batch].with_entries(self.entries).cut(grad, self.dim)
        )


class Addend:
    """A sum over data shards."""

    def __repr__(self):
        return "addend"

    def enter(self, x, batches, rank):
        rows = batches[0]
        part = x.detach() * (0.25 if rank else 1 - 0.25 * (rows_of(rows) - 1))
        return carrier.addend(part.requires_grad_(x.requires_grad), rows)

    def share(self, grad, batches, rank):
        return grad


def rows_of(rows):
    return len(rows.counts)


class Case:
    """A function, its tensors, and how each is spread.

    Args:
        name: str, for messages.
        function: of tensors.
        tensors: list of tensors, as on one device.
        kinds: list of `Whole`, `InRows` or `Addend`.
        counts: rows of each data shard, for each batch.
        gradients: whether floats ask for them.
    """

    # Whether it may raise where one device does not.
    may_raise = False

    def __init__(self, name, function, tensors, kinds, counts, gradients=True):
        self.name, self.function, self.kinds = name, function, kinds
        self.counts, self.gradients = counts, gradients
        self.tensors = [
            x.detach().clone().requires_grad_(gradients and has_gradient(x))
            for x in tensors
        ]

    def __repr__(self):
        shapes = [tuple(x.shape) for x in self.tensors]
        return (
            f"{self.name} of {shapes} {self.kinds}, rows {self.counts}, "
            f"gradients {self.gradients}"
        )

    def expect(self):
        """What one device gives."""
        leafs = [Whole().enter(x, None, 0) for x in self.tensors]
        self.expected = outcome(self.function, leafs)
        self.expected_grads = [
            torch.zeros_like(x) if x.grad is None else x.grad.to_dense()
            for x in leafs
        ]

    def differs(self, rank):
        """What is different on the global batch, or None.

        Collective: every process calls it.
        """
        batches = [rows_lib.Rows(c, rank) for c in self.counts]
        for rows in batches:
            rows.context = types.SimpleNamespace(data_group=dist.group.WORLD)
            rows.weight_of_gradients = 1 / rows_of(rows)
        shards = rows_of(batches[0])
        tensors = [
            kind.enter(x, batches, rank)
            for x, kind in zip(self.tensors, self.kinds)
        ]
        got = outcome(self.function, tensors)
        if self.may_raise and isinstance(got, Exception):
            return None
        what = unlike(got, self.expected)
        if what or isinstance(got, Exception):
            return what
        for i, (x, kind) in enumerate(zip(tensors, self.kinds)):
            if not self.tensors[i].requires_grad:
                continue
            grad = self.expected_grads[i]
            mine = kind.share(grad, batches, rank)
            if type(x) is GlobalTensor:
                # Not `x.grad`: without a gradient on one process there is none.
                local = x.local.grad
                local = None if local is None else local / shards
            else:
                local = x.grad
            local = torch.zeros_like(mine) if local is None else local
            what = unlike(local, mine, LOOSE.get(self.name.split()[0]))
            if what:
                return f"gradient of {i}: {what}"
        return None


def has_gradient(x):
    return x.is_floating_point() or x.is_complex()


def weights_like(x):
    """Numbers without order, equal everywhere."""
    n = torch.arange(x.numel(), dtype=torch.float64)
    return torch.cos(n * n + 1).reshape(x.shape).to(x.dtype)


def outcome(function, tensors):
    """What a function gives, with gradients in its leafs; or its error."""
    try:
        y = function(*tensors)
        loss = None
        for leaf in pytree.tree_leaves(y):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                if leaf.is_complex():
                    leaf = torch.view_as_real(leaf)
                part = (leaf * weights_like(leaf)).sum()
                loss = part if loss is None else loss + part
        if loss is not None:
            loss.backward()
        return pytree.tree_map_only(torch.Tensor, shown, y)
    except Exception as error:
        return error


class Shown:
    """A tensor as plain torch shows it."""

    def __init__(self, x):
        self.shape, self.dtype = tuple(x.shape), x.dtype
        self.value = carrier.whole(x).detach()


shown = Shown


def unlike(got, expected, tolerance=None):
    """How two outcomes differ, None if they do not."""
    if isinstance(got, Exception) or isinstance(expected, Exception):
        if not isinstance(expected, Exception):
            return f"raised {type(got).__name__}: {got}"
        if not isinstance(got, Exception):
            return f"did not raise {type(expected).__name__}: {expected}"
        if not isinstance(got, type(expected)):
            return f"raised {got!r}, not {expected!r}"
        return None
    if isinstance(expected, torch.Tensor):
        got, expected = Shown(got), Shown(expected)
    if isinstance(expected, Shown):
        if not isinstance(got, Shown):
            return f"{type(got)}"
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            return (
                f"{got.shape} {got.dtype}, not {expected.shape} "
                f"{expected.dtype}"
            )
        a, b = got.value, expected.value
        a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
        if tuple(a.shape) != expected.shape or a.dtype != expected.dtype:
            return f"holds {tuple(a.shape)} {a.dtype}"
        if not torch.allclose(
            a, b, *(tolerance or of_dtype(a.dtype)), equal_nan=True
        ):
            return f"{numbers(a)}, not {numbers(b)}"
        return None
    if isinstance(expected, (list, tuple)):
        if type(got) is not type(expected) or len(got) != len(expected):
            return f"{type(got)}, not {type(expected)}"
        return next(filter(None, map(unlike, got, expected)), None)
    if isinstance(expected, float) and isinstance(got, float):
        expected = pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)
    same = got == expected or got != got and expected != expected
    return None if same else f"{got!r}, not {expected!r}"


def numbers(x):
    return str(x.flatten()[:6].tolist())


def of_dtype(dtype):
    if dtype in (torch.float16, torch.complex32):
        return 1e-2, 1e-2
    return (5e-2, 5e-2) if dtype is torch.bfloat16 else (1e-4, 1e-5)


# Of gradients. Those of half precision are rounded once more; torch's own of
# `logcumsumexp` subtracts large numbers.
LOOSE = {
    "bfloat16": (1e-2, 1e-2),
    "half": (1e-3, 1e-3),
    "logcumsumexp": (1e-2, 5e-3),
    "to": (1e-2, 1e-2),
}


def check(on_threads, world, cases):
    """Fails with all cases that differ.

    Args:
        on_threads: the fixture.
        world: int, number of processes.
        cases: list of `Case`, for as many.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases:
            case.expect()
        barrier = threading.Barrier(world)

        def play(rank):
            found = []
            for case in cases:
                try:
                    what = case.differs(rank)
                except Exception as error:
                    what = f"{type(error).__name__}: {error}"
                try:
                    barrier.wait(20)
                except threading.BrokenBarrierError:
                    raise AssertionError(f"Processes part in {case}") from None
                if what:
                    found.append(f"[{rank}] {case}: {what}")
            return found

        found = sum(on_threads(world, play), [])
    shown = [x if len(x) < 700 else x[:700] + "..." for x in found]
    assert not found, f"{len(found)} differ:\n" + "\n".join(shown)


# ---- cases of torch's samples ------------------------------------------------


@functools.cache
def operators():
    """torch's descriptions of a function, by the names it has."""
    found = {}
    for op in methods.op_db:
        last = op.name.split(".")[-1]
        own = getattr(op.op, "__name__", last)
        names = {op.name.replace(".", "_"), last, own}
        names.update(alias.name.split(".")[-1] for alias in op.aliases)
        for name in names:
            found.setdefault(name, []).append(op)
    return found


def base_of(name):
    """The function of which a name is another form."""
    if not name.startswith("__"):
        return name[:-1] if name.endswith("_") else name
    base = name.strip("_")
    if base not in OPERATORS and base[0] in "ir" and base[1:] != "nvert":
        base = base if hasattr(torch, base) else base[1:]
    return OPERATORS.get(base, base)


def forms(name, op):
    """The functions of a description that go by this name."""
    every = [op.op, op.method_variant, op.inplace_variant, op.operator_variant]
    every.append(op.inplace_operator_variant)
    for alias in op.aliases:
        every += [alias.op, alias.method_variant, alias.inplace_variant]
    if name.startswith("__") or table.is_in_place(name):
        every.append(getattr(torch.Tensor, name, None))
    return [
        f
        for f in every
        if f is not None
        and (
            getattr(f, "__name__", "") == name
            or f is op.op
            and not hasattr(torch.Tensor, name)
        )
    ]


def names_of_arguments(function, name):
    """How the arguments may be called, for each signature there is."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        return [
            [a.name.replace("self", "input") for a in schema.arguments]
            for schema in schemas
        ]
    names = list(signature.parameters)
    return [] if {"args", "kwargs"} & set(names) else [names]


def seed(value=0):
    # `torch.manual_seed` prepares for a GPU, which takes most of the time.
    torch.default_generator.manual_seed(value or 0)


@mock.patch("torch.testing._internal.common_utils.set_rng_seed", seed)
def samples_of(op, dtype):
    return list(_samples_of(op, dtype))


def _samples_of(op, dtype):
    seed()
    try:
        samples = op.sample_inputs("cpu", dtype, requires_grad=False)
        for sample in itertools.islice(samples, 24):
            args = (sample.input, *sample.args)
            leaves = pytree.tree_leaves((args, sample.kwargs))
            tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
            if not tensors or sum(x.numel() for x in tensors) > MOST_NUMBERS:
                continue
            if any(x.layout is not torch.strided for x in tensors):
                continue
            if any(map(is_extreme, tensors)):
                continue
            if sample.kwargs.get("dropout_p"):
                continue
            yield args, sample.kwargs
    except (NotImplementedError, RuntimeError):
        return


def is_extreme(x):
    """Whether a number is so large that a loss, times the number of data
    shards, would be infinite. torch 2.14 has such samples (`hypot`)."""
    if not x.dtype.is_floating_point:
        return False
    return bool((x.isfinite() & (x.abs() > torch.finfo(x.dtype).max / 8)).any())


def works(function, args, kwargs):
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, torch.clone, (args, kwargs)
    )
    try:
        return function(*args, **kwargs) is not NotImplemented
    except Exception:
        return False


def placements(tensors, draw):
    """Ways to spread tensors: rows in each dim of each, in two, addends."""
    whole = [Whole()] * len(tensors)
    places = [
        (i, dim)
        for i, x in enumerate(tensors)
        for dim in range(x.ndim)
        if i < 5 and x.shape[dim]
    ]
    for i, dim in places:
        n = tensors[i].shape[dim]
        entries = [e for e in (1, 1, 2, 3) if n % e == 0]
        e = draw.choice(entries)
        one = list(whole)
        one[i] = InRows(dim, e)
        yield one, n // e
        for j, other in places:
            if j == i or tensors[j].shape[other] % e:
                continue
            # The same rows, or in a quarter of the cases those of others.
            same = tensors[j].shape[other] == n
            if not same and draw.random() < 0.8:
                continue
            two = list(one)
            two[j] = InRows(other, e, int(not same or draw.random() < 0.2))
            if two[j].batch:
                two[j].entries = 1
            yield two, (n // e, tensors[j].shape[other])
            if len(tensors) > 2 and draw.random() < 0.5:
                three = list(two)
                k = draw.randrange(len(tensors))
                if type(three[k]) is Whole and has_gradient(tensors[k]):
                    three[k] = Addend()
                    yield three, (n // e, tensors[j].shape[other])
    for i, x in enumerate(tensors):
        if i < 5 and x.is_floating_point():
            one = list(whole)
            one[i] = Addend()
            yield one, 3
            for j, y in enumerate(tensors):
                if j != i and y.is_floating_point():
                    two = list(one)
                    two[j] = Addend()
                    yield two, 3
                    break
    for kinds in (whole,):
        for i, dim in places:
            for j, x in enumerate(tensors):
                if j != i and x.is_floating_point() and draw.random() < 0.5:
                    two = list(kinds)
                    two[i], two[j] = InRows(dim), Addend()
                    yield two, tensors[i].shape[dim]


def spread(total, world, draw):
    """How many rows each data shard has, evenly or not."""
    if draw.random() < 0.75:
        return rows_lib.split_evenly(total, world, 0).counts
    cuts = sorted(draw.randint(0, total) for _ in range(world - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total]))


def cases_of(name, world, most):
    """Cases of a function, at most so many, drawn from all that there are."""
    draw = random.Random(zlib.crc32(f"{name}{world}".encode()))
    calls = []
    for op in operators().get(base_of(name), ()):
        if DRAWS & set(op.name.split(".")[-1].split("_")):
            continue
        functions = forms(name, op)
        if not functions:
            continue
        for dtype in (torch.float32, torch.int64, torch.bool):
            if dtype in op.dtypes:
                samples = samples_of(op, dtype)
                calls += itertools.product(samples, functions)
                if dtype is torch.float32:
                    calls *= 2
    draw.shuffle(calls)
    found = []
    for sample, function in itertools.islice(itertools.cycle(calls), most):
        found.append(case_of_call(name, function, *sample, world, draw))
    return list(filter(None, found))


def case_of_call(name, function, args, kwargs, world, draw):
    """A case of this call, spread in one way of many; None if in none."""
    if draw.random() < 0.5:
        args, kwargs = by_keyword(name, function, args, kwargs, draw)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    where = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
    tensors = [leaves[i] for i in where]

    def call(*tensors):
        new = list(leaves)
        for i, x in zip(where, tensors):
            new[i] = x
        if table.is_in_place(name):
            new[0] = new[0].clone()
        args, kwargs = pytree.tree_unflatten(new, spec)
        return function(*args, **kwargs)

    ways = list(placements(tensors, draw))
    if not ways:
        return None
    # Most of all what rules are for: no data shard without rows.
    usual = [w for w in ways if type(w[1]) is int and w[1] >= world]
    usual += [w for w in usual if type(w[0][0]) is InRows]
    usual += [w for w in usual if type(w[0][0]) is InRows and not w[0][0].dim]
    kinds, totals = draw.choice(ways + 2 * usual)
    totals = totals if isinstance(totals, tuple) else (totals, totals)
    counts = [spread(n, world, draw) for n in totals]
    what = f"{name} {list(kwargs)}" if kwargs else name
    return Case(what, call, tensors, kinds, counts, draw.random() < 0.8)


def by_keyword(name, function, args, kwargs, draw):
    """The call with arguments by name, where torch takes it."""
    for names in names_of_arguments(function, name.strip("_")):
        start = draw.randint(0, 1)
        if start < len(args) <= len(names):
            named = {**dict(zip(names[start:], args[start:])), **kwargs}
            if works(function, args[:start], named):
                return args[:start], named
    return args, kwargs


CHUNKS = 8
# Names whose rules `cases_test` proves: samples of torch know no such function,
# or have too few rows, or none that a rule does not give way for.
BY_HAND = set(
    """
    __dir__ __get__ __getitem__ __set__ __setitem__ copy_ cpu detach
    element_size get_device grad is_conj is_contiguous is_inference is_neg
    is_pinned is_same_size is_shared new_tensor register_hook
    register_post_accumulate_grad_hook result_type retain_grad type type_as
    zero_ fill_ is_floating_point

    argmax linalg_vector_norm nanmedian adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d batch_norm conv1d
    conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    cross_entropy dropout embedding gather group_norm index_select instance_norm
    interpolate layer_norm linalg_norm max_pool1d max_pool2d max_pool3d nansum
    nll_loss norm normalize one_hot pixel_shuffle pixel_unshuffle prelu rms_norm
    scaled_dot_product_attention tensordot threshold
    """.split()
)
# `test_draws_are_those_of_one_device` proves these, but for the last: it needs
# a GPU.
DRAWN = {"empty_like", "new_empty", "rand_like", "randint_like", "randn_like"}
NOT_HERE = DRAWN | {"cuda"}


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("world", [2, 3])
def test_functions_of_the_table(on_threads, recorded, world, chunk):
    names = sorted(table.RULES)[chunk::CHUNKS]
    most = CASES if world == 2 else -(-CASES // 4)
    cases = [case for name in names for case in cases_of(name, world, most)]
    check(on_threads, world, cases)
    if world == 2:
        assert sorted(set(names) - set(ran) - BY_HAND - NOT_HERE) == []


@pytest.mark.parametrize("chunk", range(2))
def test_functions_without_a_rule(on_threads, chunk):
    names = {op.name.split(".")[-1] for op in methods.op_db}
    names -= set(table.RULES) | {"multi_head_attention_forward"}  # It draws.
    cases = [
        case
        for name in sorted(names)[chunk::2]
        for case in cases_of(name, 2, CASES_WITHOUT_RULE)
    ]
    check(on_threads, 2, cases)
