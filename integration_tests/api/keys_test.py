"""Keys of a layout map that match more than the weights of layers.

A path of an optimizer's slot, of a metric's state or of an output may match
too, and have other dims. The numbers stay those of one device.
"""

import logging

import numpy as np
import pytest
from torch.distributed.tensor import DTensor

import keras
from integration_tests.harness import parity
from integration_tests.training.optimizers_test import OPTIMIZERS
from keras import layers
from keras import metrics

pytestmark = pytest.mark.world(2)

AXES = ("batch", "model")
SHAPES = [(1, 2), (2, 1)]


def data():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 6)).astype("float32")
    return x, rng.integers(0, 2, (5, 1)).astype("float32")


def make_model():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh", name="up"),
            layers.Dropout(0.0),
            layers.Dense(4, "tanh", name="down"),
            layers.Dense(1, "sigmoid", name="out"),
        ]
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keys_that_match_slots(name):
    x, y = data()
    arguments = {"optimizer": OPTIMIZERS[name], "steps": 2}
    expected = parity.train(make_model, x, y, **arguments)
    for shape, axis in zip(SHAPES, reversed(AXES)):
        # Slots have other ranks, or none at all.
        layouts = {".*kernel.*": (None, axis), ".*bias.*": (axis,)}
        mesh = parity.model_parallel(shape, layouts)
        actual = parity.train(make_model, x, y, distribution=mesh, **arguments)
        parity.assert_same(actual, expected, 2e-5)


STATES = {
    "scalars": (".*(total|count|num_samples)", 1),
    "vectors": ("auc/.*|r2.*", 1),
    "matrices": ("iou/.*", 2),
    "outputs": (".*/output", 2),
    "all": ("(?!sequential).*", 1),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("key", STATES)
def test_keys_that_match_states_of_metrics_and_outputs(key, axis):
    """The data axis cuts no state of a metric, which is local in a step."""

    def make():
        model = make_model()
        model.compile(
            keras.optimizers.SGD(0.1),
            "mse",
            metrics=[
                "mae",
                metrics.AUC(num_thresholds=8),
                metrics.MeanIoU(2, sparse_y_pred=True, name="iou"),
                metrics.R2Score(),
            ],
        )
        return model

    def program(model):
        history = model.fit(*data(), batch_size=3, epochs=2, verbose=0)
        logs = model.evaluate(*data(), verbose=0, return_dict=True)
        states = [keras.ops.convert_to_numpy(v) for v in model.variables]
        return history.history, logs, states

    expected = parity.run(program, make)
    pattern, ndim = STATES[key]
    for shape in SHAPES:
        for dim in range(ndim):
            axes = [None] * ndim
            axes[dim] = axis
            mesh = parity.model_parallel(shape, {pattern: tuple(axes)})
            actual = parity.run(program, make, mesh)
            parity.assert_equal_on_all(f"{shape}, {axes}", actual, expected)


def test_output_of_the_outermost_layer_is_of_our_rows():
    """It is laid out as the outputs of inner layers are."""

    def program(model):
        return model.predict(data()[0], verbose=0)

    expected = parity.run(program, make_model)
    for shape in SHAPES:
        layouts = {".*sequential.*/output": ("batch",)}
        mesh = parity.model_parallel(shape, layouts)
        actual = parity.run(program, make_model, mesh)
        parity.assert_equal_on_all(str(shape), actual, expected)


def test_what_stays_whole_is_said(caplog):
    """And a weight that a layer is built with must fit its key."""
    layouts = {".*kernel": (None, "model")}
    with parity.model_parallel((1, 2), layouts).scope():
        model = make_model()
        model.compile(keras.optimizers.Adafactor(0.1), "mse")
        logger = logging.getLogger("keras.distribution")
        logger.setLevel("INFO")
        try:
            model.train_on_batch(*data())
        finally:
            logger.setLevel("NOTSET")
        assert "'adafactor/kernel' stays whole" in caplog.text
        assert "shape=(6,): 2 entries for 1 dims" in caplog.text
        assert any(
            isinstance(v.value, DTensor) for v in model.optimizer.variables
        )
    layouts = {".*bias": (None, "model")}
    with parity.model_parallel((1, 2), layouts).scope():
        with pytest.raises(
            ValueError, match="up/bias', shape=.8,.: 2 entries for"
        ):
            make_model()
