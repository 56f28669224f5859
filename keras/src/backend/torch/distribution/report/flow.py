"""Where the cuts of weights go in a model: what `LayoutMap.auto` goes by.

The model is called once on tensors without memory. Each dim of each weight is a
*label*, and each operator of torch says which dims of its result have it: if
the weight is cut there, so is the result. So a layer's own algebra tells what
can be cut and what follows, not its class nor its name: heads are what is left
of a projection's outputs when they have gone through attention, since softmax
and products mix all other dims. Where a label ends, or two cuts meet, there is
communication: these are the *events*, whose bytes a layout is judged by.

An operator without a rule ends all labels. That may cost a better layout, and
never a number.
"""

import contextlib

import torch

from keras.src import backend
from keras.src import tree
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import StatelessScope
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.report import dry_run

NOTHING = frozenset()

ELEMENTWISE = frozenset(
    """
    abs add addcmul atan bernoulli bitwise_and bitwise_not clamp clone cos
    detach div elu empty_like eq erf exp fill ge gelu gt hardsigmoid hardswish
    hardtanh le leaky_relu lift_fresh log log1p logical_and logical_not
    logical_or lt masked_fill maximum minimum mish mul ne neg ones_like pow
    reciprocal relu rsqrt rsub sigmoid sign silu sin softplus sqrt square sub
    tanh to_copy where zeros_like alias contiguous copy
    """.split()
)
COPIES = frozenset(
    "alias clone contiguous copy detach empty_like lift_fresh to_copy".split()
)
SUMS = frozenset(["add", "sub", "rsub"])
# They mix all entries of a dim: the index of the argument that names it.
ALONG = {
    "softmax": 1,
    "safe_softmax": 1,
    "log_softmax": 1,
    "cumsum": 1,
    "topk": 2,
    "sort": 1,
    "slice": 1,
    "split": 2,
    "split_with_sizes": 2,
    "index_select": 1,
    "gather": 1,
    "select": 1,
    "unbind": 1,
    "flip": 1,
    "roll": 2,
}
REMOVES = ("select", "unbind")
REDUCTIONS = ("sum", "mean", "amax", "amin", "prod", "var", "all", "any")


class Event(dict):
    """A place where cuts may make processes communicate.

    Its "kind" says what, "labels" (and "others") which cuts, and "bytes" (and
    "more") how large the tensors are.
    """


class Flow(private.DispatchMode):
    """Within it, operators hand on the labels of weights.

    Args:
        shards: int, into how many parts weights would be cut.

    Attributes:
        events: list of `Event`s.
        follows: dict from labels of weights that are added to, or multiply,
            activations, to the labels of the dims that they meet.
    """

    def __init__(self, shards):
        super().__init__()
        self.shards = shards
        self.events, self.follows = [], {}
        self._labels, self._origins, self._weights = {}, {}, {}
        self._kept = []  # No other tensor gets the id of one of these.

    def add_weight(self, index, x):
        """Makes the dims of a weight labels."""
        self._put(x, [frozenset([(index, d)]) for d in range(x.ndim)])
        self._weights[id(x)] = index

    def labels(self, x):
        """A set of labels for each dim, None of what hangs on no weight."""
        return self._labels.get(id(x))

    def output(self, x):
        """What leaves the model is gathered."""
        for labels in self.labels(x) or ():
            self._event("gather", labels, _bytes(x))

    def _put(self, x, labels, origin=None, weight=None):
        if x.is_floating_point() or x.is_complex():
            self._labels[id(x)] = list(labels)
            self._origins[id(x)] = id(x) if origin is None else origin
            if weight is not None:
                self._weights[id(x)] = weight
            self._kept.append(x)

    def _event(self, kind, labels, size, others=NOTHING, more=0, origin=None):
        if labels or others:
            self.events.append(
                Event(
                    kind=kind,
                    labels=labels,
                    others=others,
                    bytes=size,
                    more=more,
                    origin=origin,
                )
            )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1].strip("_")
        tensors = [x for x in _flat(args) if self.labels(x) is not None]
        outputs = _flat([result])
        if tensors and outputs:
            try:
                self._follow(name, args, kwargs or {}, tensors, outputs)
            except (IndexError, TypeError, ValueError, KeyError):
                # Other arguments than the rule knows.
                self._end_all(tensors, outputs)
        return result

    def _follow(self, name, args, kwargs, tensors, outputs):
        x, out = tensors[0], outputs[0]
        if name in ("view", "unsafe_view", "reshape"):
            self._as(x, out, self._reshaped(x, tuple(out.shape)))
        elif name in ("permute", "transpose", "t", "unsqueeze", "squeeze"):
            self._as(x, out, self._moved(name, x, args, out))
        elif name == "expand":
            held = [NOTHING] * (out.ndim - x.ndim) + self.labels(x)
            self._as(x, out, held)
        elif name in ELEMENTWISE:
            self._elementwise(name, _flat(args), out)
        elif name in ("mm", "bmm"):
            self._product(args[0], args[1], out)
        elif name in ("addmm", "baddbmm"):
            self._product(args[1], args[2], out)
            if id(args[0]) in self._weights:
                self._follows(args[0], self.labels(out))
        elif name == "embedding":
            self._lookup(args[0], out)
        elif name in ("convolution", "conv_depthwise3d"):
            self._convolution(args, out)
        elif name == "native_layer_norm":
            dims = range(x.ndim - len(args[1]), x.ndim)
            self._mixed(x, [out], dims)
        elif name.startswith(("max_pool", "avg_pool", "adaptive_avg_pool")):
            self._mixed(x, [out], range(2, x.ndim))
        elif "batch_norm" in name:
            self._mixed(x, [out], [0, *range(2, x.ndim)])
        elif "scaled_dot_product" in name:
            self._attention(args, out)
        elif name in REDUCTIONS:
            self._reduced(name, x, args, kwargs, out)
        elif name in ("cat", "stack"):
            self._joined(name, args, kwargs, out)
        elif name in ("constant_pad_nd", "repeat"):
            same = [a == b for a, b in zip(x.shape, out.shape)]
            self._mixed(
                x, [out], [d for d, is_same in enumerate(same) if not is_same]
            )
        elif name in ALONG:
            self._along(name, x, args, kwargs, outputs)
        else:
            self._end_all(tensors, outputs)

    # ---- rules

    def _as(self, x, out, labels):
        """A view, or a copy: of the same origin."""
        self._put(out, labels, self._origins[id(x)], self._weights.get(id(x)))

    def _end(self, x, dims):
        for dim in dims:
            self._event("gather", self.labels(x)[dim], _bytes(x))

    def _end_all(self, tensors, outputs):
        for x in tensors:
            self._end(x, range(x.ndim))
        for out in outputs:
            self._put(out, [NOTHING] * out.ndim)

    def _mixed(self, x, outputs, dims):
        """All but some dims are handed on."""
        dims = [d % x.ndim for d in dims]
        self._end(x, dims)
        for out in outputs:
            held = [
                NOTHING if d in dims else labels
                for d, labels in enumerate(self.labels(x))
            ]
            self._put(out, held)

    def _moved(self, name, x, args, out):
        held = list(self.labels(x))
        if name == "permute":
            return [held[d] for d in args[1]]
        if name == "t":
            return held[::-1]
        if name == "transpose":
            a, b = args[1:3]
            held[a], held[b] = held[b], held[a]
            return held
        if name == "unsqueeze":
            held.insert(args[1] % out.ndim, NOTHING)
            return held
        return self._reshaped(x, tuple(out.shape))

    def _reshaped(self, x, shape):
        """Labels stay with the first of the dims that are joined, or split."""
        held = [NOTHING] * len(shape)
        for sources, targets in _groups(tuple(x.shape), shape):
            for i, source in enumerate(sources):
                labels = self.labels(x)[source]
                if not labels:
                    continue
                fits = targets and all(
                    n % self.shards == 0
                    for n in (x.shape[source], shape[targets[0]])
                )
                if i == 0 and fits:
                    held[targets[0]] = labels
                else:
                    self._end(x, [source])
        return held

    def _elementwise(self, name, given, out):
        known = [x for x in given if self.labels(x) is not None]
        weights = [x for x in known if id(x) in self._weights]
        others = [x for x in known if id(x) not in self._weights]
        if len(known) == 1:
            held = self._aligned(known[0], out)
            if name in COPIES or weights:
                self._as(known[0], out, held)
            else:
                self._put(out, held)
            return
        if not others:
            # A weight beside a weight: neither is laid out alone.
            self._end_all(weights, [out])
            return
        held = self._aligned(others[0], out)
        for x in others[1:]:
            theirs = self._aligned(x, out)
            for d, (a, b) in enumerate(zip(held, theirs)):
                if out.shape[d] == 1 or a == b:
                    continue
                if name in SUMS:
                    # Branches meet again: what flows on is whole.
                    self._event("gather", a, _bytes(out))
                    self._event("gather", b, _bytes(out))
                    held[d] = NOTHING
                else:
                    self._event("meet", a, _bytes(out), b, _bytes(x))
                    held[d] = a | b
        for x in weights:
            self._follows(x, held)
        self._put(out, held)

    def _follows(self, weight, held):
        first = len(held) - weight.ndim
        for d, mine in enumerate(self.labels(weight)):
            for label in mine:
                self.follows.setdefault(label, set()).add(held[first + d])

    def _aligned(self, x, out):
        held = [NOTHING] * (out.ndim - x.ndim) + list(self.labels(x))
        return [
            NOTHING if d >= out.ndim - x.ndim and _size(x, out, d) == 1 else a
            for d, a in enumerate(held)
        ]

    def _product(self, a, b, out):
        """(..., m, k) x (..., k, n)."""
        held = [NOTHING] * out.ndim
        left, right = self.labels(a), self.labels(b)
        if left is not None:
            held[-2] = left[-2]
        if right is not None:
            held[-1] = right[-1]
        for d in range(out.ndim - 2):
            pair = [x[d] for x in (left, right) if x is not None]
            if len(pair) == 2 and pair[0] != pair[1]:
                self._event("meet", pair[0], _bytes(a), pair[1], _bytes(b))
            held[d] = NOTHING.union(*pair)
        self._contracted(
            a,
            b,
            NOTHING if left is None else left[-1],
            NOTHING if right is None else right[-2],
            out,
        )
        if id(b) in self._weights:
            self._column(a, left and left[-1], right[-1], out)
        elif id(a) in self._weights:
            self._column(b, right and right[-2], left[-2], out)
        self._put(out, held)

    def _contracted(self, a, b, left, right, out):
        """A sum over a dim that both have: "sum", or one is gathered."""
        if id(a) in self._weights:
            a, b, left, right = b, a, right, left
        # What hangs on no weight has no gradient to gather.
        more = 0 if self.labels(a) is None else _bytes(a)
        self._event("contract", left, _bytes(out), right, more)

    def _column(self, x, inner, labels, out):
        """Outputs that a weight's cut cuts: the gradient of what it was handed
        is a sum, once for all weights that were handed the same."""
        if self.labels(x) is not None:
            self._event(
                "column",
                labels,
                _bytes(x),
                inner or NOTHING,
                origin=self._origins[id(x)],
            )

    def _lookup(self, table, out):
        rows, width = self.labels(table)
        self._event("sum", rows, _bytes(out))
        self._put(out, [NOTHING] * (out.ndim - 1) + [width])

    def _convolution(self, args, out):
        x, kernel, groups = args[0], args[1], args[8]
        theirs, mine = self.labels(x), self.labels(kernel)
        held = [NOTHING] * out.ndim
        inner = NOTHING if theirs is None else theirs[1]
        if mine is None or args[6] or groups > 1:
            self._end_all(
                [t for t in (x, kernel) if self.labels(t) is not None], [out]
            )
            return
        held[1] = mine[0]
        self._contracted(x, kernel, inner, mine[1], out)
        self._column(x, inner, mine[0], out)
        for labels in mine[2:]:
            self._event("gather", labels, _bytes(kernel))
        self._put(out, held)

    def _attention(self, args, out):
        """Queries, keys and values of shape (rows, heads, length, size)."""
        given = [x for x in args[:3] if isinstance(x, torch.Tensor)]
        given = [x for x in given if self.labels(x) is not None]
        held = [NOTHING] * out.ndim
        for d in (0, 1):
            for x in given:
                held[d] = held[d] | self.labels(x)[d]
            for x in given:
                if self.labels(x)[d] != held[d]:
                    rest = held[d] - self.labels(x)[d]
                    self._event("meet", rest, 0, self.labels(x)[d], _bytes(x))
        for x in given:
            self._end(x, [2, 3])
        self._put(out, held)

    def _reduced(self, name, x, args, kwargs, out):
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if dims is None or dims == []:
            dims = list(range(x.ndim))
        dims = [dims] if isinstance(dims, int) else list(dims)
        dims = [d % x.ndim for d in dims]
        for d in dims:
            kind = "sum" if name in ("sum", "mean") else "gather"
            size = _bytes(out) if kind == "sum" else _bytes(x)
            self._event(kind, self.labels(x)[d], size)
        held = list(self.labels(x))
        if out.ndim == x.ndim:
            held = [NOTHING if d in dims else a for d, a in enumerate(held)]
        else:
            held = [a for d, a in enumerate(held) if d not in dims]
        self._put(out, held)

    def _along(self, name, x, args, kwargs, outputs):
        place = ALONG[name]
        dim = args[place] if len(args) > place else kwargs.get("dim", 0)
        dims = [dim] if isinstance(dim, int) else list(dim)
        dims = [d % x.ndim for d in dims]
        if name == "slice" and outputs[0].shape == x.shape:
            self._as(x, outputs[0], self.labels(x))
            return
        self._end(x, dims)
        held = [
            NOTHING if d in dims else a for d, a in enumerate(self.labels(x))
        ]
        if name in REMOVES:
            del held[dims[0]]
        for out in outputs:
            self._put(out, held)

    def _joined(self, name, args, kwargs, out):
        given = _flat(args[0])
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        dim %= out.ndim
        held = [NOTHING] * out.ndim
        for x in given:
            mine = self.labels(x)
            if mine is None:
                continue
            if name == "stack":
                mine = [*mine[:dim], NOTHING, *mine[dim:]]
            elif mine[dim]:
                self._event("gather", mine[dim], _bytes(x))
            for d in range(out.ndim):
                if d != dim:
                    held[d] = held[d] | mine[d]
        self._put(out, held)


def _flat(values):
    """The tensors of nested lists and tuples."""
    found = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += _flat(x)
    return found


def _bytes(x):
    return x.numel() * x.element_size()


def _size(x, out, dim):
    return x.shape[dim - (out.ndim - x.ndim)]


def _groups(a, b):
    """Pairs of lists of dims, of two shapes of one size, that are joined or
    split into each other. Dims of size 1 belong to none."""
    left = [d for d, n in enumerate(a) if n != 1]
    right = [d for d, n in enumerate(b) if n != 1]
    while left and right:
        sources, targets = [left.pop(0)], [right.pop(0)]
        x, y = a[sources[0]], b[targets[0]]
        while x != y:
            if x < y:
                sources.append(left.pop(0))
                x *= a[sources[-1]]
            else:
                targets.append(right.pop(0))
                y *= b[targets[-1]]
        yield sources, targets


class _Meta(str):
    """The name of the device of tensors without memory, which Keras's own code
    does not know: there it would make up results of operators."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return other is self

    def __ne__(self, other):
        return other is not self


@contextlib.contextmanager
def _on_meta():
    before = global_state.get_global_attribute("torch_device", None)
    global_state.set_global_attribute("torch_device", _Meta("meta"))
    try:
        yield
    finally:
        global_state.set_global_attribute("torch_device", before)


def make(model):
    """A built model, without memory where it can be built so.

    Args:
        model: a model, or a function that makes one.
    """
    if not dry_run.is_function(model):
        return model
    try:
        with dry_run.own_session(), backend.device_scope("meta"):
            return model()
    except Exception:
        # It asks for a number as it is built, or fails without this as well.
        with dry_run.own_session():
            return model()


def trace(model, shards, rows=None, x=None):
    """Calls a model once.

    Args:
        model: a built model.
        shards: int, into how many parts weights would be cut.
        rows: int, of a batch of one data shard.
        x: a batch, where its shape is not known from the model.

    Returns:
        Tuple of the list of weights, in the order of the indices that labels
        have, and the `Flow`.
    """
    weights = list({id(v): v for v in model.variables}.values())
    flow = Flow(shards)
    mapping = []
    for index, v in enumerate(weights):
        value = v._value
        stand_in = torch.empty(tuple(v.shape), dtype=value.dtype, device="meta")
        if stand_in.is_floating_point() and stand_in.ndim:
            flow.add_weight(index, stand_in)
        mapping.append((v, stand_in))
    batch = dry_run.inputs_of(model, rows) if x is None else x
    batch = tree.map_structure(
        lambda each: torch.empty(
            each.shape if x is None else (rows, *each.shape[1:]),
            dtype=getattr(torch, backend.standardize_dtype(each.dtype)),
            device="meta",
        ),
        batch,
    )
    # Keras copies what it converts there, in the sight of `flow`.
    with torch.no_grad(), _on_meta(), flow:
        with StatelessScope(state_mapping=mapping):
            outputs = model(batch)
    for out in tree.flatten(outputs):
        flow.output(out)
    return weights, flow
