"""Logs and metrics of a step: the global values, on every process.

All metric states of a model, what else a train step returns and the stop flag
are reduced in one small collective.
"""

import contextlib
import numbers

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src import tree
from keras.src.backend.common.stateless_scope import StatelessScope
from keras.src.backend.common.variables import Variable
from keras.src.backend.torch.distribution import collectives
from keras.src.backend.torch.distribution import rows
from keras.src.backend.torch.distribution import sharded


def reduce_logs(metrics, logs, stop, context):
    """Global logs from local ones, and whether any process wants to stop.

    Metrics are computed anew from their reduced state; any other value is
    averaged over data shards, weighted with their rows.

    Collective: every process calls it after every step.

    Args:
        metrics: the metrics of the model, with their local state.
        logs: dict of what the step returned.
        stop: bool, whether this process wants to stop.
        context: the `Context`.

    Returns:
        Tuple of a dict with the same keys, and a bool.
    """
    if context.data_size == 1:
        return logs, any_process(stop)
    variables = list({id(v): v for m in metrics for v in m.variables}.values())
    logs = tree.map_structure(_value, logs)
    others = [
        name
        for name, value in logs.items()
        if isinstance(value, (torch.Tensor, numbers.Number))
    ]
    shapes = {name: torch.as_tensor(logs[name]).shape for name in others}
    # The processes of one data shard hold the same values: the sum over all
    # processes counts them once for each.
    share = context.data_size / dist.get_world_size()
    weight = rows.weight(context)
    values = [
        collectives.weighted(
            _flat(v.value), share * _portion(v, weight, context)
        )
        for v in variables
    ]
    values += [
        collectives.weighted(_flat(logs[name]), share * weight)
        for name in others
    ]
    # A log may bear a metric's name and be none: a train step's own loss, say,
    # beside the unused tracker of `compile`. Whether it is one, all decide
    # together; a process without rows has computed on a row that is not its
    # own, and has no say.
    local = _results(metrics)
    values += [
        _differs(logs[name], local.get(name)) * float(weight > 0)
        for name in others
    ]
    # The host reads the flag, and must not wait for a GPU to do so.
    on_host = not values or values[0].device.type == "cpu"
    if on_host:
        values.append(torch.full((1,), float(stop), dtype=torch.float64))
    state = torch.cat(values)
    dist.all_reduce(state)
    reduced = state.split([v.numel() for v in values])
    stop = bool(reduced[-1].item()) if on_host else any_process(stop)
    mapping = [
        (v, r.view(v.value.shape).to(v.value.device, v.value.dtype))
        for v, r in zip(variables, reduced)
    ]
    with StatelessScope(state_mapping=mapping):
        results = _results(metrics)
    means = reduced[len(variables) :][: len(others)]
    differences = reduced[len(variables) + len(others) :]
    logs = {**logs, **{n: r for n, r in results.items() if n in logs}}
    for name, mean, difference in zip(others, means, differences):
        mean = mean.view(shapes[name])
        if name in results:
            result = torch.as_tensor(results[name], device=mean.device)
            # Without asking the GPU which of the two it is.
            mean = torch.where(difference[0] > 0, mean, result.to(mean.dtype))
        logs[name] = mean
    return logs, stop


def _differs(log, result):
    """1.0 where a log is not what the metric of its name gives, else 0.0."""
    log = _flat(log)
    if result is None:
        return torch.zeros(1, dtype=log.dtype, device=log.device)
    result = _flat(result).to(log.device)
    if result.shape != log.shape:
        return torch.ones(1, dtype=log.dtype, device=log.device)
    return (log != result).any().reshape(1).to(log.dtype)


@contextlib.contextmanager
def unchanged_by_no_rows(metrics, rows):
    """Within it, metrics keep their state if there are no rows.

    A loss of no rows may be NaN, if it is a mean that a user wrote by hand.
    """
    states = []
    if not rows.local:
        states = [(v, v.value.clone()) for m in metrics for v in m.variables]
    yield
    for variable, value in states:
        variable.assign(value)


def any_process(flag):
    """Whether the flag is set on any process.

    Collective: every process calls it.
    """
    flags = torch.tensor([float(flag)])
    dist.all_reduce(flags)
    return bool(flags.item())


def _results(metrics):
    results = {}
    for metric in metrics:
        # While the state is what it is now: a metric may return a variable.
        result = tree.map_structure(_value, metric.result())
        # A train step of one's own returns them by the name of the metric.
        results[metric.name] = result
        if isinstance(result, dict):
            results.update(result)
    return results


def _value(x):
    return x.value if isinstance(x, Variable) else x


def _portion(variable, weight, context):
    """How much of a local state goes into the global sum."""
    if variable.aggregation == "mean":
        return weight
    if variable.aggregation == "only_first_replica":
        return float(context.data_index == 0)
    return 1.0


def _flat(value):
    if isinstance(value, DTensor):
        value = sharded.whole(value)
    value = torch.as_tensor(value).detach()
    return value.reshape(-1).to(torch.float64)
