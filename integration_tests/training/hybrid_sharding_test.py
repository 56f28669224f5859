"""Batches that several mesh axes split: hybrid sharding (HSDP).

A weight may be cut by some of the axes that split batches, and be whole along
the others. Meshes are of the axes "replicate", "shard" and perhaps "model".
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops
from keras.src.backend.torch import distribution_lib as backend_lib
from keras.src.backend.torch.distribution.report.collectives import (
    CollectiveCounter,
)
from keras.src.backend.torch.distribution.tensors import sharded

pytestmark = pytest.mark.world(2, 4)

BATCH = ("replicate", "shard")
SHAPES = {
    2: [(2, 1), (1, 2), (1, 2, 1)],
    4: [(2, 2), (2, 2, 1), (2, 1, 2)],
}
ROWS, TOKENS, FEATURES = 11, 3, 6


def layouts(shape):
    """By one of the batch axes, by both, by none; and by the model axis."""
    result = {
        ".*embed/embeddings": (None, "shard"),
        ".*up/kernel": ("shard", None),
        ".*middle/kernel": (("replicate", "shard"), None),
        ".*middle/bias": ("replicate",),
        ".*norm/(gamma|moving_mean)": ("shard",),
        ".*out/kernel": ("replicate", "shard"),
    }
    if len(shape) == 3:
        result |= {
            ".*up/kernel": ("shard", "model"),
            ".*up/bias": ("model",),
            ".*middle/kernel": (("replicate", "model", "shard"), None),
            ".*out/kernel": (("model", "shard"), "replicate"),
        }
    return result


def hybrid(shape, of=layouts, **kwargs):
    axes = (*BATCH, "model")[: len(shape)]
    return parity.model_parallel(shape, of(shape), axes, BATCH, **kwargs)


def distributions(world_size, **kwargs):
    for shape in SHAPES[world_size]:
        yield shape, hybrid(shape, **kwargs)


class Doubled(keras.Model):
    """A user's step: it sees the global batch, and takes a gradient's norm."""

    def train_step(self, data):
        x, y = data
        with torch.enable_grad():
            loss = ops.mean(ops.square(y - self(x, training=True)))
            loss = loss + 0.01 * ops.sum(ops.max(self(x), axis=0))
        self.zero_grad()
        loss.backward()
        grads = [v.value.grad for v in self.trainable_weights]
        with torch.no_grad():
            self.optimizer.apply([g * 2 for g in grads], self.trainable_weights)
        norm = sum(ops.sum(ops.square(g)) for g in grads)
        return {"loss": loss, "norm": norm}


def make_model(kind=keras.Model, dropout=0.0):
    inputs = keras.Input((TOKENS,), dtype="int32")
    x = layers.Embedding(9, FEATURES, "glorot_normal", name="embed")(inputs)
    x = layers.Dense(10, "tanh", name="up")(x)
    x = layers.Dense(7, "tanh", name="middle")(x)
    x = layers.BatchNormalization(name="norm")(x)
    if dropout:
        x = layers.Dropout(dropout)(x)
    x = layers.Dense(4, name="whole")(x)
    model = kind(inputs, layers.Dense(5, name="out")(x))
    model.compile(
        keras.optimizers.SGD(0.2, momentum=0.5),
        "mse",
        metrics=["mae", keras.metrics.RootMeanSquaredError()],
        weighted_metrics=["mse"],
    )
    return model


def data(rows=ROWS):
    rng = np.random.default_rng(5)
    x = rng.integers(0, 9, (rows, TOKENS))
    return x, rng.standard_normal((rows, TOKENS, 5)).astype("float32")


def assert_as_alone(
    program, world_size, make=make_model, tolerance=parity.TOLERANCE, **kwargs
):
    expected = parity.run(program, make)
    for shape, distribution in distributions(world_size):
        for name, value in kwargs.items():
            setattr(distribution, name, value)
        actual = parity.run(program, make, distribution)
        parity.assert_equal_on_all(shape, actual, expected, tolerance)


def test_one_step(world_size):
    x, y = data()
    expected = parity.train(make_model, x, y, steps=2)
    for shape, distribution in distributions(world_size):
        actual = parity.train(make_model, x, y, distribution, steps=2)
        parity.assert_equal_on_all(shape, actual, expected)


def test_fit_evaluate_predict(world_size):
    x, y = data()
    weights = np.linspace(0, 2, ROWS * TOKENS).reshape(ROWS, TOKENS)

    def program(model):
        # The last batch has fewer rows than there are data shards.
        arguments = {"batch_size": 5, "verbose": 0}
        return [
            model.fit(
                *(x, y), epochs=2, sample_weight=weights, **arguments
            ).history,
            model.evaluate(x, y, **arguments),
            model.predict(x, **arguments),
            model.predict_on_batch(x[:1]),
        ]

    # Batch statistics of few rows round.
    assert_as_alone(program, world_size, tolerance=3e-5)


def test_dropout(world_size):
    x, y = data()

    def program(model):
        return model.fit(x, y, batch_size=4, verbose=0).history

    def make():
        return make_model(dropout=0.4)

    assert_as_alone(program, world_size, make, draw_global_batch=True)
    # Each data shard draws of its own, its processes the same.
    for shape, distribution in distributions(world_size):
        with parity.fresh(distribution, 3):
            drop = layers.Dropout(0.5)
            drawn = drop(np.ones((8, 16)), training=True).tolist()
        shards = {}
        for shard, mask in everyone.gather((distribution.data_shard_id, drawn)):
            assert shards.setdefault(shard, mask) == mask
        different = {str(mask) for mask in shards.values()}
        assert len(different) == distribution.num_model_replicas, shape


def test_custom_train_step(world_size):
    x, y = data()

    def program(model):
        return model.fit(x, y, batch_size=4, epochs=2, verbose=0).history

    assert_as_alone(program, world_size, lambda: make_model(Doubled))


def test_gradient_accumulation(world_size):
    def make():
        model = make_model()
        model.compile(
            keras.optimizers.SGD(
                0.2, gradient_accumulation_steps=3, global_clipnorm=0.5
            ),
            "mse",
        )
        return model

    def program(model):
        history = model.fit(*data(17), batch_size=4, verbose=0).history
        # In the middle of an accumulation.
        return [
            history,
            [ops.convert_to_numpy(v) for v in model.optimizer.variables],
        ]

    # Gradients are small here, and batch statistics round (in float32, whatever
    # the model's dtype; without them, numbers in float64 agree to 5e-7).
    assert_as_alone(program, world_size, make, tolerance=1e-4)


def test_gradient_of_a_gradient(world_size):
    x, y = data(4)

    def program(model):
        with torch.enable_grad():
            weights = [v.value for v in model.trainable_variables]
            loss = ops.mean(ops.square(ops.convert_to_tensor(y) - model(x)))
            loss = loss + 0.1 * sum(ops.sum(w**2) for w in weights)
            grads = torch.autograd.grad(loss, weights, create_graph=True)
            penalty = sum(ops.sum(ops.square(g)) for g in grads)
            (loss + penalty).backward()
        return [
            [ops.convert_to_numpy(g) for g in grads],
            [ops.convert_to_numpy(w.grad) for w in weights],
        ]

    assert_as_alone(program, world_size)


def test_rows_that_are_local(world_size):
    x, y = data(8 * world_size)

    def rows_of(shard):
        return slice(8 * shard, 8 * shard + 7 + shard % 2)

    for shape, distribution in distributions(
        world_size, auto_shard_dataset=False
    ):
        shards = range(distribution.num_model_replicas)

        def batches():
            for start in (0, 4):
                parts = [
                    (x[rows_of(i)][start:][:4], y[rows_of(i)][start:][:4])
                    for i in shards
                ]
                yield tuple(np.concatenate(part) for part in zip(*parts))

        def apart(model):
            ours = rows_of(distribution.data_shard_id)
            return model.fit(
                *(x[ours], y[ours]), batch_size=4, shuffle=False, verbose=0
            ).history

        expected = parity.run(
            lambda model: model.fit(batches(), verbose=0).history, make_model
        )
        actual = parity.run(apart, make_model, distribution)
        parity.assert_equal_on_all(shape, actual, expected)


def test_distributed_data(world_size):
    """The order of rows is that of data shards: the first axis splits first."""
    rows = np.arange(3.0 * world_size).reshape(world_size, 3)
    x, y = data(world_size)

    def step(model, x, y):
        with torch.enable_grad():
            loss = ops.mean(ops.square(y - model(x)))
            # Looks at the order of rows.
            loss = loss + ops.sum(model(x)[0])
            loss.backward()
        grads = [v.value.grad for v in model.trainable_variables]
        return [loss.detach(), *map(ops.convert_to_numpy, grads)]

    expected = parity.run(
        lambda m: step(m, *map(ops.convert_to_tensor, (x, y))), make_model
    )
    for shape, distribution in distributions(world_size):
        shards = distribution.num_model_replicas
        per_shard = world_size // shards
        shard = distribution.data_shard_id
        ours = slice(shard * per_shard, (shard + 1) * per_shard)
        place = np.unravel_index(dist.get_rank(), shape)
        replicate, own = place[:2]
        assert shard == replicate * shape[1] + own
        layout = distribution.get_data_layout((world_size, 3))
        assert layout.axes == (BATCH, None)

        def program(model):
            batch = [
                backend_lib.distribute_data_input(
                    a[ours], distribution.get_data_layout(a.shape)
                )
                for a in (x, y)
            ]
            assert batch[0].shape == x.shape
            return step(model, *batch)

        actual = parity.run(program, make_model, distribution)
        parity.assert_equal_on_all(shape, actual, expected)
        # Axes in an order of their own, without a distribution.
        order = ("shard", "replicate")
        index = own * shape[0] + replicate
        ours = slice(index * per_shard, (index + 1) * per_shard)
        mesh = distribution.device_mesh
        result = backend_lib.distribute_data_input(
            rows[ours], keras.distribution.TensorLayout((order, None), mesh)
        )
        assert result.shape == rows.shape, shape
        np.testing.assert_array_equal(sharded.whole(result), rows)


def test_saved_and_loaded(world_size, tmp_path):
    x, y = data()
    quiet = {"batch_size": 4, "shuffle": False, "verbose": 0}
    path = everyone.gather(str(tmp_path / "model.keras"))[0]

    def alone(model):
        model.fit(x, y, **quiet)
        return model.fit(x, y, **quiet).history

    expected = parity.run(alone, make_model)

    def first(model):
        model.fit(x, y, **quiet)
        model.save(path)

    def second(_):
        model = keras.saving.load_model(path)
        history = model.fit(x, y, **quiet).history
        return [history, model.get_weights()]

    want = [expected["said"], expected["weights"]]
    shapes = SHAPES[world_size]
    for shape, other in zip(shapes, [*shapes[1:], None]):
        parity.run(first, make_model, hybrid(shape))
        other = other and hybrid(other)
        got = parity.run(second, make_model, other)["said"]
        parity.assert_equal_on_all((shape, other), got, want)


# By one of the batch axes, by one and a model axis, by both, by none.
COUNTED = {
    (2, 2): [("shard", None), ("replicate", None), (BATCH, None), ()],
    (2, 2, 1): [("shard", "model")],
    (2, 1, 2): [("shard", "model"), ("replicate", "model")],
}


@pytest.mark.world(4)
@pytest.mark.parametrize(
    "shape, axes",
    [(shape, axes) for shape, each in COUNTED.items() for axes in each],
)
def test_collectives_and_bytes(shape, axes, world_size):
    """What some batch axes cut is gathered over these, and its gradient
    reduce-scattered over them; over the others goes a shard of it alone."""
    rows, units = 8, 12
    size = 4 * rows * units  # The kernel's, in bytes.
    sizes = dict(zip((*BATCH, "model"), shape))
    names = [n for a in axes for n in ((a,) if isinstance(a, str) else a or ())]
    n = {name: sizes[name] for name in names if sizes[name] > 1}
    others = [name for name in BATCH if name not in n and sizes[name] > 1]
    operand = size // n.pop("model", 1)
    with hybrid(shape, lambda _: {".*kernel": axes} if axes else {}).scope():
        layer = layers.Dense(units, use_bias=False)
        x = ops.ones((3, rows))
        for _ in range(2):  # What happens once is not counted.
            layer.zero_grad()
            with CollectiveCounter() as forward:
                out = layer(x)
            with CollectiveCounter() as backward:
                out.sum().backward()
    expected = {"all_gather": [], "reduce_scatter": [], "all_reduce": []}
    stored = operand
    for name in n:
        expected["reduce_scatter"].append(stored)
        stored //= n[name]
        expected["all_gather"].append(stored)
    if len(n) == 1:
        # gloo reduce-scatters by a sum of all, which is made in place.
        expected["all_reduce"] += expected.pop("reduce_scatter")
        expected["reduce_scatter"] = []
    if n:
        expected["all_reduce"] += [stored for _ in others]
    # The column's input asks for no gradient; its output is gathered.
    forward.bytes["all_gather"] -= (
        4 * 3 * units // 2 if shape[2:] == (2,) else 0
    )
    assert forward.bytes["all_gather"] == sum(expected["all_gather"])
    assert backward.calls["reduce_scatter"] == len(expected["reduce_scatter"])
    assert backward.bytes["reduce_scatter"] == sum(expected["reduce_scatter"])
    if n:
        assert backward.calls["all_reduce"] == len(expected["all_reduce"])
        assert backward.bytes["all_reduce"] == sum(expected["all_reduce"])
        assert set(backward.calls) <= {"reduce_scatter", "all_reduce"}
    else:
        # Whole on all data shards: one bucket, in which a number tells that
        # all have met what was predicted.
        assert backward.calls["all_reduce"] == 1
        assert backward.bytes["all_reduce"] == operand + 4


@pytest.mark.world(4)
def test_differences_are_found(world_size):
    """The processes of a data shard are given the same rows; all, a weight."""
    x, y = data(8)
    for shape in ((2, 2), (2, 1, 2)):
        distribution = hybrid(shape)
        with parity.fresh(distribution, 3):
            model = make_model()
            rank = dist.get_rank()
            found = everyone.outcomes(
                lambda: model.fit(x, y + (rank == 3), batch_size=4, verbose=0)
            )
            assert all("ValueError" in f or "RuntimeError" in f for f in found)
