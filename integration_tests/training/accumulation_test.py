"""Optimizers that add up gradients over several steps, on data shards."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops
from keras import optimizers

pytestmark = pytest.mark.world(4)

# Rows of each batch: uneven shards, and shards without rows.
ROWS = (7, 5, 1, 8, 2, 4, 3)
STEPS = 3
# By a model axis, by the data axis, by both; the others are whole.
LAYOUTS = {
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*down/kernel": ("model", "batch"),
    ".*norm/gamma": ("batch",),
}


def distributions(world_size):
    yield keras.distribution.DataParallel()
    yield parity.model_parallel((2, world_size // 2), LAYOUTS)


def batches():
    rng = np.random.default_rng(3)
    for rows in ROWS:
        x = rng.standard_normal((rows, 6)).astype("float32")
        yield x, rng.standard_normal((rows, 3)).astype("float32")


def make_model(optimizer):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh", name="up"),
            layers.Dense(4, name="down"),
            layers.LayerNormalization(name="norm"),
            layers.Dense(5, "tanh", name="whole"),
            layers.Dense(3, name="last"),
        ]
    )
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def check(program, make, world_size):
    """Compares what `program(make())` returns, and the weights it leaves."""
    expected = parity.run(program, make)
    for distribution in distributions(world_size):
        actual = parity.run(program, make, distribution)
        parity.assert_equal_on_all(distribution, actual, expected)


def state(model):
    """What an optimizer would save."""
    return [ops.convert_to_numpy(v) for v in model.optimizer.variables]


OPTIMIZERS = {
    "sgd": lambda **k: optimizers.SGD(0.1, **k),
    "adam": lambda **k: optimizers.Adam(0.1, epsilon=1e-3, **k),
    # Its update is no elementwise one, and Keras's own code adds up.
    "lamb": lambda **k: optimizers.Lamb(0.1, epsilon=1e-3, **k),
}
OPTIONS = [
    ("sgd", {}),
    ("adam", {}),
    ("lamb", {}),
    ("sgd", {"clipnorm": 0.1}),
    ("adam", {"global_clipnorm": 0.1}),
    ("sgd", {"weight_decay": 0.1, "momentum": 0.9}),
    (
        "adam",
        {"use_ema": True, "ema_momentum": 0.6, "ema_overwrite_frequency": 2},
    ),
]


@pytest.mark.parametrize(
    "name, option",
    OPTIONS,
    ids=["-".join([name, *option][:2]) for name, option in OPTIONS],
)
def test_steps(name, option, world_size):
    """Logs of each step, and what is left: two updates and a step more."""

    def make():
        return make_model(
            OPTIMIZERS[name](gradient_accumulation_steps=STEPS, **option)
        )

    def program(model):
        logs = [
            model.train_on_batch(*batch, return_dict=True)
            for batch in batches()
        ]
        return logs, state(model)

    check(program, make, world_size)


def test_accumulators_read_between_steps(world_size):
    """They are the sums that one device has, for whoever reads them; where
    they are not yet added up, they say so."""

    def program(model):
        states = []
        for batch in batches():
            model.train_on_batch(*batch)
            states.append(state(model))
        return states

    def make():
        return make_model(
            optimizers.SGD(0.1, gradient_accumulation_steps=STEPS)
        )

    check(program, make, world_size)


def test_fit(world_size):
    """Of 23 rows in batches of 5, for two epochs of five steps."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((23, 6)).astype("float32")
    y = rng.standard_normal((23, 3)).astype("float32")

    def program(model):
        history = model.fit(
            x, y, batch_size=5, epochs=2, shuffle=False, verbose=0
        )
        return history.history, state(model)

    def make():
        return make_model(
            optimizers.Adam(
                0.1, epsilon=1e-3, gradient_accumulation_steps=STEPS
            )
        )

    check(program, make, world_size)


@pytest.fixture
def communicated(monkeypatch):
    """Names and sizes of the collectives of floating-point numbers."""
    calls = []

    def log(name, position):
        function = getattr(dist, name)

        def logged(*args, **kwargs):
            x = args[position]
            if x.is_floating_point():
                calls.append((name, x.numel()))
            return function(*args, **kwargs)

        monkeypatch.setattr(dist, name, logged)

    log("all_reduce", 0)
    log("all_gather_single", 1)
    log("reduce_scatter_single", 1)
    return calls


def test_gradients_are_reduced_in_updates_alone(world_size, communicated):
    """Each step has one collective of its logs besides."""

    def program(model):
        steps = []
        for batch in [next(batches())] * 9:
            model.train_on_batch(*batch)
            steps.append(list(communicated))
            communicated.clear()
        return steps

    def run(**kwargs):
        with keras.distribution.DataParallel().scope():
            return program(make_model(optimizers.SGD(0.1, **kwargs)))

    adds_up = run(gradient_accumulation_steps=STEPS)
    weights = sum(
        int(np.prod(w.shape)) for w in make_model("sgd").trainable_variables
    )
    # The first step checks the model besides, the next one where all are, and
    # the first update agrees on what is reached; later ones ask in a number.
    logs, both = adds_up[3], adds_up[5]
    # The flag that the host reads goes by itself where logs lie on a GPU.
    flag = [("all_reduce", 1)] if torch.cuda.is_available() else []
    assert logs[1:] == flag
    assert logs[0][0] == "all_reduce" and logs[0][1] < 13
    assert adds_up[3:] == [logs, logs, both] * 2
    assert sorted(both) == sorted([*logs, ("all_reduce", weights + 1)])
    # As many in an update as in each step of an optimizer that updates.
    assert run()[2:] == [both] * 7


def test_variables_that_the_data_axis_cuts_are_reduced_in_each_step(
    world_size, communicated
):
    layouts = {
        ".*/kernel": ("batch", None),
        ".*/(bias|gamma|beta)": ("batch",),
    }
    with parity.model_parallel((world_size, 1), layouts).scope():
        model = make_model(
            optimizers.SGD(0.1, gradient_accumulation_steps=STEPS)
        )
        counts = []
        for batch in [next(batches())] * 6:
            model.train_on_batch(*batch)
            counts.append(
                # Numbers that are reduced, in however many collectives.
                sum(n for name, n in communicated if "reduce" in name)
            )
            communicated.clear()
        trainable = sum(math.prod(v.shape) for v in model.trainable_variables)
    # With those of the logs; the first two steps have a few more of their own.
    assert counts[2:] == [counts[2]] * 4 and min(counts) == counts[2]
    assert counts[2] >= trainable


def local_gradients(model):
    return {
        v.path: v.value.grad.to_local().clone()
        if isinstance(v.value.grad, DTensor)
        else v.value.grad.clone()
        for v in model.trainable_variables
    }


def test_what_grad_holds():
    """Our share of the gradient, which is that of one device; after an update,
    the sum of its steps."""

    def program(model):
        seen, total = [], None
        distribution = keras.distribution.distribution()
        for i, batch in enumerate(batches()):
            model.train_on_batch(*batch)
            grads = list(local_gradients(model).values())
            is_update = i % STEPS == STEPS - 1
            if distribution is None:
                total = [a + b for a, b in zip(total or [0] * 99, grads)]
                if is_update:
                    grads, total = total, None
            elif not is_update:
                for grad in grads:
                    dist.all_reduce(grad)
            seen.append([ops.convert_to_numpy(grad) for grad in grads])
        return seen

    def make():
        return make_model(
            optimizers.SGD(0.1, gradient_accumulation_steps=STEPS)
        )

    expected = parity.run(program, make)
    actual = parity.run(program, make, keras.distribution.DataParallel())
    parity.assert_equal_on_all("DataParallel", actual, expected)


def shared_path(tmp_path, name):
    return everyone.gather(str(tmp_path / name))[0]


@pytest.mark.parametrize("between", ["one device", "mesh to mesh"])
def test_saved_in_the_middle(between, world_size, tmp_path):
    """Saved after the second of three steps, and gone on with elsewhere."""
    everything = list(batches())
    data, model_axes = distributions(world_size)
    cases = {
        "one device": [(data, None), (None, data), (model_axes, None)],
        "mesh to mesh": [(data, model_axes), (model_axes, data), (data, data)],
    }

    def make():
        return make_model(
            optimizers.Adam(
                0.1, epsilon=1e-3, gradient_accumulation_steps=STEPS
            )
        )

    def whole_way(model):
        for batch in everything:
            model.train_on_batch(*batch)
        return state(model)

    expected = parity.run(whole_way, make)
    for i, (first, second) in enumerate(cases[between]):
        path = shared_path(tmp_path, f"{i}.keras")

        def first_steps(model):
            for batch in everything[:2]:
                model.train_on_batch(*batch)
            before = state(model)
            if first is not None or not dist.get_rank():
                model.save(path)
            # Saving changes nothing.
            parity.assert_same(state(model), before, 0)

        def load():
            return keras.saving.load_model(path)

        def last_steps(model):
            for batch in everything[2:]:
                model.train_on_batch(*batch)
            return state(model)

        parity.run(first_steps, make, first)
        everyone.gather(None)
        actual = parity.run(last_steps, load, second)
        parity.assert_equal_on_all(f"{first}, {second}", actual, expected)


def test_assigned_in_the_middle(world_size):
    """A checkpoint that is put back into the optimizer that made it."""
    everything = list(batches())

    def program(model):
        for batch in everything[:2]:
            model.train_on_batch(*batch)
        kept, weights = state(model), model.get_weights()
        for batch in everything[2:4]:
            model.train_on_batch(*batch)
        model.optimizer.set_weights(kept)
        model.set_weights(weights)
        parity.assert_same(state(model), kept, 1e-6)
        for batch in everything[2:]:
            model.train_on_batch(*batch)
        return state(model)

    def make():
        return make_model(
            optimizers.SGD(0.1, gradient_accumulation_steps=STEPS)
        )

    check(program, make, world_size)


def test_applied_by_hand_in_the_middle(world_size):
    """A hand-written loop that goes on where `train_on_batch` has stopped, and
    the other way round."""
    everything = list(batches())

    def by_hand(model, x, y):
        # Of all rows on every shard: of those the mean is one device's.
        model.zero_grad()
        ops.mean((model(x) - y) ** 2).backward()
        trained = model.trainable_variables
        with torch.no_grad():
            model.optimizer.apply([v.value.grad for v in trained], trained)

    def program(model):
        for i, batch in enumerate(everything):
            if i in (1, 2, 4):
                by_hand(model, *map(ops.convert_to_tensor, batch))
            else:
                model.train_on_batch(*batch)
        return state(model)

    def make():
        return make_model(
            optimizers.SGD(0.1, gradient_accumulation_steps=STEPS)
        )

    check(program, make, world_size)


class OwnStep(keras.Model):
    """Uses gradients of each step for something else, too."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.norms = []

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        logs = super().train_step(data)
        self.norms.append(ops.sum(self.dense.kernel.value.grad**2))
        return logs


class OwnApply(optimizers.SGD):
    """As `OwnStep`, in the optimizer."""

    norms = None

    def apply(self, grads, trainable_variables=None):
        self.norms = (self.norms or []) + [sum(ops.sum(g**2) for g in grads)]
        super().apply(grads, trainable_variables)


@pytest.mark.parametrize("where", ["step", "apply"])
def test_own_code_sees_whole_gradients(where, world_size):
    def make():
        if where == "step":
            model = OwnStep()
            model.build((None, 6))
            optimizer = optimizers.SGD(0.1, gradient_accumulation_steps=STEPS)
            model.compile(optimizer, "mse")
            return model
        return make_model(OwnApply(0.1, gradient_accumulation_steps=STEPS))

    def program(model):
        for batch in batches():
            model.train_on_batch(*batch)
        norms = (model if where == "step" else model.optimizer).norms
        return [ops.convert_to_numpy(norm) for norm in norms]

    expected = parity.run(program, make)
    actual = parity.run(program, make, keras.distribution.DataParallel())
    parity.assert_equal_on_all("DataParallel", actual, expected)


def test_loss_scale_optimizer(world_size):
    """It looks at the gradients of each step: whether they are finite, which
    all must agree on."""

    def make():
        inner = optimizers.SGD(0.1, gradient_accumulation_steps=STEPS)
        return make_model(
            optimizers.LossScaleOptimizer(
                inner, initial_scale=8.0, dynamic_growth_steps=2
            )
        )

    def program(model):
        for i, (x, y) in enumerate(batches()):
            # In the rows of the first shard alone.
            x[0] = np.inf if i == 1 else x[0]
            model.train_on_batch(x, y)
        return state(model)

    check(program, make, world_size)


def test_weights_of_others(world_size):
    """A loss that reaches weights which the optimizer does not know: what is
    left in their `.grad` after an update is all that one device has there."""

    def make():
        model = make_model("sgd")
        other = layers.Dense(3, name="other")
        other.build((None, 3))
        model.others = lambda: other
        model.compile(
            optimizers.SGD(0.1, gradient_accumulation_steps=STEPS),
            lambda y, y_pred: ops.mean((y - other(y_pred)) ** 2, axis=-1),
        )
        return model

    def program(model):
        seen = []
        for i, batch in enumerate(batches()):
            model.train_on_batch(*batch)
            if i % STEPS == STEPS - 1:
                kernel = model.others().kernel.value
                seen.append(ops.convert_to_numpy(kernel.grad))
        return seen

    check(program, make, world_size)
