"""Regularizers of sharded variables."""

import contextlib

from keras.src.backend.common.variables import Variable
from keras.src.backend.torch.distribution import process_group
from keras.src.backend.torch.distribution import sharded
from keras.src.backend.torch.distribution.context import logger

# Marks a variable whose regularizer runs on the whole value, which is said.
SAID = "_keras_said_penalty_of_whole"


def penalty(regularizer, x):
    """What a regularizer gives for a sharded variable: a plain scalar.

    Collective: every process of the variable's mesh calls it.

    Args:
        regularizer: function of a tensor.
        x: the variable, or its value.
    """
    try:
        result = regularizer(x)
    except Exception as error:
        # Code that DTensor cannot run sees the whole value.
        with _whole_value(x) as shown:
            result = regularizer(shown)
        if SAID not in vars(x) and process_group.is_first():
            logger.warning(
                "The regularizer of '%s' is computed on its whole value, "
                "gathered in each step: its code does not run on shards "
                "(%s: %s)",
                getattr(x, "path", "a variable"),
                type(error).__name__,
                str(error).partition("\n")[0],
            )
        vars(x)[SAID] = True
    return sharded.whole(result)


@contextlib.contextmanager
def _whole_value(x):
    """Gives a variable that holds its whole value within it, or that value.

    Collective: every process of its mesh enters it.
    """
    if not isinstance(x, Variable):
        yield sharded.whole(x)
        return
    stored, x._value = x._value, sharded.whole(x.value)
    try:
        yield x
    finally:
        x._value = stored
