"""What callbacks count, for a training that goes on from a file.

A file has numbers of Keras's own callbacks, what `History` has recorded, and
the best weights that `EarlyStopping` keeps, as arrays; of other callbacks what
their `state_dict()` gives, of which JSON can be made, for their
`load_state_dict(state)`. Process 0 writes it, and all read it.
"""

import json
import warnings

import ml_dtypes
import numpy as np

from keras.src import backend
from keras.src.callbacks.early_stopping import EarlyStopping
from keras.src.callbacks.history import History
from keras.src.callbacks.model_checkpoint import ModelCheckpoint
from keras.src.callbacks.reduce_lr_on_plateau import ReduceLROnPlateau
from keras.src.callbacks.swap_ema_weights import SwapEMAWeights
from keras.src.callbacks.tensorboard import TensorBoard
from keras.src.utils import io_utils

COUNTS = {
    EarlyStopping: ("wait", "best", "best_epoch", "stopped_epoch"),
    ModelCheckpoint: (
        "best",
        "_batches_seen_since_last_saving",
        "_last_batch_seen",
    ),
    ReduceLROnPlateau: ("wait", "best", "cooldown_counter"),
    SwapEMAWeights: ("_ema_weights_in_model",),
    TensorBoard: ("_global_train_batch", "_global_test_batch"),
}


def get(callbacks):
    """The states of callbacks.

    Args:
        callbacks: list of callbacks.

    Returns:
        Dict from names of callbacks to dicts, of which JSON can be made, and
        dict from names to arrays.
    """
    states, arrays = {}, {}
    for name, callback in _named(callbacks):
        state = {"counts": {n: _plain(callback, n) for n in _counts(callback)}}
        if _is_own(callback):
            # Of numpy's numbers too, as they come from logs.
            said = json.dumps(callback.state_dict(), default=_as_python)
            state["own"] = json.loads(said)
        if isinstance(callback, History):
            state["history"] = _recorded(callback)
        weights = getattr(callback, "best_weights", None)
        if isinstance(callback, EarlyStopping) and weights is not None:
            state["weights"] = []
            for i, weight in enumerate(weights):
                weight = np.asarray(weight)
                state["weights"].append([weight.dtype.name, weight.shape])
                arrays[f"{name}/{i}"] = np.ascontiguousarray(weight)
        states[name] = state
    return states, arrays


def set(callbacks, states, read):
    """Gives callbacks the states that they had.

    Args:
        callbacks: list of callbacks.
        states: dict, as `get` gives it, after JSON.
        read: function from the name of an array to the array, or its bytes.
    """
    named = dict(_named(callbacks))
    for name, state in states.items():
        callback = named.get(name)
        if callback is None:
            continue
        for attribute, value in state["counts"].items():
            setattr(callback, attribute, value)
        if "own" in state and _is_own(callback):
            callback.load_state_dict(state["own"])
        if "history" in state and isinstance(callback, History):
            callback.epoch = state["history"]["epoch"]
            callback.history = state["history"]["history"]
        if "weights" in state:
            callback.best_weights = [
                _array(read(f"{name}/{i}"), dtype, shape)
                for i, (dtype, shape) in enumerate(state["weights"])
            ]
    lacking = sorted(states.keys() - named.keys())
    new = sorted(
        name
        for name in named.keys() - states.keys()
        # A file of old may have none.
        if not isinstance(named[name], History)
    )
    if lacking or new:
        warnings.warn(
            f"Training goes on with other callbacks than it began with: {new} "
            f"begin anew, and what {lacking} counted is not used.",
            stacklevel=3,
        )


def end(callback, path, epoch):
    """Lets a `fit` that goes on train no more, as it was stopped.

    Args:
        callback: one of its callbacks.
        path: what it goes on from, and `epoch` the number of its next epoch.
    """
    callback.model._initial_epoch = max(epoch, callback.params["epochs"])
    io_utils.print_msg(
        f"\nA callback stopped this training after epoch {epoch}, so no more "
        f"is trained. Remove {path} to train again."
    )


def _named(callbacks):
    """The callbacks that have a state, and a name for each: its class, what it
    monitors, and which one of these it is."""
    counts = {}
    for callback in callbacks:
        if (
            _counts(callback)
            or _is_own(callback)
            or isinstance(callback, History)
        ):
            kind = type(callback).__name__, getattr(callback, "monitor", "")
            number = counts[kind] = counts.get(kind, -1) + 1
            yield ":".join((*kind, str(number))), callback


def _counts(callback):
    for known, names in COUNTS.items():
        if isinstance(callback, known):
            return names
    return ()


def _is_own(callback):
    return hasattr(callback, "state_dict") and hasattr(
        callback, "load_state_dict"
    )


def _recorded(history):
    """What a `History` has recorded, of which JSON can be made."""
    recorded = {}
    for name, values in history.history.items():
        try:
            recorded[name] = json.loads(json.dumps(values, default=_as_python))
        except TypeError:
            warnings.warn(
                "JSON is made of the logs of a training that may go on, so "
                f"where it does the history of '{name}' begins anew. Received: "
                f"a value of type {type(values[-1]).__name__}",
                stacklevel=5,
            )
    return {"epoch": list(history.epoch), "history": recorded}


def _plain(callback, name):
    value = getattr(callback, name)
    if value is None or isinstance(value, (bool, int)):
        return value
    return float(value)


def _as_python(value):
    if backend.is_tensor(value):
        value = backend.convert_to_numpy(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(
        "JSON is made of the state of a callback. Received: "
        f"state_dict() with {value!r} of type {type(value).__name__}"
    )


def _array(array, dtype, shape):
    if dtype != array.dtype.name:
        dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        array = array.view(dtype)
    return array.reshape(shape)
