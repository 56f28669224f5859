"""Every dtype policy gives what it gives on one device."""

import functools

import numpy as np
import pytest

import keras
from integration_tests.harness import parity
from keras import layers
from keras import ops
from keras.src import tree

LAYOUTS = {
    ".*table/embeddings": ("model", "batch"),
    ".*column/kernel": (None, "model"),
    ".*column/bias": ("model",),
    ".*row/kernel": ("model", "batch"),
    "attention/(query|key|value)/kernel": (None, "model", None),
    "attention/attention_output/kernel": ("model", None, None),
    ".*norm/gamma": ("batch",),
    ".*spread/kernel": ("batch", None),
}
# Relative to the largest entry. In half precision, partial sums are rounded
# once more than on one device, before they are added up. Of float64, released
# Keras computes much in float32.
POLICIES = {
    "float64": 2e-6,
    "mixed_bfloat16": 6e-2,
    "bfloat16": 6e-2,
    "mixed_float16": 8e-3,
    "float16": 8e-3,
}


def under_policy(name, program):
    """A function that runs a program under a policy. What trains clears the
    session, and the policy with it: so it is set inside."""

    @functools.wraps(program)
    def run(*args, **kwargs):
        policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
        keras.config.set_dtype_policy(name)
        if name == "float64":
            keras.config.set_floatx(name)
        try:
            return program(*args, **kwargs)
        finally:
            keras.config.set_dtype_policy(policy)
            keras.config.set_floatx(floatx)

    return run


def make_model():
    inputs = keras.Input((4,), dtype="int32")
    # Of values that normalization need not magnify, nor their rounding.
    normal = keras.initializers.RandomNormal(stddev=1.0)
    x = layers.Embedding(9, 6, normal, name="table")(inputs)
    # A bias of keys, too, moves nothing.
    attention = layers.MultiHeadAttention(
        2, 3, use_bias=False, name="attention"
    )
    x = x + attention(x, x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Dense(8, "tanh", name="column")(x)
    # The gradient of a bias in front of a normalization is nothing but noise.
    x = layers.Dense(6, use_bias=False, name="row")(x)
    x = layers.BatchNormalization()(x)
    x = layers.Dense(5, "tanh", name="spread")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def train(name, distribution=None):
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 9, (7, 4)), rng.standard_normal((7, 4, 3))
    optimizer = functools.partial(keras.optimizers.SGD, 0.05)
    if name in ("float16", "mixed_float16"):

        def optimizer():
            return keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.05),
                initial_scale=64.0,
                dynamic_growth_steps=1,
            )

    def make():
        model = under_policy(name, make_model)()
        dtype = model.get_layer("row").compute_dtype
        assert dtype == name.removeprefix("mixed_")
        return model

    return parity.train(
        make, x, y, distribution, optimizer=optimizer, metrics=["mae"]
    )


def check(name, shapes):
    expected = train(name)
    for shape in shapes:
        actual = train(name, parity.model_parallel(shape, LAYOUTS))
        parity.assert_same(actual, expected, POLICIES[name])


@pytest.mark.world(2)
@pytest.mark.parametrize("name", POLICIES)
def test_policy(name, world_size):
    check(name, [(1, 2), (2, 1)])


@pytest.mark.world(4)
@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16"])
def test_policy_on_both_axes(name, world_size):
    check(name, [(2, 2)])


FIRST_DIMS = {
    ".*table/embeddings": ("model", None),
    "(column|row|spread|head)/kernel": ("model", "batch"),
    "attention/(query|key|value)/kernel": ("model", None, None),
    "attention/attention_output/kernel": ("model", None, None),
}


@pytest.mark.world(4)
@pytest.mark.parametrize(
    "layouts", [LAYOUTS, FIRST_DIMS], ids=["mixed", "first"]
)
def test_sums_of_shards_round_as_one_device_does(layouts, world_size):
    """bfloat16 lies as far from float32 as it does on one device."""

    def numbers(result):
        parts = result["gradients"], result["predictions"]
        flat = [[np.ravel(x) for x in tree.flatten(part)] for part in parts]
        return [np.concatenate(part) for part in flat]

    truth = numbers(train("float32"))
    one = numbers(train("mixed_bfloat16"))
    mesh = parity.model_parallel((2, 2), layouts)
    ours = numbers(train("mixed_bfloat16", mesh))
    for right, expected, actual in zip(truth, one, ours):
        error = np.linalg.norm(expected - right)
        assert np.linalg.norm(actual - right) <= 1.3 * error


@pytest.mark.world(2)
@pytest.mark.parametrize("where", ["row", "column"])
def test_overflow_on_one_process(where, world_size):
    """All skip the step and halve the scale: no process goes on alone."""

    def program():
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(6, name="column"),
                layers.Dense(3, name="row"),
            ]
        )
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1, momentum=0.9), initial_scale=1024.0
        )
        model.compile(optimizer, "mse")
        x, y = np.ones((7, 4), "float32"), np.zeros((7, 3), "float32")
        overflowing = x.copy()
        column, row = (layer.kernel for layer in model.layers)
        if where == "row":
            # In the gradients of the last data shard.
            overflowing[6] = 6e4
        else:
            # In the gradients of the last column, which gives nothing forward.
            kernels = np.full((4, 6), 0.1), np.full((6, 3), 0.1)
            kernels[0][:, 5] = 0.0
            kernels[1][5] = 6e4
            column.assign(kernels[0])
            row.assign(kernels[1])
        states = []
        for batch in (overflowing, x):
            model.train_on_batch(batch, y)
            states.append(
                [
                    ops.convert_to_numpy(v)
                    for v in (*model.weights, *optimizer.variables)
                ]
            )
            row.assign(np.full((6, 3), 0.1))
        return states

    def run(distribution=None):
        with parity.fresh(distribution, 3):
            return under_policy("mixed_float16", program)()

    expected = parity.on_one_device(run)
    for state in expected:
        assert 512.0 in [float(x) for x in state if np.size(x) == 1]
    for shape in [(1, 2), (2, 1)]:
        actual = run(parity.model_parallel(shape, LAYOUTS))
        parity.assert_same(actual, expected, POLICIES["mixed_float16"])
