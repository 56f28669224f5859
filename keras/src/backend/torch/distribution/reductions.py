"""What goes over our rows goes over all rows of a global batch.

What a trial found (see `trials`) is made global in the real run: a sum over our
rows becomes the sum over all, a mean the weighted mean, a number of rows that
enters the arithmetic the global one; for any other function that reduces rows
they are gathered.
"""

import collections
import contextlib
import logging
import weakref

import torch
from torch.overrides import TorchFunctionMode

from keras.src import tree
from keras.src.backend.torch.distribution import process_group
from keras.src.backend.torch.distribution import rows as rows_lib
from keras.src.backend.torch.distribution import sharded
from keras.src.backend.torch.distribution import statistics
from keras.src.backend.torch.distribution import trials

logger = logging.getLogger("keras.distribution")


class Run:
    """A run in which what a trial found goes over all rows."""

    paused = 0  # calls of known code under way

    def __init__(self, trial, context, owner):
        self.trial, self.context, self.owner = trial, context, owner
        self.layers = trial.layers
        self.calls = collections.Counter()
        self.uses_losses = False
        self.entered = 0

    @contextlib.contextmanager
    def mode(self):
        """Within it, torch functions are looked at."""
        self.entered += 1
        try:
            if self.entered > 1:
                yield
            else:
                with trials.watched_by(self), _OverAllRows(self):
                    yield
        finally:
            self.entered -= 1

    def check(self):
        """Says if the code did not do what it did in its trial."""
        for key, found in self.trial.found.items():
            if self.calls[key] <= max(found):
                self.warn(f"{key[1]} was called {self.calls[key]} times")

    def warn(self, what):
        say_once(
            self.owner,
            "'%s' does not reduce rows as it did when it was tried (%s): its "
            "numbers may be those of a data shard's rows.",
            what,
        )

    def next_found(self, name):
        """What the trial found of the call that comes now, or None."""
        key = trials.key_of(name)
        found = self.trial.found.get(key)
        if found is None or self.paused:
            return None
        number = self.calls[key]
        self.calls[key] += 1
        return found.get(number)


class _OverAllRows(TorchFunctionMode):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        run = self.run
        found = run.next_found(getattr(func, "__name__", ""))
        if found is None:
            return func(*args, **kwargs)
        leaves = tree.flatten((args, kwargs))
        if found.kind == trials.COUNT:
            args, kwargs = _with_all_counted(leaves, found, (args, kwargs))
            return func(*args, **kwargs)
        local = trials.local_rows()
        for x, dim in zip(leaves, found.dims):
            if dim is not None and x.shape[dim[0]] != dim[1] * local:
                run.warn(f"{func.__name__} of a shape {tuple(x.shape)}")
                return func(*args, **kwargs)
        if found.kind == trials.SUM:
            outputs = func(*args, **kwargs)
            return statistics.sum_over_data(outputs, run.context)
        if found.kind == trials.MEAN:
            outputs = func(*args, **kwargs)
            share = rows_lib.get_current_rows().weight
            return statistics.sum_over_data(outputs * share, run.context)
        leaves = [
            x if dim is None else gather(x, *dim, run.context)
            for x, dim in zip(leaves, found.dims)
        ]
        first = next(dim for dim in found.dims if dim is not None)
        args, kwargs = tree.pack_sequence_as((args, kwargs), leaves)
        outputs = func(*args, **kwargs)
        if found.kind == trials.ALONG_ROWS:
            ours = slice_of_ours(run.context)
            outputs = _map_tensors(lambda y: cut(y, *first, ours), outputs)
        return outputs


def _with_all_counted(leaves, found, structure):
    batch, local = rows_lib.get_current_rows(), trials.local_rows()
    leaves = list(leaves)
    for position, is_inverse in found.numbers:
        x = leaves[position]
        if is_inverse:
            leaves[position] = x * local / batch.total
        elif isinstance(x, int) and x % local == 0:
            leaves[position] = x // local * batch.total
        else:
            leaves[position] = x / local * batch.total
    return tree.pack_sequence_as(structure, leaves)


def gather(x, dim, entries, context):
    """All rows of a tensor, in order.

    Collective along the data axis, forward and backward.

    Args:
        x: tensor with our rows in `dim`.
        entries: how many entries of `dim` belong to a row.
    """
    x = sharded.whole(x).movedim(dim, 0)
    rest = x.shape[1:]
    x = x.reshape(x.shape[0] // entries, entries, *rest)
    x = rows_lib.GatherForLoss.apply(x.contiguous(), context)
    return x.reshape(-1, *rest).movedim(0, dim)


def slice_of_ours(context):
    """Which of all rows we compute on, as a slice."""
    start, stop = rows_lib.ranges(context)[context.data_index]
    return slice(*rows_lib.with_a_row(start, stop))


def cut(y, dim, entries, ours):
    size = (ours.stop - ours.start) * entries
    return y.narrow(dim, ours.start * entries, size)


def _map_tensors(function, outputs):
    if isinstance(outputs, torch.Tensor):
        return function(outputs)
    return type(outputs)(map(function, outputs))


_said = weakref.WeakSet()


def say_once(owner, message, *args):
    """Warns on process 0, once for each loss, metric or layer."""
    if process_group.is_first() and owner not in _said:
        _said.add(owner)
        logger.warning(message, name_of(owner), *args)


def name_of(owner):
    return getattr(owner, "path", None) or getattr(owner, "name", owner)
