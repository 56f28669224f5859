"""Results of metrics within a step: put off until the step is over.

`{m.name: m.result() for m in self.metrics}` at the end of a train step asks for
numbers that need the states of all data shards. The reduction of logs gives
them without a collective more. Whoever needs one before has it computed.
"""

import weakref

import torch
import torch.distributed as dist

from keras.src import tree
from keras.src.backend.torch.core import convert_to_tensor
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.modes import on_local_rows
from keras.src.backend.torch.distribution.training import metric_states


def result(metric, compute):
    """What a metric of Keras's own gives, in code that sees the global batch.

    Args:
        metric: the metric.
        compute: function without arguments, its `result`.
    """
    states = [metric_states.state_in_step(v) for v in metric.variables]
    if not states or None in states:
        return compute()
    context = modes.step.context
    with on_local_rows(), torch.no_grad():
        local = tree.map_structure(convert_to_tensor, compute())

    def put_off(path, x):
        value = carrier.result(x, Result(metric, compute, path, context))
        reference = weakref.ref(value)
        for state in states:
            state.results.append(reference)
        return value

    leaves = [put_off(i, x) for i, x in enumerate(tree.flatten(local))]
    return tree.pack_sequence_as(local, leaves)


class Result:
    """One number of a result that is put off.

    Args:
        metric: the metric.
        compute: its `result`.
        leaf: which of the numbers, in the order of `tree.flatten`.
        context: the `Context`.
    """

    def __init__(self, metric, compute, leaf, context):
        self.metric, self.compute = metric, compute
        self.leaf, self.context = leaf, context

    def __call__(self):
        """Reduces the states, as they are now.

        Collective along the data axis: every process of it calls it.
        """
        variables = self.metric.variables
        parts = [metric_states.portion(v, 1.0, self.context) for v in variables]
        state = torch.cat(parts)
        dist.all_reduce(state, group=self.context.data_group)
        for v, part in zip(variables, state.split([p.numel() for p in parts])):
            metric_states.write_whole(v, part, self.context)
        with metric_states.whole(variables):
            return self.from_whole_states()

    def from_whole_states(self):
        """The number, where the metric's variables hold the whole states."""
        with on_local_rows(), torch.no_grad():
            return convert_to_tensor(tree.flatten(self.compute())[self.leaf])
