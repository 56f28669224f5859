"""Which calls of somebody's code go over rows: found by a trial run.

`ops.sum(x, axis=0)` in a layer, or `ops.mean(x)` in a loss, goes over all rows
of a batch on one device. A data shard has some of them. Nothing in a tensor
says which of its dims counts rows. So the code is run once on meta tensors (of
shapes and no numbers) whose number of rows is a prime that no other size is a
multiple of: then every dim, and every number, that is a multiple of the prime
comes from rows, whatever has been reshaped or transposed on the way.

What a real run does with what was found: see `own_code`.
"""

import collections
import contextlib
import functools

import torch

# Documented under "Fake tensor", though not in a public module in torch 2.13.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from keras.src import tree
from keras.src.backend.common.stateless_scope import StatelessScope
from keras.src.backend.common.symbolic_scope import SymbolicScope
from keras.src.backend.torch.core import device_scope
from keras.src.backend.torch.core import get_device
from keras.src.backend.torch.distribution import rows as rows_lib
from keras.src.backend.torch.distribution.modes import modes

# Numbers of rows that a trial may be run with.
PRIMES = (1009, 7919, 104729, 1299709)

# Of parts of the rows they give parts of the result, that add up.
SUMS = frozenset(
    """
    sum nansum count_nonzero matmul __matmul__ __rmatmul__ mm mv bmm dot inner
    vdot einsum tensordot linear
    """.split()
)
# Means of as many numbers for each row.
MEANS = frozenset(["mean"])
# Means of as many numbers for each row, or sums, as `reduction` says.
LOSSES = frozenset(
    """
    l1_loss mse_loss smooth_l1_loss huber_loss binary_cross_entropy
    binary_cross_entropy_with_logits poisson_nll_loss soft_margin_loss kl_div
    """.split()
)
# They mix along one dim, and keep it: the position of that argument.
ALONG = {
    "argsort": 1,
    "cummax": 1,
    "cummin": 1,
    "cumprod": 1,
    "cumsum": 1,
    "flip": 1,
    "log_softmax": 1,
    "logcumsumexp": 1,
    "roll": 2,
    "softmax": 1,
    "sort": 1,
}
# They take numbers as numbers, not as sizes or positions.
ARITHMETIC = frozenset(
    """
    __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__
    __imul__ __truediv__ __rtruediv__ __itruediv__ __floordiv__ __rfloordiv__
    __rdiv__ __pow__ __rpow__ __mod__ add add_ sub sub_ subtract rsub mul mul_
    multiply div div_ divide true_divide floor_divide maximum minimum pow
    remainder clamp clip tensor as_tensor scalar_tensor asarray
    """.split()
)
# They tell of tensors, or make new ones.
NO_FUNCTION = frozenset(
    """
    __get__ __set__ __delete__ __len__ __hash__ __repr__ __format__ size dim
    numel stride is_floating_point is_complex requires_grad_ new_empty new_full
    new_ones new_tensor new_zeros empty_like full_like ones_like zeros_like
    """.split()
)

SUM, MEAN, GATHER, ALONG_ROWS, COUNT = range(5)

_running = []  # trials, and runs over all rows, the innermost last


class Found:
    """What a call does with rows.

    Attributes:
        kind: `SUM`, `MEAN`, `GATHER`, `ALONG_ROWS` or `COUNT`.
        dims: for each leaf of the call's arguments, the dim of rows and how
            many entries it has for each row; None where it has none.
        numbers: positions of the leaves that are numbers of rows; each with
            whether it is one over that.
    """

    def __init__(self, kind, dims=(), numbers=()):
        self.kind, self.dims, self.numbers = kind, dims, numbers


class Trial:
    """What a trial run found.

    Attributes:
        found: `{(layer, name of function): {number of the call: Found}}`.
        returns_rows: whether what is returned has an entry for each row.
        mixing: layers in which rows meet other rows (in a product of all with
            all), with the dims of rows of what they are handed and return.
        mixes: whether rows meet other rows anywhere.
        uses_losses: whether Keras's own losses or moments are called.
        failed: None, or why the code does not run on meta tensors.
    """

    paused = 0  # calls of known code under way
    catches_batch_norms = False  # the real run does, where the trial is now

    def __init__(self):
        self.found = {}
        self.returns_rows = False
        self.mixing = {}
        self.uses_losses = False
        self.failed = None

    @property
    def mixes(self):
        return bool(self.mixing)

    @property
    def layers(self):
        """Ids of the layers that have something to do with rows."""
        return {layer for layer, _ in self.found}


def key_of(name):
    """What a function called now is counted under."""
    layer = modes.layer
    return (None if layer is None else id(layer), name)


def run(function, args, kwargs, sizes=()):
    """A `Trial` of `function(*args, **kwargs)`.

    Does not communicate, changes no variable, no metric and no random state.

    Args:
        function: what is tried.
        args, kwargs: its arguments; a tensor whose dim 0 is the rows of the
            current batch has them there.
        sizes: iterable of ints that appear as sizes of dims (of weights, say).
    """
    tensors = [x for x in tree.flatten((args, kwargs)) if torch.is_tensor(x)]
    taken = {n for x in tensors for n in x.shape[1:]} | set(sizes)
    prime = next(p for p in PRIMES if not any(n % p == 0 for n in taken if n))
    trial = _run(function, args, kwargs, prime, device_scope("meta"))
    if trial.failed:
        # Code in raw torch makes tensors on the CPU, which meta tensors do not
        # meet. Fake ones have a device; but Keras's own code knows meta alone
        # to be without numbers (random seeds, say).
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        again = _run(function, args, kwargs, prime, fake)
        if not again.failed:
            return again
    return trial


def _run(function, args, kwargs, prime, scope):
    trial = Trial()
    local = local_rows()

    def enter(x):
        if not torch.is_tensor(x):
            return x
        shape = tuple(x.shape)
        if shape and shape[0] == local:
            shape = (prime, *shape[1:])
        device = "meta" if get_device() == "meta" else x.device
        y = torch.empty(shape, dtype=x.dtype, device=device)
        mask = getattr(x, "_keras_mask", None)
        if mask is not None:
            y._keras_mask = enter(mask)
        return y

    layer = modes.layer
    try:
        with (
            watched_by(trial),
            torch.random.fork_rng(devices=[]),
            rows_lib.current_rows(None),
            StatelessScope(collect_losses=True),
            SymbolicScope(),
            torch.no_grad(),
            scope,
        ):
            args, kwargs = tree.map_structure(enter, (args, kwargs))
            with _Recorder(trial, prime):
                outputs = function(*args, **kwargs)
        trial.returns_rows = any(map(trial.dim_of, tree.flatten(outputs)))
    except Exception as error:
        # Code may ask for numbers, which there are none of: whoever asked for
        # the trial has another way then.
        trial.failed = f"{type(error).__name__}: {error}"
    finally:
        modes.layer = layer
    return trial


def is_trial():
    """Whether code is being tried."""
    return bool(_running) and isinstance(_running[-1], Trial)


@contextlib.contextmanager
def catching_batch_norms():
    """Within it, in a trial, torch's batch norms do not mix rows."""
    trial = _running[-1]
    outer, trial.catches_batch_norms = trial.catches_batch_norms, True
    try:
        yield
    finally:
        trial.catches_batch_norms = outer


def is_watched():
    """Whether code is being tried, or run over all rows."""
    return bool(_running)


@contextlib.contextmanager
def watched_by(watcher):
    """Within it, known code pauses a watcher: see `known`."""
    _running.append(watcher)
    try:
        yield
    finally:
        _running.remove(watcher)


def call(layer, function, *args, **kwargs):
    """`function(layer, ...)`: a layer's outputs on tensors without numbers."""
    outer, modes.layer = modes.layer, layer
    try:
        outputs = function(layer, *args, **kwargs)
    finally:
        modes.layer = outer
    if is_trial() and id(layer) in _running[-1].mixing:
        dim_of = _running[-1].dim_of
        _running[-1].mixing[id(layer)] = (
            list(map(dim_of, tree.flatten((args, kwargs)))),
            list(map(dim_of, tree.flatten(outputs))),
        )
    return outputs


def local_rows():
    """The rows of ours that are computed on: one, where we have none."""
    return max(rows_lib.get_current_rows().local, 1)


def known(function):
    """Decorates code of ours, or of Keras, that knows about rows itself."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not _running:
            return function(*args, **kwargs)
        watcher = _running[-1]
        watcher.uses_losses = True
        watcher.paused += 1
        try:
            return function(*args, **kwargs)
        finally:
            watcher.paused -= 1

    return call


class _Recorder(TorchFunctionMode):
    def __init__(self, trial, prime):
        super().__init__()
        self.trial, self.prime = trial, prime
        trial.dim_of = self.dim_of
        self.calls = collections.Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in NO_FUNCTION or self.trial.paused:
            return outputs
        key = key_of(name)
        found = self.examine(name, args, kwargs, outputs)
        if found is not None:
            self.trial.found.setdefault(key, {})[self.calls[key]] = found
        self.calls[key] += 1
        return outputs

    def examine(self, name, args, kwargs, outputs):
        leaves = tree.flatten((args, kwargs))
        if name in ARITHMETIC:
            numbers = self.numbers(leaves)
            if numbers:
                return Found(COUNT, numbers=numbers)
        dims = [self.dim_of(x) for x in leaves]
        if not any(dims):
            return None
        if name == "batch_norm" and _is_training(*args, **kwargs):
            if not self.trial.catches_batch_norms:
                self.say_mixing()
        outputs = [y for y in tree.flatten(outputs) if torch.is_tensor(y)]
        if not outputs:
            return None
        if not any(self.dim_of(y) for y in outputs):
            return Found(_kind(name, leaves), dims)
        if name in ALONG and self.is_along_rows(name, args, kwargs, dims):
            return Found(ALONG_ROWS, dims)
        return None

    def dim_of(self, x):
        """The dim of rows, and how many entries it has for each."""
        if not torch.is_tensor(x):
            return None
        dims = [d for d, n in enumerate(x.shape) if n and n % self.prime == 0]
        if not dims:
            return None
        dim, size = dims[0], x.shape[dims[0]]
        if len(dims) > 1 or size % self.prime**2 == 0:
            self.say_mixing()
        return dim, size // self.prime

    def say_mixing(self):
        layer = modes.layer
        self.trial.mixing.setdefault(None if layer is None else id(layer))

    def numbers(self, leaves):
        found = []
        for i, x in enumerate(leaves):
            if type(x) not in (int, float) or not x:
                continue
            if x % self.prime == 0:
                found.append((i, False))
            elif abs(x) < 1 and round(1 / x, 6) % self.prime == 0:
                found.append((i, True))
        return found

    def is_along_rows(self, name, args, kwargs, dims):
        position = ALONG[name]
        where = kwargs.get("dim", kwargs.get("dims"))
        if where is None and len(args) > position:
            where = args[position]
        if where is None:
            where = -1
        ndim = args[0].ndim
        where = where if isinstance(where, (list, tuple)) else [where]
        return any(w % ndim == dims[0][0] for w in where)


def _kind(name, leaves):
    if name in SUMS:
        return SUM
    if name in MEANS:
        return MEAN
    if name in LOSSES:
        reduction = [x for x in leaves if isinstance(x, str)] or ["mean"]
        return {"mean": MEAN, "sum": SUM}.get(reduction[0], GATHER)
    return GATHER


def _is_training(*args, training=None, **kwargs):
    # The sixth argument of torch's function and of its operator.
    return args[5] if len(args) > 5 else training
