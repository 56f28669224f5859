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

import math

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.report import factors
from keras.src.backend.torch.distribution.report import kinds
from keras.src.backend.torch.distribution.report.factors import PLAIN
from keras.src.backend.torch.distribution.report.labels import Labels
from keras.src.backend.torch.distribution.report.labels import bytes_of
from keras.src.backend.torch.distribution.report.labels import labels_of_dims
from keras.src.backend.torch.distribution.report.labels import size_in
from keras.src.backend.torch.distribution.report.labels import tensors_in


class Flow(Labels, private.DispatchMode):
    """Within it, operators hand on the labels of weights: see `Labels`."""

    def __init__(self, shards):
        private.DispatchMode.__init__(self)
        Labels.__init__(self, shards)

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
        elif name in kinds.ELEMENTWISE:
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
        elif name in kinds.REDUCE:
            self._reduced(name, x, args, kwargs, out)
        elif name in ("cat", "stack"):
            self._joined(name, args, kwargs, out)
        elif name in ("constant_pad_nd", "repeat"):
            unlike = [d for d in range(x.ndim) if x.shape[d] != out.shape[d]]
            self._mixed(x, [out], unlike)
        elif name in kinds.ALONG:
            self._along(name, x, args, kwargs, outputs)
        else:
            self._end_all(known, outputs)

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
        self._event("gather", lost, bytes_of(x), self._labels(x))
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
                if n > 1 and size_in(x, out, d) == n and dims[d] != theirs[d]:
                    dims[d] = self._met(name, dims[d], theirs[d], n, x, out)
        for x in weights:
            self._follows(x, dims)
        if name in kinds.COPIES:
            self._view(others[0], out, dims)
        else:
            self._put(out, dims)

    def _met(self, name, a, b, size, x, out):
        """The dim of a result, of two activations that differ in it."""
        found, around = self._pairs(a, b, size, out), self._labels(x)
        for _, mine, theirs in found:
            if name in kinds.SUMS:
                # Branches meet again: what flows on is whole.
                self._event("gather", mine, bytes_of(out), around)
                self._event("gather", theirs, bytes_of(out), around)
            elif mine != theirs:
                sizes = bytes_of(out), bytes_of(x)
                self._met_in(mine, theirs, sizes, (around, around))
        return PLAIN if name in kinds.SUMS else factors.dim_of(found)

    def _met_in(self, mine, theirs, sizes, around):
        size, more = sizes
        self._event("meet", mine, size, around[0], theirs, more, around[1])

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
                    sizes = bytes_of(a), bytes_of(b)
                    self._met_in(mine, theirs, sizes, around)
            dims[d] = factors.dim_of(found)
        if id(a) in self._weights:
            a, b = b, a
            left, right = right, left
            left = [*left[:-2], left[-1], left[-2]]
            right = [*right[:-2], right[-1], right[-2]]
        around = labels_of_dims(dims)
        self._contracted(a, left[-1], right[-2], b.shape[-2], out, around)
        if id(b) in self._weights:
            self._column(a, left[-1], right[-1])
        self._put(out, dims)

    def _contracted(self, x, left, right, size, out, around):
        """A sum over a dim that activations and a weight have."""
        # What hangs on no weight has no gradient to gather.
        more = 0 if self.dims(x) is None else bytes_of(x)
        sizes = [n for n, _ in left or right]
        size = size if not sizes else math.prod(sizes)
        for _, mine, theirs in self._pairs(left, right, size, out):
            self._event(
                "contract",
                mine,
                bytes_of(out),
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
                    bytes_of(x),
                    self._labels(x),
                    inner,
                    origin=origin,
                )

    def _lookup(self, table, out):
        rows, width = self.dims(table)
        around = factors.labels_of(width)
        self._event("sum", factors.labels_of(rows), bytes_of(out), around)
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
                self._event("sum", labels, bytes_of(out), labels_of_dims(held))
        else:
            self._end(x, dims)
        if out.ndim < x.ndim:
            held = [dim for d, dim in enumerate(held) if d not in dims]
        self._put(out, held)

    def _along(self, name, x, args, kwargs, outputs):
        place = kinds.ALONG[name]
        dims = args[place] if len(args) > place else kwargs.get("dim", 0)
        dims = [dims] if isinstance(dims, int) else dims
        if name == "slice" and outputs[0].shape == x.shape:
            self._view(x, outputs[0], self.dims(x))
            return
        dims = [d % x.ndim for d in dims]
        self._end(x, dims)
        held = self._without(x, dims)
        if name in kinds.REMOVE:
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
