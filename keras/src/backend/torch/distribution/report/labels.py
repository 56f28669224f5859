"""The labels of tensors, and what happens where they end: see `flow`."""

import torch

from keras.src.backend.torch.distribution.report import factors
from keras.src.backend.torch.distribution.report.factors import NOTHING
from keras.src.backend.torch.distribution.report.factors import PLAIN


class Labels:
    """Which dims of tensors have which labels.

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
        return labels_of_dims(self.dims(x) or ())

    def output(self, x):
        """What leaves the model is gathered."""
        if self.dims(x) is not None:
            self._end(x, range(x.ndim))

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
                self._event("gather", labels, bytes_of(x), self._labels(x))

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
        self._event("gather", lost, bytes_of(like), self._labels(like))
        return found

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

    def _both_known(self, a, b):
        return self.dims(a) is not None and self.dims(b) is not None


def tensors_in(values):
    """The tensors of nested lists and tuples."""
    found = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(x)
    return found


def labels_of_dims(dims):
    return NOTHING.union(*map(factors.labels_of, dims))


def bytes_of(x):
    return x.numel() * x.element_size()


def size_in(x, out, dim):
    """The size of `x` where a result has `dim`, 1 where it lacks it."""
    dim -= out.ndim - x.ndim
    return x.shape[dim] if dim >= 0 else 1
