"""Optimizers on sharded variables give what they give on one device."""

import functools

import numpy as np
import pytest
from torch.distributed.tensor import DTensor

import keras
from integration_tests.harness import parity
from keras import layers
from keras import optimizers
from keras.src.backend.torch.distribution.report.collectives import (
    CollectiveCounter,
)

STEPS = 3
LAYOUTS = {
    ".*(up|only)/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*down/kernel": ("model", "batch"),
    ".*norm/gamma": ("batch",),
}


def data():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((7, 6)).astype("float32")
    y = rng.standard_normal((7, 3)).astype("float32")
    return x, y


def make_model(**kwargs):
    """Sharded kernels, vectors and a kernel that cannot be cut equally, and
    replicated ones: `whole`, `norm/beta`, `down/bias`."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh", name="up", **kwargs),
            layers.Dense(4, name="down", **kwargs),
            layers.LayerNormalization(name="norm"),
            layers.Dense(5, "tanh", name="whole", **kwargs),
            layers.Dense(3, name="only", **kwargs),
        ]
    )


def check(make_optimizer, world_size, make=make_model):
    """Compares losses, the first gradients, and weights after some steps.

    Two processes are used as model shards and as data shards, four as both.
    """
    x, y = data()
    arguments = {"optimizer": make_optimizer, "steps": STEPS}
    expected = parity.train(make, x, y, **arguments)
    # Those that are only added up are each shard's own.
    if make_optimizer().gradient_accumulation_steps:
        del expected["gradients"]
    shapes = [(1, 2), (2, 1)] if world_size == 2 else [(2, 2)]
    for shape in shapes:
        mesh = parity.model_parallel(shape, LAYOUTS)
        actual = parity.train(make, x, y, distribution=mesh, **arguments)
        if "gradients" not in expected:
            del actual["gradients"]
        parity.assert_same(actual, expected, 2e-5)
    return expected


OPTIMIZERS = {
    "sgd": lambda **k: optimizers.SGD(0.1, **k),
    "momentum": lambda **k: optimizers.SGD(0.1, momentum=0.9, **k),
    "nesterov": lambda **k: optimizers.SGD(
        0.1, momentum=0.9, nesterov=True, **k
    ),
    "adam": lambda **k: optimizers.Adam(0.1, epsilon=1e-3, **k),
    "amsgrad": lambda **k: optimizers.Adam(
        0.1, epsilon=1e-3, amsgrad=True, **k
    ),
    "adamw": lambda **k: optimizers.AdamW(
        0.1, epsilon=1e-3, weight_decay=0.1, **k
    ),
    "rmsprop": lambda **k: optimizers.RMSprop(
        0.1, epsilon=1e-3, momentum=0.9, centered=True, **k
    ),
    "adagrad": lambda **k: optimizers.Adagrad(0.1, epsilon=1e-3, **k),
    "adadelta": lambda **k: optimizers.Adadelta(1.0, epsilon=1e-3, **k),
    "adamax": lambda **k: optimizers.Adamax(0.1, epsilon=1e-3, **k),
    "nadam": lambda **k: optimizers.Nadam(0.1, epsilon=1e-3, **k),
    "lion": lambda **k: optimizers.Lion(0.1, **k),
    "ftrl": lambda **k: optimizers.Ftrl(
        0.1, l2_regularization_strength=0.1, beta=0.1, **k
    ),
    "lamb": lambda **k: optimizers.Lamb(0.1, epsilon=1e-3, **k),
    "adafactor": lambda **k: optimizers.Adafactor(0.1, **k),
    "muon": lambda **k: optimizers.Muon(0.1, epsilon=1e-3, **k),
    "schedule_free": lambda **k: optimizers.ScheduleFreeAdamW(
        0.1, epsilon=1e-3, **k
    ),
    "loss_scale": lambda **k: optimizers.LossScaleOptimizer(
        optimizers.SGD(0.1, **k), initial_scale=8.0, dynamic_growth_steps=2
    ),
    "multi": lambda **k: optimizers.MultiOptimizer(
        optimizers.OptimizerMap(
            optimizers.SGD(0.1),
            {".*up.*": optimizers.Adam(0.1, epsilon=1e-3)},
        )
    ),
}


@pytest.mark.world(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(name, world_size):
    check(OPTIMIZERS[name], world_size)


# An update of single entries, of norms, of means and of matrices.
@pytest.mark.world(4)
@pytest.mark.parametrize("name", ["adam", "lamb", "adafactor", "muon"])
def test_optimizer_on_both_axes(name, world_size):
    check(OPTIMIZERS[name], world_size)


@functools.cache
def without_option(name):
    return parity.train(
        make_model, *data(), optimizer=OPTIMIZERS[name], steps=STEPS
    )


@pytest.mark.world(2, 4)
@pytest.mark.parametrize("name", ["sgd", "lamb"])
@pytest.mark.parametrize(
    "option",
    [
        {"clipnorm": 0.1},
        {"global_clipnorm": 0.1},
        {"clipvalue": 0.02},
        {"weight_decay": 0.1},
        {"use_ema": True, "ema_momentum": 0.6, "ema_overwrite_frequency": 2},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda option: next(iter(option)),
)
def test_option(name, option, world_size):
    expected = check(lambda: OPTIMIZERS[name](**option), world_size)
    # The option matters to this model.
    with pytest.raises(AssertionError):
        parity.assert_same(
            without_option(name)["weights"], expected["weights"], 1e-4
        )


@pytest.mark.world(2, 4)
def test_constraints(world_size):
    """Of single entries, of columns (which the layout cuts) and of all."""

    def make():
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, name="up", kernel_constraint="non_neg"),
                layers.Dense(
                    4,
                    name="down",
                    kernel_constraint=keras.constraints.MaxNorm(0.5),
                    bias_constraint="non_neg",
                ),
                layers.LayerNormalization(
                    name="norm", gamma_constraint="non_neg"
                ),
                layers.Dense(5, name="whole", kernel_constraint="unit_norm"),
                layers.Dense(
                    3,
                    name="only",
                    kernel_constraint=keras.constraints.MinMaxNorm(
                        0.2, 0.4, axis=(0, 1)
                    ),
                ),
            ]
        )

    check(OPTIMIZERS["sgd"], world_size, make)


@pytest.mark.world(2)
def test_weight_decay_with_exclusions(world_size):
    def make_optimizer():
        optimizer = optimizers.AdamW(0.1, weight_decay=0.5, epsilon=1e-3)
        optimizer.exclude_from_weight_decay(var_names=["up", "bias"])
        return optimizer

    check(make_optimizer, world_size)


@pytest.mark.world(2)
def test_updates_by_hand(world_size):
    """`apply` of whole gradients, and `stateless_apply`, without a step."""
    names = ["sgd", "momentum", "adam", "ftrl", "schedule_free", "lamb"]

    def program(name):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(7)
        model = make_model()
        optimizer = OPTIMIZERS[name]()
        variables = model.trainable_variables
        rng = np.random.default_rng(1)
        for _ in range(2):
            gradients = [
                keras.ops.convert_to_tensor(
                    rng.standard_normal(v.shape).astype("float32")
                )
                for v in variables
            ]
            optimizer.apply(gradients, variables)
        by_hand = [keras.ops.convert_to_numpy(v) for v in variables]
        updated = optimizer.stateless_apply(
            [v.value for v in optimizer.variables],
            gradients,
            [v.value for v in variables],
        )
        updated = keras.tree.map_structure(
            keras.ops.convert_to_numpy, list(updated)
        )
        return by_hand, updated

    for name in names:
        expected = parity.on_one_device(lambda: program(name))
        for shape in [(1, 2), (2, 1)]:
            with parity.model_parallel(shape, LAYOUTS).scope():
                parity.assert_same(program(name), expected, 2e-5)


@pytest.mark.world(2)
def test_learning_rate_schedule(world_size):
    check(
        lambda: optimizers.SGD(
            optimizers.schedules.PiecewiseConstantDecay([1, 2], [0.1, 0.5, 0.2])
        ),
        world_size,
    )


@pytest.mark.world(4)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slots_are_laid_out_like_their_variable(name):
    with parity.model_parallel((2, 2), LAYOUTS).scope():
        model = make_model()
        optimizer = OPTIMIZERS[name]()
        model.compile(optimizer, "mse")
        model.train_on_batch(*data())
        slots = 0
        for slot in optimizer.variables:
            for v in model.trainable_variables:
                # Keras's names: "optimizer/dense_kernel_momentum".
                path = v.path.replace("/", "_")
                if path in slot.path and slot.shape == v.shape:
                    assert placements(slot) == placements(v), slot.path
                    slots += isinstance(v.value, DTensor)
        if name not in ("sgd", "loss_scale"):
            assert slots >= 3


def placements(variable):
    """Placements and the size of what this process stores."""
    value = variable.value
    if not isinstance(value, DTensor):
        return None, tuple(value.shape)
    return value.placements, tuple(value.to_local().shape)


@pytest.mark.world(2)
def test_accumulators_and_averages_are_sharded():
    with parity.model_parallel((1, 2), LAYOUTS).scope():
        model = make_model()
        optimizer = optimizers.SGD(
            0.1, use_ema=True, gradient_accumulation_steps=2
        )
        model.compile(optimizer, "mse")
        model.train_on_batch(*data())
        for kind in (
            optimizer._accumulated_gradients,
            optimizer._model_variables_moving_average,
        ):
            for slot, v in zip(kind, model.trainable_variables):
                assert placements(slot) == placements(v)


@pytest.mark.world(2)
def test_gradients_may_be_arrays(world_size):
    def program(layer):
        # One that released Keras hands them to as they are.
        optimizer = keras.optimizers.Ftrl(0.1)
        gradients = [np.full(v.shape, 0.5) for v in layer.trainable_variables]
        optimizer.apply_gradients(zip(gradients, layer.trainable_variables))

    def make_layer():
        layer = layers.Dense(4)
        layer.build((2, 3))
        return layer

    parity.assert_equal_on_all(
        "arrays",
        parity.run(
            program,
            make_layer,
            parity.model_parallel((1, 2), {".*kernel": (None, "model")}),
        ),
        parity.run(program, make_layer),
    )


@pytest.mark.world(2, 4)
def test_matrices_are_computed_by_one_process_each(world_size):
    """Muon's: each goes there and back, as many at the same time as there are
    processes; what Adam updates does not travel."""
    shapes = [(8, 12), (9, 7), (5, 3), (1, 4), (6, 6)]
    layouts = {
        "embedding": ("model", None),
        "0|2|3": ("batch", None),
        "1|4": (None, "batch"),
        "vector": ("batch",),
    }

    def program(matrices):
        optimizer = optimizers.Muon(0.1, nesterov=False)
        optimizer.build(matrices)
        counted = []
        for i in range(2):
            gradients = [v * (i + 1) / 2 for v in matrices]
            with CollectiveCounter() as counter:
                optimizer.apply(gradients, matrices)
            counted.append(counter)
        return matrices, counted

    def make():
        rng = np.random.default_rng(3)
        values = [rng.standard_normal(shape) for shape in shapes]
        values += [rng.standard_normal((6, 2)), rng.standard_normal(9)]
        names = [*map(str, range(len(shapes))), "embedding", "vector"]
        return [
            keras.Variable(value, name=name)
            for value, name in zip(values, names)
        ]

    expected, _ = parity.on_one_device(lambda: program(make()))
    for shape in [(world_size, 1), (2, world_size // 2)]:
        with parity.model_parallel(shape, layouts).scope():
            actual, counters = program(make())
            parity.assert_same(
                [keras.ops.convert_to_numpy(v) for v in actual],
                [keras.ops.convert_to_numpy(v) for v in expected],
            )
        rounds = -(-len(shapes) // world_size)
        for counter in counters:
            assert +counter.calls == {"all_to_all": 2 * rounds}
