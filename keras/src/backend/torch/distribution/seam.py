"""What code of Keras that knows no backend asks: see
`keras.src.distribution.processes`, which says what each function is for."""

import torch.distributed as dist

from keras.src.backend.torch.distribution.batch import gathers
from keras.src.backend.torch.distribution.batch import statistics
from keras.src.backend.torch.distribution.global_rows import borders
from keras.src.backend.torch.distribution.global_rows import known
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.mesh.context import own_distribution
from keras.src.backend.torch.distribution.mesh.process_group import is_first
from keras.src.backend.torch.distribution.mesh.together import any_of_each
from keras.src.backend.torch.distribution.mesh.together import any_process
from keras.src.backend.torch.distribution.mesh.together import work
from keras.src.backend.torch.distribution.ops import operators
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.training import metric_states
from keras.src.backend.torch.distribution.training import put_off
from keras.src.backend.torch.distribution.training import (
    random_states as random_states_lib,
)
from keras.src.backend.torch.distribution.training.one_device import (
    as_one_device,
)
from keras.src.backend.torch.distribution.variables import streams

__all__ = [
    "any_of_each",
    "any_process",
    "as_one_device",
    "call_loss",
    "call_metric",
    "distribution_of",
    "dry_runs",
    "flows",
    "gather_rows",
    "in_pieces",
    "is_distributed",
    "is_in_pieces",
    "is_writer",
    "metric_result",
    "own_rows",
    "random_states",
    "set_random_states",
    "share_of_rows",
    "share_of_sum",
    "sharded_checkpoints",
    "spans_rows",
    "stored_shape",
    "sum_over_rows",
    "work",
]

distribution_of = own_distribution
is_writer = is_first
in_pieces = streams.to_write


def is_in_pieces(value):
    return isinstance(value, streams.Absent)


def is_distributed():
    return current() is not None


def random_states(model):
    return random_states_lib.of_model(model)


def set_random_states(model, states):
    random_states_lib.set_of_model(model, states)


def sharded_checkpoints():
    # Here, as it takes a tenth of a second to import.
    from keras.src.backend.torch.distribution.checkpoints import checkpoint

    return checkpoint


def dry_runs():
    from keras.src.backend.torch.distribution.report import dry_run

    return dry_run


def flows():
    from keras.src.backend.torch.distribution.report import tracing

    return tracing


def stored_shape(variable):
    value = variable._value
    return tuple(getattr(value, "_local_tensor", value).shape)


def share_of_rows():
    context = rows.context_of_local_rows()
    return None if context is None else rows.share(context)


def share_of_sum(x, dtype):
    context = current()
    share = rows.share(context)
    total = x.detach().float()
    # A process without rows computes on a stand-in, which does not count.
    total = collectives.weighted(total, float(share > 0)).clone()
    dist.all_reduce(total, group=context.data_group)
    return (total * share).to(dtype)


def spans_rows(x, axes, synchronized=False):
    return statistics.context_over_rows(x, axes, synchronized) is not None


def sum_over_rows(x):
    return statistics.sum_over_data(x, current())


def gather_rows(x):
    return gathers.GatherForLoss.apply(x, current())


def own_rows(x):
    return x[slice(*rows.get_current_rows().ranges()[current().data_index])]


def call_loss(loss, function, y_true, y_pred, sample_weight):
    arguments = y_true, y_pred, sample_weight
    if not borders.is_seen():
        return operators.call_on_shards(function, *arguments)
    return borders.call_loss(loss, function, *arguments)


def call_metric(metric, function, args, kwargs):
    if not borders.is_seen():
        return operators.call_on_shards(function, *args, **kwargs)
    metric_states.settle_all(metric.variables)
    return borders.call_metric(metric, function, args, kwargs)


def metric_result(metric, function):
    if not borders.is_seen() or not known.is_known_metric(metric):
        return function()
    return put_off.result(metric, function)
