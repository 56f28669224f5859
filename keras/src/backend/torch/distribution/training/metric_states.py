"""The state of metrics: whole between steps, of local rows within one.

Between two steps a metric's variable holds the whole state, equal on all
processes. Within a step it holds the local state: what this data shard has
counted. The sum over data shards of what was added locally is the whole.

Two tensors take turns in the variable, so that neither is rounded by being
turned into the other. If the program writes into the whole state
(`reset_state`, `assign`), which tensors count, all shards start from what was
written.

Code that sees the global batch (see `global_rows`) sees the local state as what
it is: an addend of the whole one.
"""

import contextlib

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import storage


class _State:
    """The two tensors of a variable.

    Attributes:
        context: the `Context` whose data shards the local states are of.
        whole, local: the tensors, each of the kind that the variable holds.
        base: what the local state started from and another shard counts,
            flat; None where that is this shard.
        version: of `whole`, as the last step left it.
        results: weak references to what was computed from the state and put
            off: computed before the state changes.
    """

    def __init__(self, variable, context):
        self.context = context
        self.whole = variable._value
        self.local = _twin(self.whole)
        self.base = None
        self.version = None
        self.results = []

    def is_whole_of_last_step(self, variable):
        # torch counts the writes into a tensor: no need to compare numbers,
        # which would make the host wait for the device.
        return (
            variable._value is self.whole
            and _storage(self.whole)._version == self.version
        )

    def start_from_whole(self, adds_up):
        with torch.no_grad():
            _storage(self.local).copy_(_storage(self.whole))
        # A copy, and on all shards: where a layout cuts the state, it is
        # gathered.
        base = flat(self.whole).clone() if adds_up else None
        self.base = base if self.context.data_index else None


def states_of(metrics, model_variables):
    """The variables that are states of metrics.

    A metric may refer to a variable of the model, too, which is none.

    Args:
        metrics: list of metrics.
        model_variables: function that gives the variables of the model.
    """
    variables = {id(v): v for metric in metrics for v in metric.variables}
    # Those of `add_variable` are metrics' own, for sure.
    if any(v.synchronization != "on_read" for v in variables.values()):
        for v in model_variables():
            variables.pop(id(v), None)
    return [v for v in variables.values() if v._value is not None]


def is_state(variable):
    """Whether a variable is a metric's own, by how it was made."""
    return variable.synchronization == "on_read"


def placements(placements, context):
    """Those of a state. No data axis cuts it: what each data shard has counted
    is of all entries."""
    shape = tuple(context.mesh.shape)
    return cuts.to_placements(
        [
            (dim, axis)
            for dim, axis in cuts.from_placements(tuple(placements), shape)
            if axis not in context.data_axes
        ],
        shape,
    )


@contextlib.contextmanager
def local(variables, context):
    """Within it, variables hold the local state.

    Collective along the axes that shard a variable, if it was written into.
    """
    if context.data_size == 1:
        yield
        return
    # A step within a step leaves those of the outer one as they are.
    shown = [v for v in variables if _show_local(v, context)]
    try:
        yield
    finally:
        for variable in shown:
            variable._value = vars(variable)[marks.METRIC_STATE].whole


def may_wait(variables):
    """Whether states need not be whole for the next step, which then begins
    as if they were.

    Args:
        variables: states, of a step that is about to end.
    """
    states = [vars(v).get(marks.METRIC_STATE) for v in variables]
    if None in states or not all(_adds_up(v) for v in variables):
        return False
    for state in states:
        state.version = _storage(state.whole)._version
    return True


def whole(variables):
    """Within it, variables hold the whole state, as it was last written."""
    return modes.swapped(
        (v, "_value", vars(v)[marks.METRIC_STATE].whole) for v in variables
    )


def _show_local(variable, context):
    """Returns whether the variable held the whole state."""
    state = vars(variable).get(marks.METRIC_STATE)
    if state is None or state.context is not context:
        state = _State(variable, context)
        vars(variable)[marks.METRIC_STATE] = state
    elif variable._value is state.local:
        return False
    adds_up = _adds_up(variable)
    if not adds_up or not state.is_whole_of_last_step(variable):
        state.whole = variable._value
        state.start_from_whole(adds_up)
    variable._value = state.local
    return True


def state_in_step(variable):
    """The state of a variable that holds the local one now, else None."""
    state = vars(variable).get(marks.METRIC_STATE)
    if state is None or variable._value is not state.local:
        return None
    return state if _adds_up(variable) else None


def as_addend(value, state, rows):
    """The local state as code sees it that sees the global batch.

    Args:
        value: of the variable, perhaps cast.
        state: of `state_in_step`.
        rows: the `Rows` of addends.
    """
    local = sharded.whole(value.detach())
    if state.base is not None:
        local = local - state.base.view(local.shape).to(local.dtype)
    else:
        local = local.clone()
    return carrier.addend(local, rows)


def assign(variable, state, value):
    """Writes what code gives that sees the global batch: an addend, or a whole
    value, equal on all processes.

    Collective along the data axis if `value` holds rows, or if results that
    were put off need the state as it was.
    """
    settle(state)
    if not carrier.is_addend(value):
        value = carrier.whole(value)
    with torch.no_grad():
        if carrier.is_addend(value):
            local = sharded.whole(value.local)
            if state.base is not None:
                local = local + state.base.view(local.shape).to(local.dtype)
        else:
            local = sharded.whole(value)
            state.base = None
            if state.context.data_index:
                state.base = flat(local).clone()
        stored = state.local
        if isinstance(stored, DTensor):
            storage.assign(stored, local)
        else:
            stored.copy_(local)


def settle(state):
    """Computes the results that were put off and are still asked for.

    Collective along the data axis: every process of it calls it.
    """
    results, state.results = state.results, []
    for reference in results:
        result = reference()
        if result is not None:
            carrier.whole(result)


def settle_all(variables):
    """As `settle`, before code of Keras's own changes the states."""
    for variable in variables:
        state = vars(variable).get(marks.METRIC_STATE)
        if state is not None and state.results:
            settle(state)


def fulfil(variables):
    """Computes what was put off, where variables hold their whole states.

    Does not communicate.
    """
    for variable in variables:
        state = vars(variable)[marks.METRIC_STATE]
        results, state.results = state.results, []
        for reference in results:
            result = reference()
            if result is not None and result._whole is None:
                carrier.keep(result, result.pending.from_whole_states())


def portion(variable, weight, context):
    """What the local state adds to the whole one: a flat tensor.

    Args:
        variable: holds the local state.
        weight: our share of the rows.
        context: the `Context`.
    """
    value = flat(variable._value)
    if variable.aggregation == "mean":
        return collectives.weighted(value, weight)
    if variable.aggregation == "only_first_replica":
        return collectives.weighted(value, float(context.data_index == 0))
    state = vars(variable).get(marks.METRIC_STATE)
    if state is not None and state.base is not None:
        value = value - state.base
    return value


def write_whole(variable, value, context):
    """Writes a reduced state, flat, as the whole one.

    Does not communicate: all processes have the value.
    """
    state = vars(variable).get(marks.METRIC_STATE)
    if state is None:
        # Made within the step.
        state = _State(variable, context)
        state.whole, state.local = state.local, state.whole
        vars(variable)[marks.METRIC_STATE] = state
    stored = state.whole
    if not (stored.is_floating_point() or stored.is_complex()):
        # A weighted sum of counters is rounded in its last digits.
        value = value.round()
    value = value.view(stored.shape)
    with torch.no_grad():
        if isinstance(stored, DTensor):
            storage.assign(stored, value.to(stored.device))
        else:
            stored.copy_(value, non_blocking=True)
    state.version = _storage(stored)._version


def flat(value):
    """A value as a plain, flat tensor in double precision, without autograd.

    Collective along the axes that shard the value.
    """
    if isinstance(value, DTensor):
        value = sharded.whole(value)
    value = torch.as_tensor(value).detach()
    return value.reshape(-1).to(torch.float64)


def _adds_up(variable):
    # Means, and what the first shard alone counts, are the same on all shards
    # after each step: they go on from the whole.
    return variable.aggregation not in ("mean", "only_first_replica")


def _twin(value):
    return torch.nn.Parameter(value.detach().clone(), requires_grad=False)


def _storage(value):
    return sharded.local_of(value) if isinstance(value, DTensor) else value
