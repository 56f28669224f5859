"""Where the global batch begins and ends: steps, and Keras's own code in them.

In a step that runs user code, that code sees the global batch: what it is
handed are `GlobalTensor`s. Where it calls code of Keras's own (see `known`) our
rows go in, and come out as rows of the global batch again.
"""

import contextlib

import numpy as np
import torch

from keras.src import tree
from keras.src.backend.torch.core import convert_to_tensor
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows import entry_points
from keras.src.backend.torch.distribution.global_rows import known
from keras.src.backend.torch.distribution.global_rows import rules
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_addend
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.mesh import rows as rows_lib
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.modes import on_global_batch
from keras.src.backend.torch.distribution.modes import on_local_rows
from keras.src.backend.torch.distribution.tensors import sharded

assert rules.MODULES


class Step:
    """A step in which code sees the global batch.

    Args:
        context: the `Context`, with several data shards.
    """

    def __init__(self, context):
        self.context = context
        self._rows = {}  # By their counts: equal ones meet as one.
        # One entry a data shard: what addends are of.
        self.shards = self.bound([1] * context.data_size)

    def bound(self, counts):
        """`rows.Rows` that user code computes on."""
        counts = tuple(counts)
        rows = self._rows.get(counts)
        if rows is None:
            rows = rows_lib.Rows(counts, self.context.data_index)
            rows.context = self.context
            rows.weight_of_gradients = 1 / self.context.data_size
            self._rows[counts] = rows
        return rows

    def split_evenly(self, total):
        """The `Rows` of a whole batch of so many rows."""
        context = self.context
        rows = rows_lib.split_evenly(
            total, context.data_size, context.data_index
        )
        return self.bound(rows.counts)

    def enter(self, data, rows):
        """A batch of local rows, as the global one.

        Args:
            data: nested arrays with local rows in dim 0.
            rows: `rows.Rows`, of which the counts are taken.
        """
        rows = self.bound(rows.counts)

        def enter(x):
            if x is None:
                return None
            if isinstance(x, np.ndarray) and x.dtype.kind in "OSU":
                return _gathered_objects(x, rows)
            x = convert_to_tensor(x)
            if not x.ndim:
                return x
            return carrier.from_local(x[: rows.local], rows)

        return tree.map_structure(enter, data)


def _gathered_objects(x, rows):
    everyone = [None] * len(rows.counts)
    torch.distributed.all_gather_object(
        everyone, x[: rows.local], group=rows.group
    )
    return np.concatenate(everyone)


@contextlib.contextmanager
def step(context):
    """Within it, code sees the global batch. Gives the `Step`."""
    current, reducer = Step(context), context.reducer
    outer, reducer.is_in_step = reducer.is_in_step, True
    try:
        with on_global_batch(current), entry_points.on_whole_tensors():
            yield current
    finally:
        reducer.is_in_step = outer


def is_seen():
    """Whether the code under way sees the global batch."""
    return modes.step is not None and not modes.known


# ---- layers, losses and metrics of Keras's own -------------------------------


def rows_of(structure):
    """The rows that known code is handed in dim 0; None if there are none."""
    return _rows_of(tensors_of(structure))


def _rows_of(tensors):
    for x in tensors:
        if type(x) is GlobalTensor and x.at == 0:
            return x.rows
    return None


def tensors_of(structure):
    """The tensors in nested lists, tuples and dicts."""
    found = []
    carrier.map_tensors(found.append, structure)
    return found


def local_rows(x, rows):
    """What known code computes on for an argument of the global batch.

    Collective along the data axis if `x` holds rows elsewhere.
    """
    if not isinstance(x, torch.Tensor):
        return x
    if type(x) is not GlobalTensor or x.rows is not rows or x.at != 0:
        if x.ndim and x.shape[0] == rows.total:
            local = carrier.cut_rows(x, 0, rows)
        else:
            return whole(x)
    else:
        local = x.local
    local = carrier.with_a_row(local, rows)
    return sharded.keep_mask(local, x, lambda mask: local_rows(mask, rows))


def call_layer(layer, function, args, kwargs):
    """`function(args, kwargs)`, a call of a layer in code that sees the global
    batch.

    Collective along the data axis where it gathers, forward and backward.
    """
    if not known.is_known(layer):
        return function(args, kwargs)
    tensors = tensors_of((args, kwargs))
    rows = _rows_of(tensors)
    if rows is None and tensors and known.is_container(layer):
        # A whole batch: each data shard takes its part of the work.
        total = tensors[0].shape[0] if tensors[0].ndim else 0
        if total and all(x.ndim and x.shape[0] == total for x in tensors):
            rows = modes.step.split_evenly(total)
    if rows is None:
        if not any(type(x) is GlobalTensor for x in tensors):
            # Known code that is handed no rows computes what one device does.
            with on_local_rows():
                return function(args, kwargs)
        return function(args, kwargs)
    if not known.takes(layer, [x.ndim for x in tensors]):
        return function(args, kwargs)
    shared = {}
    if type(layer) in known.lists().of_masks:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim < 3:
            shared["attention_mask"] = whole(mask)
            kwargs = {k: v for k, v in kwargs.items() if k not in shared}
    args, kwargs = carrier.map_tensors(
        lambda x: local_rows(x, rows), (args, kwargs)
    )
    with on_local_rows(), rows_lib.current_rows(rows):
        outputs = function(args, {**kwargs, **shared})
    return carrier.map_tensors(lambda y: _output(layer, y, rows), outputs)


def _output(layer, y, rows):
    if not y.ndim or y.shape[0] != max(rows.local, 1):
        raise RuntimeError(
            f"The layer '{layer.path}' was expected to return an entry for "
            f"each of {rows.local} rows. Received: shape {tuple(y.shape)}"
        )
    return carrier.from_local(y, rows)


def call_loss(loss, function, y_true, y_pred, sample_weight):
    """`function` of a loss's arguments, in code that sees the global batch.

    Returns:
        An addend of the loss of all rows, or rows without reduction.
    """
    arguments = (y_true, y_pred, sample_weight)
    rows = rows_of(arguments)
    tensors = tensors_of(y_pred)
    if rows is None or len(tensors) != 1:
        return function(*arguments)
    if not known.is_known_loss(loss, tensors[0]):
        return function(*arguments)
    arguments = carrier.map_tensors(lambda x: local_rows(x, rows), arguments)
    with on_local_rows(), rows_lib.current_rows(rows):
        value = function(*arguments)
    if value.ndim:
        return carrier.from_local(value, rows)
    if not rows.local:
        # What is computed without rows does not count.
        value = torch.nan_to_num(value, 0.0, 0.0, 0.0)
    return carrier.addend(value * rows.share, modes.step.shards)


def call_metric(metric, function, args, kwargs):
    """`function(*args, **kwargs)`, an update of a metric in code that sees the
    global batch: of local rows, if the metric is Keras's own."""
    rows = rows_of((args, kwargs))
    tensors = tensors_of((args, kwargs))
    if rows is None and _is_mean_of_an_addend(metric, tensors, args, kwargs):
        # The loss of a step, mostly. Each data shard counts its part.
        shards = modes.step.shards
        count = kwargs.pop("sample_weight", args[1] if args[1:] else None)
        count = (1 if count is None else count) * shards.share
        with on_local_rows(), rows_lib.current_rows(shards):
            return function(args[0].local / shards.share, count)
    y_pred = kwargs.get("y_pred", args[1] if len(args) > 1 else None)
    if y_pred is None or not isinstance(y_pred, torch.Tensor):
        y_pred = tensors[0] if tensors else None
    if (
        rows is None
        or any(is_addend(x) for x in tensors)
        or not known.is_known_metric(metric, y_pred)
        or any(v.aggregation != "sum" for v in metric.variables)
    ):
        return function(*args, **kwargs)
    args, kwargs = carrier.map_tensors(
        lambda x: local_rows(x, rows), (args, kwargs)
    )
    with on_local_rows(), rows_lib.current_rows(rows):
        before = {}
        if not rows.local:
            before = {id(v): v.value.clone() for v in metric.variables}
        result = function(*args, **kwargs)
        if not rows.local:
            # What is computed without rows does not count.
            for v in metric.variables:
                v.assign(before.get(id(v), torch.zeros_like(v.value)))
        return result


def _is_mean_of_an_addend(metric, tensors, args, kwargs):
    return (
        type(metric) is known.lists().mean
        and len(tensors) == 1
        and bool(args)
        and is_addend(args[0])
        and not args[0].ndim
        and kwargs.keys() <= {"sample_weight"}
        and len(args) + len(kwargs) < 3
    )


def on_rows_of(function, *args, tensors=1, **kwargs):
    """A function that treats each entry of dim 0 of its first arguments alike,
    for rows of the global batch there.

    Args:
        function: takes local tensors.
        *args, **kwargs: its arguments.
        tensors: int, how many of the first have rows in dim 0; others are
            whole.
    """
    rows = args[0].rows
    local = [local_rows(x, rows) for x in args[:tensors]]
    with on_local_rows(), rows_lib.current_rows(rows):
        y = function(*local, *args[tensors:], **kwargs)
    return carrier.map_tensors(lambda y: carrier.from_local(y, rows), y)


def batch_of(data, context):
    """The `rows.Batch` of what code that sees the global batch hands to a step
    of another model.

    Collective along the data axis if the data holds rows elsewhere.
    """
    batch_rows = rows_of(data)
    if batch_rows is None:
        return rows_lib.cut(data, context)
    rows = rows_lib.Rows(batch_rows.with_entries(1).counts, batch_rows.index)
    rows = rows.with_entries(batch_rows.entries)
    data = tree.map_structure(
        lambda x: None if x is None else local_rows(x, batch_rows), data
    )
    return rows_lib.Batch(data, rows)


def leave(outputs, gathers):
    """What a step returns, as plain tensors.

    Collective along the data axis.

    Args:
        gathers: whether all rows are returned, or local ones.
    """

    def leave(x):
        if is_rows(x) and x.at == 0 and not gathers:
            return x.local
        return whole(x)

    return tree.map_structure(leave, outputs)
