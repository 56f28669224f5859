"""Cuts of weights over the model axes of a mesh: see `auto_layout`."""

import math

from keras.src.distribution.layout_facts import bytes_of
from keras.src.distribution.layout_search import WORTH
from keras.src.distribution.layout_search import Search


class Plan:
    """The best cuts that are found, axis by axis, the largest first.

    Args:
        weights: list of variables.
        traced: function from a number of shards to the `Flow` of the weights.
        sizes: dict from the names of model axes to their sizes.

    Attributes:
        axes: list with, for each weight, a list of the name of the axis that
            cuts each dim, or None.
        second: dict from axes to what comes next, as `Search.best` has it.
    """

    def __init__(self, weights, traced, sizes):
        self.weights, self.sizes = weights, sizes
        self._traced, self._sent = traced, None
        self.axes = [[None] * len(v.shape) for v in weights]
        self.second = {}
        for axis in sorted(sizes, key=sizes.get, reverse=True):
            search = self._search(axis)
            decisions, self.second[axis] = search.best()
            self._cut(search, decisions, axis)

    def _search(self, axis):
        """The search over one axis, where the others cut as they do."""
        others = [
            (self.cut_by(other), size)
            for other, size in self.sizes.items()
            if other != axis
        ]
        shards = self.sizes[axis]
        return Search(self.weights, self._traced(shards), shards, others)

    def cut_by(self, axis):
        """The labels of dims that an axis cuts."""
        return frozenset(
            (i, dim)
            for i, names in enumerate(self.axes)
            for dim, name in enumerate(names)
            if name == axis
        )

    def sent(self):
        """Dict from axes to the bytes that a process sends in a step."""
        if self._sent is None:
            self._sent = {
                axis: self._search(axis).sent_by(self.cut_by(axis))
                for axis in self.sizes
            }
        return self._sent

    def held(self):
        """Bytes of weights that a process stores."""
        return sum(
            bytes_of(v, v.shape) / math.prod(self.sizes[n] for n in cut if n)
            for v, cut in zip(self.weights, self.axes)
        )

    def cost(self):
        return sum(self.sent().values()) + WORTH * self.held()

    def _cut(self, search, decisions, axis):
        for group, dim in zip(search.groups, decisions):
            if dim is not None:
                for i in group.members:
                    self.axes[i][dim] = axis
        # What is added to activations is cut as they are.
        cut = self.cut_by(axis)
        for i in range(len(self.weights)):
            dim = self._followed(i, search, cut)
            if dim is not None:
                self.axes[i][dim] = axis

    def _followed(self, i, search, cut):
        """The dim of a weight that lies as the activations which it meets,
        None if there is none."""
        if any(self.axes[i]):
            return None
        for dim, size in enumerate(self.weights[i].shape):
            met = search.flow.follows.get((i, dim), ())
            if met and size % search.shards == 0:
                if all(labels & cut for labels in met):
                    return dim
        return None
