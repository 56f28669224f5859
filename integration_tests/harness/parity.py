"""What a program gives under a distribution, against one device.

What one device gives is computed by rank 0 alone, which tells the others.
"""

import contextlib
import functools

import numpy as np
import torch
import torch.distributed as dist

import keras
from integration_tests.harness import everyone
from keras.src import tree

# A GPU adds up in another order for another shape.
TOLERANCE = 1e-4 if torch.cuda.is_available() else 1e-5
SGD = "sgd"


def layout_map(mesh, layouts):
    """A `LayoutMap` of a dict."""
    result = keras.distribution.LayoutMap(mesh)
    for key, axes in layouts.items():
        result[key] = axes
    return result


def model_parallel(
    shape, layouts, axes=("batch", "model"), batch="batch", **kwargs
):
    """A `ModelParallel` over all processes.

    Args:
        shape: tuple, the sizes of the mesh axes.
        layouts: dict from keys of a layout map to tuples of axis names.
        axes: names of the mesh axes.
        batch: name of the data axis.
    """
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh(shape, axes, devices)
    return keras.distribution.ModelParallel(
        layout_map=layout_map(mesh, layouts), batch_dim_name=batch, **kwargs
    )


def on_one_device(program):
    """What a program gives on rank 0, without a distribution.

    All other ranks wait for it, so that their cores are another test's.

    Collective: every process calls it.

    Args:
        program: function without arguments, whose result can be pickled.
    """
    answer, error = [None, None], None
    if dist.get_rank() == 0:
        try:
            answer = [program(), None]
        except Exception as raised:
            error = raised
            answer = [None, f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(answer)
    if error is not None:
        raise error
    result, failure = answer
    if failure is not None:
        raise RuntimeError(f"Rank 0 failed without a distribution: {failure}")
    # Names and random numbers go on from here in the same way everywhere.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    return result


@contextlib.contextmanager
def fresh(distribution, seed):
    """Within it a new session, of this seed, under a distribution or None.

    Collective the first time for a distribution: every process enters it.
    """
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed)
    with contextlib.ExitStack() as stack:
        if distribution is not None:
            stack.enter_context(distribution.scope())
        yield


def train(make_model, x, y, distribution=None, **kwargs):
    """Builds a model and trains it on one batch, for a step or more.

    Collective: every process calls it.

    Args:
        make_model: function without arguments.
        x, y: the batch.
        distribution: None for what one device gives.
        **kwargs: of `train_here`.

    Returns:
        Dict of whole numpy arrays: `logs` of each step, `gradients` of the
        first step, `weights` after the last, `predictions` before and after.
    """
    function = functools.partial(train_here, make_model, x, y, **kwargs)
    if distribution is None:
        return on_one_device(function)
    return function(distribution=distribution)


def train_here(
    make_model,
    x,
    y,
    distribution=None,
    loss="mse",
    steps=1,
    optimizer=None,
    metrics=None,
    weighted_metrics=None,
    **step_arguments,
):
    """What `train` gives, computed on this process.

    Collective under a distribution: every process calls it.
    """
    with fresh(distribution, 7):
        model = make_model()
        model.compile(
            optimizer=optimizer() if optimizer else keras.optimizers.SGD(0.1),
            loss=loss,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
        )
        before = model.predict_on_batch(x)
        logs, gradients = [], {}
        for step in range(steps):
            logs.append(
                model.train_on_batch(x, y, return_dict=True, **step_arguments)
            )
            if not step:
                gradients = {
                    v.path: None
                    if v.value.grad is None
                    else keras.ops.convert_to_numpy(v.value.grad)
                    for v in model.trainable_variables
                }
        after = model.predict_on_batch(x)
        weights = {
            v.path: keras.ops.convert_to_numpy(v) for v in model.variables
        }
    return {
        "logs": logs,
        "gradients": gradients,
        "weights": weights,
        "predictions": (before, after),
    }


_largest = [0.0]


def largest_difference():
    """The largest that `assert_same` has met since it was asked last."""
    largest, _largest[0] = _largest[0], 0.0
    return largest


def assert_same(actual, expected, tolerance=TOLERANCE, whole=None):
    """Compares nested results, relative to the largest value of each array.

    Args:
        whole: the arrays that those of `expected` are parts of, if they are.
    """
    tree.assert_same_structure(actual, expected)
    paths = tree.flatten_with_path(expected)
    wholes = tree.flatten(expected if whole is None else whole)
    for (path, want), got, whole in zip(paths, tree.flatten(actual), wholes):
        if want is None or got is None:
            assert want is None and got is None, path
            continue
        want, got = np.asarray(want), np.asarray(got)
        assert want.shape == got.shape, (path, want.shape, got.shape)
        if not want.size:
            continue
        scale = max(1e-2, float(np.abs(whole).max()))
        worst = float(np.abs(want - got).max()) / scale
        assert worst <= tolerance, f"{path}: differs by {worst:.1e} (relative)"
        _largest[0] = max(_largest[0], worst)


def assert_parity(
    make_model, x, y, distribution, tolerance=TOLERANCE, **kwargs
):
    """Asserts that `distribution` gives what one device gives.

    Collective: every process calls it.
    """
    expected = train(make_model, x, y, **kwargs)
    actual = train(make_model, x, y, distribution=distribution, **kwargs)
    assert_same(actual, expected, tolerance)


def run(program, make_model, distribution=None):
    """What a program says of a new model, and the weights that it leaves.

    Collective: every process calls it.

    Args:
        program: takes a model, gives nested numbers.
        make_model: makes and compiles the model.
        distribution: None for what one device gives.
    """
    function = functools.partial(run_here, program, make_model)
    if distribution is None:
        return on_one_device(function)
    return function(distribution)


def run_here(program, make_model, distribution=None):
    """What `run` gives, computed on this process.

    Collective under a distribution: every process calls it.
    """
    with fresh(distribution, 11):
        model = make_model()
        said = program(model)
        return {"said": said, "weights": model.get_weights()}


def assert_equal_on_all(name, actual, expected, tolerance=TOLERANCE):
    """Asserts that all processes have the same results, and these.

    Collective: every process calls it.

    Args:
        name: what ran, for the error.
    """
    try:
        assert_same(actual, expected, tolerance)
        for other in everyone.gather(actual):
            assert_same(actual, other, tolerance=0)
    except Exception as error:
        error.add_note(f"under {name}")
        raise
