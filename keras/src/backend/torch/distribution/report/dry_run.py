"""A few steps of training, recorded, and what a process stores.

The steps are real ones, of the real code. Without processes they run in a fake
world, in which this process is the first of many (`fake_world`). The first
steps of a training are not like those that follow: in which order weights are
gathered and which gradients go together is learned from the last step. What is
recorded is the first step that is like the one before it, the steady state,
which for all layouts that were tried is the third or the fourth.
"""

import contextlib
import copy
import math
import random
import threading
import warnings

import numpy as np
import torch
import torch.distributed as dist

from keras.src import backend
from keras.src import tree
from keras.src.backend.common import global_state
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.report import fake_world
from keras.src.backend.torch.distribution.report.recorder import Recorder
from keras.src.layers import Layer

# So many steps at most.
STEPS = 8


def of(model, distribution, batch_size=None, x=None, y=None):
    """Trains a model like this one for a few steps.

    Nothing is communicated, and nothing that was there changes.

    Args:
        model: a model, or a function without arguments that makes one. It is
            made anew under the distribution.
        distribution: `keras.distribution.Distribution`.
        batch_size: int, rows of a global batch.
        x, y: a batch, in place of one of ones.

    Returns:
        Tuple of the model that was made and what `facts_of` says.

    Raises:
        RuntimeError: in a process of several.
    """
    is_inside = fake_world.is_inside()
    if not is_inside:
        _check_alone()
    size = math.prod(int(n) for n in distribution.device_mesh.shape)
    with contextlib.ExitStack() as stack:
        stack.enter_context(own_session())
        if not is_inside:
            # A program that is reported may report by itself: it is in one.
            stack.enter_context(fake_world.of(size))
            distribution = _anew(distribution, size)
        stack.enter_context(distribution.scope())
        stack.enter_context(warnings.catch_warnings())
        # The report says it too.
        warnings.filterwarnings("ignore", "The key '")
        made = model() if is_function(model) else _clone(model)
        is_compiled = made.compiled
        if not is_compiled:
            made.compile("adam", "mse")
        if x is None:
            x = inputs_of(made, batch_size)
        if y is None:
            y = _targets(made, x)
        recorder = stack.enter_context(Recorder())
        for _ in range(STEPS):
            for _ in range(steps_of(made.optimizer)):
                made.train_on_batch(x, y)
            recorder.cut()
            if recorder.is_steady():
                break
        return made, {**facts_of(recorder), "compiled": is_compiled}


def _check_alone():
    """Raises: RuntimeError: in a job of several processes."""
    if process_group.is_running() and dist.get_world_size() > 1:
        raise RuntimeError(
            "`keras.distribution.report` is a dry run of one process, which "
            "plays one of a job: in a real job it would make another model "
            "beside yours, and the others would wait for it. Run `python -m "
            "keras_torch_distribution report train.py --processes "
            f"{dist.get_world_size()}`, which takes the program as it is; or "
            "call it in a program of its own, without a launcher. Received: a "
            f"call on process {dist.get_rank()} of {dist.get_world_size()}."
        )


def steps_of(optimizer):
    """How many steps lead to an update: an int."""
    return getattr(optimizer, "gradient_accumulation_steps", None) or 1


def facts_of(recorder):
    """What a recorder has seen of a training.

    Args:
        recorder: a `Recorder`, of which steps have ended.

    Returns:
        Dict of what JSON knows: "collectives", a list of those of one step (see
        `Recorder.record`), "steady", whether the step before it had the same,
        "rows", of a global batch, and "peak", bytes at the most that a step
        has made.
    """
    ended = recorder.steps[:-1]
    return {
        "collectives": ended[-1] if ended else [],
        "steady": recorder.is_steady(),
        "rows": recorder.rows,
        "peak": recorder.peak,
    }


@contextlib.contextmanager
def own_session():
    """Within it, names and random numbers go on as they would, and afterwards
    from where they were."""
    tracker = global_state.GLOBAL_STATE_TRACKER
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    own = global_state.GLOBAL_STATE_TRACKER = threading.local()
    for name, value in vars(tracker).items():
        is_own = isinstance(value, (dict, list))
        setattr(own, name, copy.copy(value) if is_own else value)
    own.distribution = own._torch_set = own.global_seed_generator = None
    try:
        yield
    finally:
        global_state.GLOBAL_STATE_TRACKER = tracker
        context_lib.set_last(global_state.get_global_attribute("distribution"))
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _anew(distribution, size):
    """The same distribution, of processes that are there now."""
    from keras.src.distribution import distribution_lib

    kind = "gpu" if process_group.device_type() == "cuda" else "cpu"
    mesh = distribution.device_mesh
    mesh = distribution_lib.DeviceMesh(
        mesh.shape, mesh.axis_names, [f"{kind}:{i}" for i in range(size)]
    )
    new = copy.copy(distribution)
    new.__dict__.pop(marks.CONTEXT, None)
    new._device_mesh = mesh
    new._num_processes, new._process_id = size, 0
    new._is_multi_process = size > 1
    if hasattr(distribution, "_layout_map"):
        new._layout_map = distribution_lib.LayoutMap(mesh)
        for key, layout in distribution._layout_map.items():
            new._layout_map[key] = layout.axes
    return new


def is_function(model):
    return callable(model) and not isinstance(model, Layer)


def _clone(model):
    """A model like this one, compiled as it is.

    Raises:
        ValueError: if it cannot be made anew.
    """
    from keras.src.models import Functional
    from keras.src.models import Sequential
    from keras.src.models.cloning import clone_model

    try:
        if type(model) in (Functional, Sequential):
            clone = clone_model(model)
        else:
            clone = type(model).from_config(model.get_config())
    except Exception as error:
        raise ValueError(
            "The model cannot be made anew from its config. Hand over a "
            "function that makes it, compiled, in place of the model. "
            f"Received: model={model}"
        ) from error
    if model.compiled:
        arguments = model._compile_config.config
        clone.compile(**tree.map_structure(_new, arguments))
    return clone


def _new(x):
    """An optimizer or a metric like this one, without its variables."""
    from keras.src.metrics import Metric
    from keras.src.optimizers import Optimizer

    if isinstance(x, (Metric, Optimizer)):
        return type(x).from_config(x.get_config())
    return x


def inputs_of(model, rows):
    """A batch of ones."""
    spec = getattr(model, "_inputs_struct", None)
    if spec is None and hasattr(model, "_functional"):
        spec = getattr(model._functional, "_inputs_struct", None)
    if spec is None or any(None in x.shape[1:] for x in tree.flatten(spec)):
        raise ValueError(
            "The shape of a batch is not known from the model. Pass `x` (and "
            "`y`), a batch as it is trained on. Received: inputs="
            f"{spec}"
        )
    if rows is None:
        raise ValueError("Pass `batch_size`, the rows of a global batch.")

    def ones(x):
        shape = (rows, *x.shape[1:])
        return np.ones(shape, backend.standardize_dtype(x.dtype))

    return tree.map_structure(ones, spec)


def _targets(model, x):
    """Targets that fit the model's loss, None if it has none."""
    loss = model._compile_config.config.get("loss")
    if loss is None:
        return None
    if isinstance(loss, (list, tuple, dict)):
        raise ValueError(
            "Pass `y`, targets as the model is trained on: it has several "
            f"losses. Received: loss={loss}"
        )
    own = getattr(loss, "name", None) or getattr(loss, "__name__", loss)
    is_sparse = "sparse" in str(own).lower() or loss == "auto"
    outputs = getattr(model, "_outputs_struct", None)
    if outputs is None and hasattr(model, "_functional"):
        outputs = model._functional._outputs_struct
    if outputs is None:
        outputs = model.predict_on_batch(x)

    def zeros(output):
        shape = (_rows(x), *output.shape[1:])
        if is_sparse:
            return np.zeros(shape[:-1], "int32")
        return np.zeros(shape, "float32")

    return tree.map_structure(zeros, outputs)


def _rows(x):
    return int(tree.flatten(x)[0].shape[0])
