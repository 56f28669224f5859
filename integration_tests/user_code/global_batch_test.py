"""What user code in a step sees is the global batch."""

import collections
import logging

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from integration_tests.layers import catalogue
from integration_tests.training.losses_test import CLASSES
from integration_tests.training.losses_test import FEATURES
from integration_tests.training.losses_test import assert_as_alone
from integration_tests.training.losses_test import dense
from integration_tests.training.losses_test import fit
from integration_tests.training.losses_test import normal
from keras import layers
from keras import ops
from keras.src.backend.torch import distribution_lib
from keras.src.backend.torch.distribution.global_rows import known

pytestmark = pytest.mark.world(2)


class Collectives(TorchDispatchMode):
    """Counts collectives, by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.__name__] += 1
        return func(*args, **kwargs or {})


def collectives_of_steps(make_outputs, loss, model=keras.Model, **compiled):
    """How many collectives the fourth step has, after all is known."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    x, y = normal(FEATURES), normal(CLASSES)
    with keras.distribution.DataParallel().scope():
        inputs = keras.Input((FEATURES,))
        model = model(inputs, make_outputs(inputs))
        model.compile(keras.optimizers.SGD(0.1), loss, **compiled)
        for _ in range(3):
            model.train_on_batch(x, y)
        with Collectives() as counted:
            model.train_on_batch(x, y)
    return sum(counted.counts.values())


class Block(layers.Layer):
    """Code of each row by itself, with layers of Keras's in it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up = layers.Dense(6, "tanh")
        self.norm = layers.LayerNormalization()

    def call(self, x):
        y = self.norm(ops.concatenate([x, ops.square(x)], axis=-1))
        y = ops.reshape(self.up(y), (-1, 2, 3)) * 0.5
        return ops.sum(ops.transpose(y, (0, 2, 1)), axis=-1)


class OwnStep(keras.Model):
    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = self(x, training=True)
        loss = self.compute_loss(x, y, y_pred)
        self.zero_grad()
        loss.backward()
        weights = self.trainable_weights
        with torch.no_grad():
            self.optimizer.apply([w.value.grad for w in weights], weights)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {m.name: m.result() for m in self.metrics}


def with_block(x):
    return layers.Dense(CLASSES)(Block()(layers.Dense(4)(x)))


def squares(y, p):
    return ops.mean(ops.square(y - p))


def test_code_of_each_row_communicates_no_more():
    plain = collectives_of_steps(dense(), "mse", metrics=["mae"])
    assert plain
    for program in (
        (with_block, "mse"),
        (dense(), squares),
        (with_block, squares, OwnStep),
    ):
        metrics = [] if OwnStep in program else ["mae"]
        assert collectives_of_steps(*program, metrics=metrics) == plain


class Peeking(OwnStep):
    """Reads a metric in the middle of a step, and keeps what it has read."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        logs = {"before": self.error.result()}
        self.error.update_state(y, self(x))
        logs["between"] = self.error.result()
        logs["twice"] = self.error.result() * 2
        logs |= super().train_step(data)
        logs["after"] = self.error.result()
        self.error.update_state(y, self(x) + 1)
        self.kept += [logs["before"], logs["after"]]
        return logs


def test_results_are_of_the_state_as_it_was():
    def program(distribution=None):
        def make_model():
            inputs = keras.Input((FEATURES,))
            model = Peeking(inputs, with_block(inputs))
            model.error = keras.metrics.MeanAbsoluteError(name="error")
            model.kept = []
            model.compile(keras.optimizers.SGD(0.1), "mse")
            return model

        def train(model):
            x, y = normal(FEATURES)[:7], normal(CLASSES)[:7]
            history = model.fit(x, y, batch_size=3, shuffle=False, verbose=0)
            return history.history, [float(x) for x in model.kept]

        return parity.run(train, make_model, distribution)

    assert_as_alone({"peeking": program})


def test_what_runs_on_all_rows_is_said_once(caplog):
    caplog.set_level(logging.INFO, "keras.distribution")

    def ranks(y, p):
        return ops.mean(ops.sort(p, axis=0) * y)

    fit(dense(), normal(CLASSES), ranks, epochs=3)(
        keras.distribution.DataParallel()
    )
    said = [r.getMessage() for r in caplog.records]
    assert len([m for m in said if m.startswith("'sort'")]) == 1, said


def test_every_known_layer_is_in_the_catalogue():
    """A layer is known if a test has shown it to be right on rows."""
    names = {layer.__name__ for layer in known.lists().layers}
    assert names - {"InputLayer"} <= set(catalogue.CASES)


RANDOM = {
    name: case
    for name, case in catalogue.cases().items()
    if case.random
    and {type(case.make())} & known.lists().layers
    and case.function is None
}


@pytest.mark.parametrize("name", RANDOM)
def test_known_layers_that_draw(name):
    """They draw for rows: with `draw_global_batch`, one device's numbers."""
    case = RANDOM[name]

    def program(distribution=None):
        def make_model():
            inputs = [keras.Input(x.shape[1:]) for x in case.inputs()]
            layer = case.make()
            outputs = layer(*inputs, **case.kwargs)
            return keras.Model(inputs, layers.Identity()(outputs))

        def predict(model):
            model.compile(keras.optimizers.SGD(0.1), "mse")
            x = case.inputs()
            said = []
            for _ in range(2):
                said.append(model.test_on_batch(x, model.predict_on_batch(x)))
            return said

        return parity.run(predict, make_model, distribution)

    distribution = keras.distribution.DataParallel()
    distribution.draw_global_batch = True
    assert_as_alone({name: program}, distribution)


def hand_written(steps, auto=None):
    """A loop of the user's, over the global batch."""

    def program(distribution=None):
        x, y = normal(FEATURES)[:7], normal(CLASSES)[:7]

        def enter(a):
            if distribution is None:
                return torch.as_tensor(a)
            shard, shards = distribution.data_shard_id, 2
            ours = np.array_split(a, shards)[shard]
            layout = distribution.get_data_layout(a.shape)
            return distribution_lib.distribute_data_input(ours, layout, "batch")

        def make_model():
            inputs = keras.Input((FEATURES,))
            outputs = layers.BatchNormalization()(with_block(inputs))
            model = keras.Model(inputs, outputs)
            model.compile(keras.optimizers.SGD(0.1))
            return model

        def train(model):
            said = []
            for _ in range(steps):
                y_pred = model(enter(x), training=True)
                loss = ops.mean(ops.square(y_pred - enter(y)))
                loss = loss / (0.1 + ops.var(y_pred)) + ops.max(y_pred)
                model.zero_grad()
                loss.backward()
                weights = model.trainable_weights
                model.optimizer.apply([w.value.grad for w in weights], weights)
                said.append(float(loss.detach()))
            return said

        return parity.run(train, make_model, distribution)

    return program


def test_a_hand_written_loop_over_the_global_batch():
    assert_as_alone({"loop": hand_written(3)})
    layouts = {".*/kernel": ("batch", None)}
    assert_as_alone(
        {"FSDP": hand_written(2)}, parity.model_parallel((2, 1), layouts)
    )


class Clipped(torch.autograd.Function):
    """A gradient that is not linear in what arrives."""

    @staticmethod
    def forward(ctx, x):
        return x.sort(0)[0]

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-0.01, 0.02)


def test_custom_gradients_outside_of_steps():
    def program(distribution=None):
        def make_model():
            return keras.Sequential([keras.Input((FEATURES,)), layers.Dense(2)])

        def train(model):
            x = torch.as_tensor(normal(FEATURES)[:7])
            if distribution is not None:
                shard = distribution.data_shard_id
                x = distribution_lib.distribute_data_input(
                    np.array_split(x, 2)[shard],
                    distribution.get_data_layout(x.shape),
                    "batch",
                )
            (Clipped.apply(model(x)) ** 2).sum().backward()
            return [
                ops.convert_to_numpy(v.value.grad)
                for v in model.trainable_variables
            ]

        return parity.run(train, make_model, distribution)

    released = torch.autograd.Function.apply
    assert_as_alone({"clipped": program})
    keras.distribution.set_distribution(None)
    assert torch.autograd.Function.apply == released


def test_input_that_is_global_stays_what_it_is():
    distribution = keras.distribution.DataParallel()
    with distribution.scope():
        layout = distribution.get_data_layout((4, 2))
        x = distribution_lib.distribute_data_input(
            np.ones((2, 2)), layout, "batch"
        )
        assert tuple(x.shape) == (4, 2) and float(x.sum()) == 8
        again = distribution_lib.distribute_data_input(x, layout, "batch")
    assert again is x


def test_a_fixed_number_of_rows():
    """Recurrent state and shapes that a layer takes when it is built."""

    class Shaped(layers.Layer):
        def build(self, shape):
            self.rows = shape[0]

        def call(self, x):
            return x * self.rows + x.shape[0]

    def program(distribution=None):
        def make_model():
            inputs = keras.Input(batch_shape=(4, 3, FEATURES))
            x = layers.SimpleRNN(5, stateful=True)(inputs)
            model = keras.Model(inputs, layers.Dense(2)(Shaped()(x)))
            model.compile(keras.optimizers.SGD(0.01), "mse")
            return model

        def train(model):
            x, y = normal(3, FEATURES), normal(2)
            arguments = {"batch_size": 4, "shuffle": False, "verbose": 0}
            history = model.fit(x, y, **arguments).history
            return history, model.predict(x, batch_size=4, verbose=0)

        return parity.run(train, make_model, distribution)

    assert_as_alone({"fixed": program})


def test_outputs_without_rows():
    def outputs(x):
        x = layers.Dense(CLASSES)(x)
        return ops.sum(x, axis=0, keepdims=True), ops.mean(x)

    def program(distribution=None):
        def make_model():
            inputs = keras.Input((FEATURES,))
            return keras.Model(inputs, outputs(inputs))

        def predict(model):
            return model.predict_on_batch(normal(FEATURES)[:7])

        return parity.run(predict, make_model, distribution)

    assert_as_alone({"predict": program})


def test_a_step_within_a_step():
    class Outer(keras.Model):
        def train_step(self, data):
            x, y = data
            inner = self.inner.train_on_batch(x, y, return_dict=True)
            noise = keras.random.normal(ops.shape(y), seed=4)
            more = self.inner.train_on_batch(noise[:, :1] + x, y)
            return {**inner, "more": more}

    def program(distribution=None):
        def make_model():
            inputs = keras.Input((FEATURES,))
            model = Outer(inputs, layers.Dense(CLASSES)(inputs))
            model.inner = keras.Sequential(
                [keras.Input((FEATURES,)), layers.Dense(CLASSES)]
            )
            model.inner.compile(keras.optimizers.SGD(0.1), "mse")
            model.compile("sgd", "mse")
            return model

        def train(model):
            x, y = normal(FEATURES)[:7], normal(CLASSES)[:7]
            history = model.fit(x, y, batch_size=5, shuffle=False, verbose=0)
            return history.history, model.inner.get_weights()

        return parity.run(train, make_model, distribution)

    assert_as_alone({"inner": program})


def test_rows_that_were_local_from_the_start():
    """With `auto_shard_dataset=False`, of unlike numbers."""
    x, y = normal(FEATURES), normal(CLASSES)

    def program(distribution=None):
        def make_model():
            inputs = keras.Input((FEATURES,))
            model = keras.Model(inputs, with_block(inputs))
            model.compile(keras.optimizers.SGD(0.1), centred)
            return model

        def train(model):
            ours = slice(None)
            if distribution is not None:
                ours = (slice(0, 5), slice(5, None))[distribution.data_shard_id]
            return [model.train_on_batch(x[ours], y[ours]) for _ in range(2)]

        return parity.run(train, make_model, distribution)

    def centred(y, p):
        return ops.mean(ops.square(y - p + ops.mean(p, axis=0)))

    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    assert_as_alone({"local": program}, distribution)


def test_compiled_with_code_of_ones_own():
    program = fit(
        with_block, normal(CLASSES), squares, compiled={"jit_compile": True}
    )
    assert_as_alone(
        {"jit": fit(with_block, normal(CLASSES), squares)},
    )
    expected = fit(with_block, normal(CLASSES), squares)()
    actual = program(keras.distribution.DataParallel())
    parity.assert_equal_on_all("jit_compile", actual, expected)


def test_an_error_of_the_code_is_raised_by_all():
    def fails(y, p):
        return ops.mean(y[:, :2] - p)

    outcomes = everyone.outcomes(
        lambda: fit(dense(), normal(CLASSES), fails)(
            keras.distribution.DataParallel()
        )
    )
    assert len(set(outcomes)) == 1 and "RuntimeError" in outcomes[0]


class Masked(layers.Layer):
    """Attention with a mask of steps, as many as there are rows, or half."""

    def __init__(self, steps, **kwargs):
        super().__init__(**kwargs)
        self.mask = np.tri(steps, dtype="bool")
        self.attention = layers.MultiHeadAttention(1, 3)

    def call(self, x):
        return self.attention(x, x, attention_mask=ops.array(self.mask))


MIXING = {
    "softmax": lambda x: layers.Softmax(axis=0)(x),
    "unit norm": lambda x: layers.UnitNormalization(axis=0)(x),
    "concatenate": lambda x: layers.Concatenate(axis=0)([x, 2 * x]),
    "regularized": lambda x: layers.Dense(3, activity_regularizer="l2")(x),
    "in a model": lambda x: keras.Sequential([layers.Softmax(axis=0)])(x),
    "wrapped": lambda x: layers.SpectralNormalization(
        layers.Dense(3, activity_regularizer="l1")
    )(x, training=True),
}


def test_layers_of_keras_that_mix_rows():
    def around(mix):
        def outputs(x):
            x = mix(layers.Dense(5, "tanh")(x))
            return layers.Dense(CLASSES, name="out")(x)

        return outputs

    programs = {}
    for name, mix in MIXING.items():
        y = normal(CLASSES)
        if name == "concatenate":
            # Twice the rows: a loss of all of them.
            loss = lambda y, p: ops.mean(p) ** 2 + ops.mean(ops.abs(p - 1))
            programs[name] = fit(around(mix), y, loss)
        else:
            programs[name] = fit(around(mix), y)
    # Before a norm, a bias has a gradient that all but cancels out, and is
    # small beside what its rounding comes from.
    assert_as_alone(programs, tolerance=1e-4)


@pytest.mark.parametrize("steps", [4, 8])
def test_masks_without_rows(steps):
    x = normal(steps, FEATURES)
    program = fit(
        lambda x: Masked(steps)(x), x, x=x, batch_size=8, model=keras.Model
    )
    assert_as_alone({"mask": program})
