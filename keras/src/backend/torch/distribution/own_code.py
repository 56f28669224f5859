"""Code of the user's own, of losses, metrics and layers, on a data shard.

It is written for one device, and goes over all rows there. A trial tells where
it does (see `trials`), and so it does here (see `reductions`). Where rows meet
other rows, or a trial of a loss or a metric failed, it is computed on all rows,
gathered.
"""

import contextlib
import functools
import weakref

import torch

from keras.src import tree
from keras.src.backend.common import global_state
from keras.src.backend.torch.distribution import rows as rows_lib
from keras.src.backend.torch.distribution import sharded
from keras.src.backend.torch.distribution import statistics
from keras.src.backend.torch.distribution import trials
from keras.src.backend.torch.distribution.context import current
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.reductions import Run
from keras.src.backend.torch.distribution.reductions import cut
from keras.src.backend.torch.distribution.reductions import gather
from keras.src.backend.torch.distribution.reductions import say_once
from keras.src.backend.torch.distribution.reductions import slice_of_ours

_trials = weakref.WeakKeyDictionary()  # owner -> {signature: Trial}
NOTHING = "_keras_goes_over_no_rows"  # what all trials of an owner found
_current = [None]  # the `Run` of the outermost layer call under way


def context_in_step():
    """The `Context` in a step with several data shards, else None."""
    context = current()
    if context is None or context.data_size == 1:
        return None
    return context if rows_lib.get_current_rows() is not None else None


def run(owner, function, *args, gathers=True):
    """`function(*args)` of a global batch, for our rows of it.

    Collective in a step, along the data axis, forward and backward: every
    process of it calls it.

    Args:
        owner: the loss or the metric, which trials are kept for.
        function: takes tensors with our rows.
        gathers: whether, where nothing else helps, it may be handed all rows.

    Returns:
        What `function` returns, and whether that has an entry for each of our
        rows. If it has not, it is that of all rows, equal on all data shards.
    """
    context = context_in_step()
    if context is None or trials.is_watched():
        outputs = function(*args)
        return outputs, bool(outputs.ndim)
    trial = trial_of(owner, function, args, {})
    if trial.failed or trial.mixes:
        if gathers:
            _say_gathered(owner, trial)
            return on_all_rows(function, args, context)
        _say_unknown(owner, trial)
        return function(*args), trial.returns_rows
    if not trial.found and not trial.uses_losses:
        return function(*args), trial.returns_rows
    with Run(trial, context, owner).mode():
        return function(*args), trial.returns_rows


@contextlib.contextmanager
def of_outermost(layer, function, args, kwargs):
    """Within it, layers go over all rows where their code does.

    Collective in a step, along the data axis, where it does: every process of
    it enters.

    Args:
        layer: the outermost layer, about to be called.
        function: its call, of itself and its arguments.
        args, kwargs: arguments of the call.
    """
    context = context_in_step()
    if (
        context is None
        or trials.is_watched()
        or (torch.compiler.is_compiling() and goes_over_no_rows(layer))
    ):
        yield
        return
    function = functools.partial(trials.call, layer, function)
    trial = trial_of(layer, function, args, kwargs)
    if trial.failed:
        _say_unknown(layer, trial)
    if trial.failed or not (trial.found or trial.mixing):
        yield
        return
    previous, _current[0] = _current[0], Run(trial, context, layer)
    try:
        yield
        _current[0].check()
    finally:
        _current[0] = previous


def call(layer, function, args, kwargs):
    """`function(args, kwargs)`: one call of a layer, whose code goes over all
    rows where it reduces some.

    Collective along the data axis where it does, forward and backward: every
    process of it calls it.
    """
    run = _current[0]
    if run is None:
        return function(args, kwargs)
    if id(layer) in run.trial.mixing:
        _say_gathered(layer, run.trial)
        return _call_on_all_rows(layer, function, args, kwargs, run)
    if id(layer) in run.layers:
        with run.mode():
            return function(args, kwargs)
    return function(args, kwargs)


def _call_on_all_rows(layer, function, args, kwargs, run):
    """A layer's outputs for our rows, computed on all."""
    dims_of_inputs, dims_of_outputs = run.trial.mixing[id(layer)]
    ours = slice_of_ours(run.context)

    def whole(x, dim):
        return _with_mask(x, dim, lambda x: gather(x, *dim, run.context))

    def ours_of(y, dim):
        return _with_mask(y, dim, lambda y: cut(sharded.whole(y), *dim, ours))

    args, kwargs = _map(whole, (args, kwargs), dims_of_inputs)
    previous, _current[0] = _current[0], None
    try:
        with rows_lib.current_rows(None):
            outputs = function(args, kwargs)
    finally:
        _current[0] = previous
    return _map(ours_of, outputs, dims_of_outputs)


def _map(function, structure, dims):
    leaves = tree.flatten(structure)
    return tree.pack_sequence_as(structure, list(map(function, leaves, dims)))


def _with_mask(x, dim, function):
    if dim is None:
        return x
    y = function(x)
    mask = getattr(x, "_keras_mask", None)
    if mask is not None:
        y._keras_mask = function(mask)
    return y


def as_now():
    """The run under way, to be entered again for a recomputation."""
    run = _current[0]
    if run is None:
        return contextlib.nullcontext
    calls = run.calls.copy()

    @contextlib.contextmanager
    def again():
        if _current[0] is run:
            yield
            return
        repeated = Run(run.trial, run.context, run.owner)
        repeated.calls = calls.copy()
        previous, _current[0] = _current[0], repeated
        try:
            if id(modes.layer) not in run.layers:
                yield
                return
            with repeated.mode():
                yield
        finally:
            _current[0] = previous

    return again


def trial_of(owner, function, args, kwargs):
    """The `Trial` of a function for arguments like these; run once."""
    signature = tuple(_signature(x) for x in tree.flatten((args, kwargs)))
    own = _trials.setdefault(owner, {})
    signature += (_is_training(), getattr(function, "func", None))
    if signature not in own:
        own[signature] = _try(owner, function, args, kwargs)
        vars(owner)[NOTHING] = not any(
            t.failed or t.found or t.mixing for t in own.values()
        )
    return own[signature]


def goes_over_no_rows(owner):
    """Whether no trial of an owner so far has found anything.

    For compiled code, which cannot look its trial up: it has been run as it is
    written before, on the same kind of batch (see `trainer.Step`).
    """
    return getattr(owner, NOTHING, False)


@torch.compiler.disable
def _try(owner, function, args, kwargs):
    sizes = {n for v in getattr(owner, "variables", ()) for n in v.shape}
    return trials.run(function, args, kwargs, sizes)


def _signature(x):
    if torch.is_tensor(x):
        is_of_rows = bool(x.ndim) and x.shape[0] == trials.local_rows()
        return tuple(x.shape[1:]), x.dtype, is_of_rows
    return x if isinstance(x, (str, bool, int, float)) else type(x)


def _is_training():
    # What Keras's layers ask too; asking by a layer would begin a call.
    call = global_state.get_global_attribute("current_call_ctx")
    return None if call is None else call.get_value("training")


def on_all_rows(function, args, context):
    """As `run`, of gathered tensors; what it returns for each row is cut.

    Collective along the data axis, forward and backward.
    """
    local = trials.local_rows()
    total = rows_lib.get_current_rows().total

    def whole(x):
        if not torch.is_tensor(x) or not x.ndim or x.shape[0] != local:
            return x
        return _with_mask(x, (0, 1), lambda x: gather(x, 0, 1, context))

    args = tree.map_structure(whole, args)
    ours = slice_of_ours(context)
    with rows_lib.current_rows(None):
        outputs = function(*args)
    if not _has_row(outputs, total):
        return outputs, False
    return _with_mask(outputs, (0, 1), lambda y: y[ours]), True


def _has_row(outputs, number):
    return bool(outputs.ndim) and outputs.shape[0] == number


def to_all(value):
    """The loss of all rows, of those of data shards, in code that needs it.

    Collective along the data axis inside of such code: every process of it
    calls it.
    """
    context = context_in_step()
    if context is None or not trials.is_watched() or value.ndim:
        return value
    share = rows_lib.weight(context)
    return statistics.sum_over_data(value * share, context)


def _say_gathered(owner, trial):
    say_once(
        owner,
        "'%s' is computed on all rows of the batch, gathered on every data "
        "shard in each step: %s. A function of each row by itself, in "
        "operations that run without numbers, is computed where its rows are.",
        _why(trial),
    )


def _say_unknown(owner, trial):
    say_once(
        owner,
        "'%s' is taken for code of each row by itself, since %s. If it reduces "
        "rows, the result is that of each data shard's own.",
        _why(trial),
    )


def _why(trial):
    if not trial.failed:
        return "it compares rows with each other"
    why = trial.failed.partition("\n")[0][:200]
    return f"it does not run on tensors without numbers ({why})"
