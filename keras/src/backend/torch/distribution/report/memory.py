"""The memory of the tensors that a step makes."""

import weakref

import torch

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)


class Memory:
    """The memory of tensors that operators have made, from here on.

    Attributes:
        live, peak: ints, bytes now, and the most.
    """

    def __init__(self):
        self.live = self.peak = 0
        self._sizes, self._references, self._last = {}, {}, []

    def reset_peak(self):
        self.peak = self.live

    def before(self):
        """To be called before an operator: what was resized since the last
        one has its size by now."""
        for reference in self._last:
            memory = reference()
            if memory is not None:
                self._set(private.storage_key(memory), memory.nbytes())
        self._last = []
        self.peak = max(self.peak, self.live)

    def see(self, result, args, kwargs):
        """To be called with what an operator returns, and was handed."""
        # What was there before is written into, or viewed.
        there = set(map(private.storage_key, _memories((args, kwargs))))
        for memory in _memories(result):
            key = private.storage_key(memory)
            if key in self._references or key not in there:
                self._see(memory, key)

    def _see(self, memory, key):
        if key not in self._references:

            def freed(_, key=key):
                self._set(key, 0)
                self._sizes.pop(key, None)
                self._references.pop(key, None)

            self._references[key] = weakref.ref(memory, freed)
        self._last.append(self._references[key])
        self._set(key, memory.nbytes())

    def _set(self, key, size):
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size


def _memories(values):
    return [
        x.untyped_storage()
        for x in tensors_of(values)
        if x.layout is torch.strided
    ]


def tensors_of(values):
    """The tensors of nested lists, tuples and dicts. (Keras's `tree` leaves
    cycles behind, which would keep them.)"""
    found, todo = [], [values]
    while todo:
        x = todo.pop()
        if isinstance(x, (torch.Tensor, GlobalTensor)):
            found.append(x)
        elif isinstance(x, dict):
            todo.extend(x.values())
        elif isinstance(x, (list, tuple)):
            todo.extend(x)
    return found[::-1]
