"""What code of Keras that knows no backend asks of a distribution.

Losses, metrics, layers, callbacks and files are the same for all backends.
Where one program runs on several processes they ask these functions, and
nothing else. Each is answered by the function of its name in the backend's
`distribution_lib`. A backend that has none, and any without a distribution,
does what one device does, which is what stands here.
"""

import contextlib
import functools
import types


def _of_backend(default):
    @functools.wraps(default)
    def ask(*args, **kwargs):
        # Here, since messages are printed before there is a backend.
        from keras.src.distribution import distribution_lib

        backend = distribution_lib.distribution_lib
        return getattr(backend, default.__name__, default)(*args, **kwargs)

    return ask


def _of_distribution(default):
    """As `_of_backend`, of what only a distribution gives a meaning."""
    of_backend = _of_backend(default)

    @functools.wraps(default)
    def ask(*args, **kwargs):
        function = of_backend if is_distributed() else default
        return function(*args, **kwargs)

    return ask


# ---- processes ---------------------------------------------------------------


@_of_backend
def is_distributed():
    """Whether a distribution over several processes is set."""
    return False


@_of_backend
def is_writer():
    """Whether this process prints, and writes files. Starts nothing."""
    return True


@_of_backend
def distribution_of(model):
    """A scope of the distribution that a model was built under."""
    return contextlib.nullcontext()


@_of_distribution
def work(what, by_writer=False):
    """Within it, what one process raises, all raise.

    Collective under a distribution: every process enters it.

    Args:
        what: string, what is done, for errors.
        by_writer: whether it is done when the process that writes has done its
            part, who then ends it without the others, if they are not in it.

    Yields:
        An object with a bool `flag`, to be set by a process; afterwards it
        says whether any has.
    """
    return contextlib.nullcontext(types.SimpleNamespace(flag=False))


@_of_distribution
def any_process(flag, by_writer=False):
    """Whether a flag is set on any process.

    Collective under a distribution: every process calls it.

    Args:
        flag: bool.
        by_writer: whether the process that writes alone may set it, who then
            needs nobody to know the answer.
    """
    return bool(flag)


@_of_distribution
def any_of_each(flags):
    """As `any_process`, of each flag of a list."""
    return [bool(flag) for flag in flags]


@_of_distribution
def as_one_device(model):
    """Within it, the process that writes has no distribution, and the model's
    variables are whole there.

    Collective under a distribution: every process enters it.
    """
    return contextlib.nullcontext()


@_of_backend
def in_pieces(value):
    """What a process of all writes into a file.

    Returns:
        Of a tensor or variable that is spread over processes, or that another
        process writes: an object with a `shape`, a numpy `dtype`, and, when it
        is iterated, pairs of a slice of rows and a numpy array of them, on the
        process that writes. To iterate it is collective: every process does,
        to the end. Anything else as it is.
    """
    return value


@_of_backend
def is_in_pieces(value):
    """Whether `in_pieces` has returned a value, and not as it was."""
    return False


@_of_backend
def random_states(model):
    """The states of all random generators that a training draws from, of
    which JSON can be made; None where nobody knows them."""
    return None


@_of_backend
def set_random_states(model, states):
    """Puts back what `random_states` gave."""


@_of_backend
def sharded_checkpoints():
    """The module that saves and restores sharded checkpoints."""
    raise NotImplementedError(
        "Sharded checkpoints are there for the torch backend. Use "
        "`keras.callbacks.OrbaxCheckpoint`."
    )


@_of_backend
def dry_runs():
    """The module that trains a model for a few steps and counts."""
    raise NotImplementedError(
        "A layout report is there for the torch backend: on others a compiler "
        "decides what is communicated."
    )


@_of_backend
def flows():
    """The module that tells where the cuts of weights go in a model."""
    raise NotImplementedError(
        "`LayoutMap.auto` is there for the torch backend. Set layouts by hand."
    )


@_of_backend
def stored_shape(variable):
    """The shape of what this process stores of a variable: a tuple."""
    return tuple(variable.shape)


# ---- rows of a batch ---------------------------------------------------------


@_of_backend
def share_of_rows():
    """The share of the global batch whose rows this process computes on, from
    0 to 1; None where it computes on all of them."""
    return None


@_of_backend
def share_of_sum(x, dtype):
    """The part that belongs to local rows of the sum of `x` over all rows.

    It has no gradient. Collective where `share_of_rows` is not None: every
    process calls it.

    Args:
        x: tensor, a sum over local rows.
        dtype: of the result.
    """
    raise NotImplementedError("The rows of a batch are not spread.")


@_of_backend
def spans_rows(x, axes, synchronized=False):
    """Whether statistics of `x` go over rows that other processes have.

    Args:
        x: tensor.
        axes: tuple of the dims that are reduced, None for all.
        synchronized: bool, whether the program asks for global statistics.
    """
    return False


@_of_backend
def sum_over_rows(x):
    """The sum of a tensor over all that have rows, with its gradient.

    Collective where `spans_rows`: every process calls it.
    """
    return x


@_of_backend
def gather_rows(x):
    """All rows of a tensor, for a loss that looks at them together.

    Collective where `share_of_rows` is not None: every process calls it.
    """
    return x


@_of_backend
def own_rows(x):
    """Those of local rows, of a tensor that has all of them."""
    return x


# ---- losses and metrics ------------------------------------------------------


@_of_backend
def call_loss(loss, function, y_true, y_pred, sample_weight):
    """`function(y_true, y_pred, sample_weight)`, the call of a loss."""
    return function(y_true, y_pred, sample_weight)


@_of_backend
def call_metric(metric, function, args, kwargs):
    """`function(*args, **kwargs)`, an update of a metric's state."""
    return function(*args, **kwargs)


@_of_backend
def metric_result(metric, function):
    """`function()`, the result of a metric."""
    return function()
