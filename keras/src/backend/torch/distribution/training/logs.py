"""Logs and metrics of a step: the global values, on every process.

All metric states of a model (see `metric_states`), what else a train step
returns, the stop flag and what processes agree on (see `agreement`) are reduced
in one small collective. It is under way while the next step runs, where nobody
asks for the logs of this one (see `late`).
"""

import contextlib
import numbers

import torch
import torch.distributed as dist

from keras.src import tree
from keras.src.backend.common.variables import Variable
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.mesh.agreement import adding_up
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.training import metric_states


class Reduction:
    """Global logs of a step, under way.

    Args:
        adding_up: function that waits for all processes, and returns a dict of
            lists of sums and the list of sums of the flags.
        write: function that takes the former, gives metrics their whole
            states, and returns the logs.
    """

    def __init__(self, adding_up, write):
        self._adding_up, self._write = adding_up, write
        self._sums = self._flags = self._logs = None

    @property
    def flags(self):
        """The sums over processes of the flags. Waits for all processes."""
        if self._adding_up is not None:
            (self._sums, self._flags), self._adding_up = self._adding_up(), None
        return self._flags

    def logs(self):
        """The global logs; metrics hold their whole states from now on.

        Waits for all processes.
        """
        if self._write is not None:
            _ = self.flags
            self._logs, self._write = self._write(self._sums), None
            self._sums = None
        return self._logs

    def forget(self):
        """To be called where a later step's states are known: nobody needs
        what metrics held after this one."""
        self._write = self._sums = None

    def abandon(self):
        """Lets go of what is under way."""
        self._adding_up = self._write = None


def reduce_logs(metrics, states, logs, flags, context, are_results=False):
    """Global logs from local ones, and sums of flags over processes.

    Metrics are computed anew from their reduced state, which becomes their
    whole one; any other value is averaged over data shards, weighted with
    their rows.

    Collective: every process calls it after every step.

    Args:
        metrics: the metrics of the model.
        states: their variables, with the local state: see `metric_states`.
        logs: dict of what the step returned.
        flags: list of numbers to be added up in float64.
        context: the `Context`.
        are_results: bool, whether the logs are known to be results of the
            metrics, under their names.

    Returns:
        `Reduction`, whose logs have the same keys.
    """
    if context.data_size == 1:
        return Reduction(_adding_up(flags), lambda sums: logs)
    logs = tree.map_structure(_value, logs)
    others = [
        name
        for name, value in logs.items()
        if isinstance(value, (torch.Tensor, numbers.Number))
    ]
    # The processes of one data shard hold the same values: the sum over all
    # processes counts them once for each.
    share = context.data_size / dist.get_world_size()
    weight = rows.share(context)
    parts = {
        "states": [
            metric_states.portion(v, weight, context) * share for v in states
        ]
    }
    if are_results:
        others = []
    else:
        # A log may bear a metric's name and be none: a train step's own loss,
        # say, beside the unused tracker of `compile`. Whether it is one, all
        # decide together; a process without rows has computed on a row that is
        # not its own, and has no say.
        local = _results(metrics)
        parts["means"] = [
            collectives.weighted(metric_states.flat(logs[name]), share * weight)
            for name in others
        ]
        parts["differences"] = [
            _differs(logs[name], local.get(name)) * float(weight > 0)
            for name in others
        ]

    def write(sums):
        results = _write_states(metrics, states, sums["states"], context)
        whole = {**logs, **{n: r for n, r in results.items() if n in logs}}
        for i, name in enumerate(others):
            mean = sums["means"][i].view(torch.as_tensor(logs[name]).shape)
            if name in results:
                result = torch.as_tensor(results[name], device=mean.device)
                # Without asking the GPU which of the two it is.
                is_other = sums["differences"][i][0] > 0
                mean = torch.where(is_other, mean, result.to(mean.dtype))
            whole[name] = mean
        return whole

    return Reduction(_adding_up(flags, **parts), write)


def reduce_global_logs(metrics, states, logs, flags, context):
    """As `reduce_logs`, of a step in which code sees the global batch: logs are
    whole already, addends, or results that were put off.

    Collective: every process calls it after every step.
    """
    share = context.data_size / dist.get_world_size()
    leaves = tree.flatten(tree.map_structure(_value, logs))
    addends = [x for x in leaves if carrier.is_addend(x)]

    def write(sums):
        for variable, value in zip(states, sums["states"]):
            metric_states.write_whole(variable, value, context)
        whole = {
            id(x): value.view(x.shape).to(x.dtype)
            for x, value in zip(addends, sums["addends"])
        }
        with metric_states.whole(states):
            metric_states.fulfil(states)
        return tree.pack_sequence_as(
            logs, [carrier.whole(whole.get(id(x), x)) for x in leaves]
        )

    adding_up = _adding_up(
        flags,
        states=[metric_states.portion(v, 1.0, context) * share for v in states],
        addends=[metric_states.flat(x.local) * share for x in addends],
    )
    return Reduction(adding_up, write)


def _write_states(metrics, states, sums, context):
    """Gives metrics their whole states; returns their results by name."""
    for variable, value in zip(states, sums):
        metric_states.write_whole(variable, value, context)
    with metric_states.whole(states):
        return _results(metrics)


def _adding_up(flags, **parts):
    """The sums over processes of numbers of the host, and of tensors; in one
    collective if the tensors lie on the host too. Under way.

    Collective: every process calls it.

    Args:
        flags: list of numbers, added up in float64.
        parts: lists of 1-D tensors, by name.

    Returns:
        Function that waits for them. It returns a tuple of a dict of the lists
        of sums, and the list of sums of numbers.
    """
    values = [value for part in parts.values() for value in part]
    if not values:
        adding_up_flags = adding_up(flags)
        return lambda: (parts, adding_up_flags())
    device = values[0].device
    # The host reads the flags, and must not wait for a GPU to do so.
    is_on_host = device.type == "cpu"
    if is_on_host:
        values.append(torch.tensor(flags, dtype=torch.float64))
    # A number that a train step returns lies on the host.
    state = torch.cat([value.to(device) for value in values])
    work = dist.all_reduce(state, async_op=True)
    adding_up_flags = None if is_on_host else adding_up(flags)

    def wait():
        work.wait()
        sums = iter(state.split([value.numel() for value in values]))
        found = {
            name: [next(sums) for _ in part] for name, part in parts.items()
        }
        return found, next(sums).tolist() if is_on_host else adding_up_flags()

    return wait


def _differs(log, result):
    """1.0 where a log is not what the metric of its name gives, else 0.0."""
    log = metric_states.flat(log)
    if result is None:
        return torch.zeros(1, dtype=log.dtype, device=log.device)
    result = metric_states.flat(result).to(log.device)
    if result.shape != log.shape:
        return torch.ones(1, dtype=log.dtype, device=log.device)
    return (log != result).any().reshape(1).to(log.dtype)


@contextlib.contextmanager
def unchanged_by_no_rows(states, rows):
    """Within it, metrics keep their state if there are no rows.

    A loss of no rows may be NaN, if it is a mean that a user wrote by hand.
    """
    kept = []
    if not rows.local:
        kept = [(v, v.value.clone()) for v in states]
    yield
    for variable, value in kept:
        variable.assign(value)


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
