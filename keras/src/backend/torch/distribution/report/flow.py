"""Where the cuts of weights go in a model: what `LayoutMap.auto` goes by.

Each dim of each weight is a *label*, and each operator of torch says which
dims of its result have it: if the weight is cut there, so is the result. So a
layer's own algebra tells what can be cut and what follows, not its class nor
its name: heads are what is left of a projection's outputs when they have gone
through attention, since softmax and products mix all other dims. Where a label
ends, or two cuts meet, there is communication: these are the *events*, by
whose bytes a layout is judged.

An operator without a rule ends all labels. That may cost a better layout, and
never a number.
"""

import torch

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.report import factors
from keras.src.backend.torch.distribution.report.factors import NOTHING
from keras.src.backend.torch.distribution.report.factors import PLAIN

COPIES = frozenset(
    "alias clone contiguous copy detach empty_like lift_fresh to_copy".split()
)
ELEMENTWISE = COPIES | frozenset(
    """
    abs add addcmul atan bernoulli bitwise_and bitwise_not clamp cos div elu eq
    erf exp fill ge gelu gt hardsigmoid hardswish hardtanh le leaky_relu log
    log1p logical_and logical_not logical_or lt masked_fill maximum minimum mish
    mul ne neg ones_like pow reciprocal relu rsqrt rsub sigmoid sign silu sin
    softplus sqrt square sub tanh where zeros_like
    """.split()
)
SUMS = frozenset(["add", "sub", "rsub"])
# They mix, or take apart, a dim: the index of the argument that names it.
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
REMOVE = ("select", "unbind")
REDUCE = ("sum", "mean", "amax", "amin", "prod", "var", "all", "any")


class Flow(private.DispatchMode):
    """Within it, operators hand on the labels of weights.

    Args:
        shards: int, into how many parts weights would be cut.

    Attributes:
        events: list of dicts. "kind" says what happens, "labels" and "others"
            by which cuts, "bytes" and "more" how large the tensors are:
            `gather`, what is cut is made whole; `sum`, what is partial is
            added up; `meet`, two tensors, of which one may be whole;
            `contract`, activations ("labels") and a weight ("others") on a dim
            that is summed over, with bytes of the result and of activations;
            `column`, a weight's outputs, with the bytes of what it was handed,
            whose "origin" tells which were handed the same. "around" and
            "more_around" are all labels of the tensors of "bytes" and "more":
            where another axis cuts by one of them, there are fewer bytes.
        follows: dict from labels of weights that are added to, or multiply,
            activations, to a set of the labels that they meet.
    """

    def __init__(self, shards):
        super().__init__()
        self.shards = shards
        self.events, self.follows = [], {}
        self._dims, self._origins, self._weights = {}, {}, set()
        self._kept = []  # No other tensor gets the id of one of these.

    def add_weight(self, index, x):
        """Makes the dims of a weight labels, pairs of its index and a dim."""
        dims = [((n, frozenset([(index, d)])),) for d, n in enumerate(x.shape)]
        self._put(x, dims, is_weight=True)

    def dims(self, x):
        """The factors of each dim, None of what hangs on no weight."""
        return self._dims.get(id(x))

    def _labels(self, x):
        return _labels_of(self.dims(x) or ())

    def output(self, x):
        """What leaves the model is gathered."""
        if self.dims(x) is not None:
            self._end(x, range(x.ndim))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1].strip("_")
        known = [x for x in tensors_in(args) if self.dims(x) is not None]
        outputs = tensors_in([result])
        if known and outputs:
            try:
                self._follow(name, args, kwargs or {}, known, outputs)
            except (IndexError, TypeError, ValueError, KeyError):
                # Other arguments than the rule knows.
                self._end_all(known, outputs)
        return result

    def _follow(self, name, args, kwargs, known, outputs):
        x, out = known[0], outputs[0]
        if "norm" in name and x is not args[0]:
            # Of data: its weights meet no label.
            self._put(out, [PLAIN] * out.ndim)
        elif name in ("view", "unsafe_view", "reshape", "squeeze"):
            self._view(x, out, self._regrouped(x, out))
        elif name in ("permute", "transpose", "t", "unsqueeze"):
            self._view(x, out, self._moved(name, x, args, out))
        elif name == "expand":
            dims = [PLAIN] * (out.ndim - x.ndim) + self.dims(x)
            self._view(x, out, dims)
        elif name in ELEMENTWISE:
            self._elementwise(name, tensors_in(args), out)
        elif name in ("mm", "bmm"):
            self._product(args[0], args[1], out)
        elif name in ("addmm", "baddbmm"):
            self._product(args[1], args[2], out)
            if id(args[0]) in self._weights:
                self._follows(args[0], self.dims(out))
        elif name == "embedding":
            self._lookup(args[0], out)
        elif name == "convolution":
            self._convolution(args, out)
        elif name == "native_layer_norm":
            self._mixed(x, [out], range(x.ndim - len(args[1]), x.ndim))
        elif name.startswith(("max_pool", "avg_pool", "adaptive_avg_pool")):
            self._mixed(x, [out], range(2, x.ndim))
        elif "batch_norm" in name:
            self._mixed(x, [out], [0, *range(2, x.ndim)])
        elif "scaled_dot_product" in name:
            self._attention(args, out)
        elif name in REDUCE:
            self._reduced(name, x, args, kwargs, out)
        elif name in ("cat", "stack"):
            self._joined(name, args, kwargs, out)
        elif name in ("constant_pad_nd", "repeat"):
            unlike = [d for d in range(x.ndim) if x.shape[d] != out.shape[d]]
            self._mixed(x, [out], unlike)
        elif name in ALONG:
            self._along(name, x, args, kwargs, outputs)
        else:
            self._end_all(known, outputs)

    # ---- what rules stand on

    def _put(self, x, dims, origin=None, is_weight=False):
        if x.is_floating_point() or x.is_complex():
            self._dims[id(x)] = list(dims)
            self._origins[id(x)] = id(x) if origin is None else origin
            if is_weight:
                self._weights.add(id(x))
            self._kept.append(x)

    def _view(self, x, out, dims):
        """What is the same tensor to whom it is handed."""
        self._put(out, dims, self._origins[id(x)], id(x) in self._weights)

    def _event(
        self,
        kind,
        labels,
        size,
        around,
        others=NOTHING,
        more=0,
        more_around=NOTHING,
        origin=None,
    ):
        if labels or others:
            event = {"kind": kind, "labels": labels, "others": others}
            event |= {"bytes": size, "more": more, "origin": origin}
            event |= {"around": around, "more_around": more_around}
            self.events.append(event)

    def _end(self, x, dims):
        for dim in dims:
            for _, labels in self.dims(x)[dim]:
                self._event("gather", labels, _bytes(x), self._labels(x))

    def _end_all(self, known, outputs):
        for x in known:
            self._end(x, range(x.ndim))
        for out in outputs:
            self._put(out, [PLAIN] * out.ndim)

    def _mixed(self, x, outputs, dims):
        """All but some dims are handed on."""
        dims = [d % x.ndim for d in dims]
        self._end(x, dims)
        for out in outputs:
            self._put(out, self._without(x, dims))

    def _without(self, x, dims):
        return [
            PLAIN if d in dims else dim for d, dim in enumerate(self.dims(x))
        ]

    def _pairs(self, a, b, size, like):
        """`factors.pairs`; what is lost is gathered."""
        found, lost = factors.pairs(a, b, size, self.shards)
        self._event("gather", lost, _bytes(like), self._labels(like))
        return found

    # ---- rules

    def _moved(self, name, x, args, out):
        dims = list(self.dims(x))
        if name == "permute":
            return [dims[d] for d in args[1]]
        if name == "t":
            return dims[::-1]
        if name == "transpose":
            a, b = args[1:3]
            dims[a], dims[b] = dims[b], dims[a]
        else:
            dims.insert(args[1] % out.ndim, PLAIN)
        return dims

    def _regrouped(self, x, out):
        dims, lost = factors.regroup(
            self.dims(x), tuple(x.shape), tuple(out.shape), self.shards
        )
        self._event("gather", lost, _bytes(x), self._labels(x))
        return dims

    def _elementwise(self, name, given, out):
        known = [x for x in given if self.dims(x) is not None]
        weights = [x for x in known if id(x) in self._weights]
        others = [x for x in known if id(x) not in self._weights]
        if not others:
            # Weights together are one: what it meets, each of them follows.
            dims = self._aligned(weights[0], out)
            for x in weights[1:]:
                theirs = self._aligned(x, out)
                for d, n in enumerate(out.shape):
                    found = self._pairs(dims[d], theirs[d], n, out)
                    dims[d] = factors.dim_of(found)
            self._view(weights[0], out, dims)
            return
        dims = self._aligned(others[0], out)
        for x in others[1:]:
            theirs = self._aligned(x, out)
            for d, n in enumerate(out.shape):
                if n > 1 and _size(x, out, d) == n and dims[d] != theirs[d]:
                    dims[d] = self._met(name, dims[d], theirs[d], n, x, out)
        for x in weights:
            self._follows(x, dims)
        if name in COPIES:
            self._view(others[0], out, dims)
        else:
            self._put(out, dims)

    def _met(self, name, a, b, size, x, out):
        """The dim of a result, of two activations that differ in it."""
        found, around = self._pairs(a, b, size, out), self._labels(x)
        for _, mine, theirs in found:
            if name in SUMS:
                # Branches meet again: what flows on is whole.
                self._event("gather", mine, _bytes(out), around)
                self._event("gather", theirs, _bytes(out), around)
            elif mine != theirs:
                sizes = _bytes(out), _bytes(x)
                self._met_in(mine, theirs, sizes, (around, around))
        return PLAIN if name in SUMS else factors.dim_of(found)

    def _met_in(self, mine, theirs, sizes, around):
        size, more = sizes
        self._event("meet", mine, size, around[0], theirs, more, around[1])

    def _aligned(self, x, out):
        first = out.ndim - x.ndim
        dims = [PLAIN] * first + list(self.dims(x))
        return [
            PLAIN if d >= first and x.shape[d - first] == 1 else dim
            for d, dim in enumerate(dims)
        ]

    def _follows(self, weight, dims):
        first = len(dims) - weight.ndim
        for d, mine in enumerate(self.dims(weight)):
            for label in factors.labels_of(mine):
                met = factors.labels_of(dims[first + d])
                self.follows.setdefault(label, set()).add(met)

    def _product(self, a, b, out):
        """(..., m, k) times (..., k, n)."""
        dims = [PLAIN] * out.ndim
        left = self.dims(a) or [PLAIN] * a.ndim
        right = self.dims(b) or [PLAIN] * b.ndim
        dims[-2], dims[-1] = left[-2], right[-1]
        for d in range(out.ndim - 2):
            found = self._pairs(left[d], right[d], out.shape[d], out)
            for _, mine, theirs in found:
                if mine != theirs and self._both_known(a, b):
                    around = self._labels(a), self._labels(b)
                    sizes = _bytes(a), _bytes(b)
                    self._met_in(mine, theirs, sizes, around)
            dims[d] = factors.dim_of(found)
        if id(a) in self._weights:
            a, b = b, a
            left, right = right, left
            left = [*left[:-2], left[-1], left[-2]]
            right = [*right[:-2], right[-1], right[-2]]
        around = _labels_of(dims)
        self._contracted(a, left[-1], right[-2], b.shape[-2], out, around)
        if id(b) in self._weights:
            self._column(a, left[-1], right[-1])
        self._put(out, dims)

    def _both_known(self, a, b):
        return self.dims(a) is not None and self.dims(b) is not None

    def _contracted(self, x, left, right, size, out, around):
        """A sum over a dim that activations and a weight have."""
        # What hangs on no weight has no gradient to gather.
        more = 0 if self.dims(x) is None else _bytes(x)
        sizes = [n for n, _ in left or right]
        size = size if not sizes else _product_of(sizes)
        for _, mine, theirs in self._pairs(left, right, size, out):
            self._event(
                "contract",
                mine,
                _bytes(out),
                around,
                theirs,
                more,
                self._labels(x),
            )

    def _column(self, x, inner, dim):
        """Outputs that a weight's cut cuts: the gradient of what it was handed
        is a sum, once for all weights that were handed the same."""
        if self.dims(x) is None:
            return
        inner, origin = factors.labels_of(inner), self._origins[id(x)]
        for _, labels in dim:
            if labels:
                self._event(
                    "column",
                    labels,
                    _bytes(x),
                    self._labels(x),
                    inner,
                    origin=origin,
                )

    def _lookup(self, table, out):
        rows, width = self.dims(table)
        around = factors.labels_of(width)
        self._event("sum", factors.labels_of(rows), _bytes(out), around)
        self._put(out, [PLAIN] * (out.ndim - 1) + [width])

    def _convolution(self, args, out):
        x, kernel, is_transposed, groups = args[0], args[1], args[6], args[8]
        mine = self.dims(kernel)
        if mine is None or is_transposed or groups > 1:
            known = [t for t in (x, kernel) if self.dims(t) is not None]
            self._end_all(known, [out])
            return
        inner = PLAIN if self.dims(x) is None else self.dims(x)[1]
        around = factors.labels_of(mine[0])
        self._contracted(x, inner, mine[1], x.shape[1], out, around)
        self._column(x, inner, mine[0])
        self._end(kernel, range(2, kernel.ndim))
        self._put(out, [PLAIN, mine[0], *[PLAIN] * (out.ndim - 2)])

    def _attention(self, args, out):
        """Queries, keys and values of shape (rows, heads, length, size)."""
        given = [x for x in tensors_in(args[:3]) if self.dims(x) is not None]
        dims = self._without(given[0], [2, 3])
        for x in given:
            self._end(x, [2, 3])
        for x in given[1:]:
            for d in (0, 1):
                if self.dims(x)[d] != dims[d] and x.shape[d] == out.shape[d]:
                    theirs = self.dims(x)[d]
                    dims[d] = self._met("", dims[d], theirs, out.shape[d], x, x)
        self._put(out, dims)

    def _reduced(self, name, x, args, kwargs, out):
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if dims is None or dims == []:
            dims = list(range(x.ndim))
        dims = [dims] if isinstance(dims, int) else dims
        dims = [d % x.ndim for d in dims]
        held = self._without(x, dims)
        if name in ("sum", "mean"):
            for d in dims:
                labels = factors.labels_of(self.dims(x)[d])
                self._event("sum", labels, _bytes(out), _labels_of(held))
        else:
            self._end(x, dims)
        if out.ndim < x.ndim:
            held = [dim for d, dim in enumerate(held) if d not in dims]
        self._put(out, held)

    def _along(self, name, x, args, kwargs, outputs):
        place = ALONG[name]
        dims = args[place] if len(args) > place else kwargs.get("dim", 0)
        dims = [dims] if isinstance(dims, int) else dims
        if name == "slice" and outputs[0].shape == x.shape:
            self._view(x, outputs[0], self.dims(x))
            return
        dims = [d % x.ndim for d in dims]
        self._end(x, dims)
        held = self._without(x, dims)
        if name in REMOVE:
            del held[dims[0]]
        for out in outputs:
            self._put(out, held)

    def _joined(self, name, args, kwargs, out):
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        dim %= out.ndim
        held = None
        for x in tensors_in(args[0]):
            if self.dims(x) is None:
                continue
            mine = list(self.dims(x))
            if name == "stack":
                mine.insert(dim, PLAIN)
            else:
                self._end(x, [dim])
                mine[dim] = PLAIN
            if held is None:
                held = mine
                continue
            for d, n in enumerate(out.shape):
                if d != dim and held[d] != mine[d]:
                    held[d] = self._met("", held[d], mine[d], n, x, x)
        self._put(out, held)


def tensors_in(values):
    """The tensors of nested lists and tuples."""
    found = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(x)
    return found


def _labels_of(dims):
    return NOTHING.union(*map(factors.labels_of, dims))


def _bytes(x):
    return x.numel() * x.element_size()


def _size(x, out, dim):
    """The size of `x` where a result has `dim`, 1 where it lacks it."""
    dim -= out.ndim - x.ndim
    return x.shape[dim] if dim >= 0 else 1


def _product_of(sizes):
    product = 1
    for n in sizes:
        product *= n
    return product
