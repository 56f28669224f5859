"""However a model is put together, changed or kept: as on one device."""

import contextlib
import copy
import pickle

import numpy as np
import pytest
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

import keras
from integration_tests.harness import parity
from keras import layers
from keras import ops
from keras.src.backend.torch.distribution.variables import storage

pytestmark = pytest.mark.world(2)

# Two processes are two model shards, then two data shards.
MESHES = [(1, 2), (2, 1)]
LAYOUTS = {
    ".*up/kernel": ("batch", "model"),
    ".*up/bias": ("model",),
    ".*down/kernel": ("model", "batch"),
    ".*mix/kernel": ("batch", "model", None),
}
VOCABULARY = 9


def rows(*shape):
    return np.random.default_rng(4).normal(size=(7, *shape)).astype("float32")


def tokens():
    return np.random.default_rng(4).integers(0, VOCABULARY, (7, 5))


def distributions(layouts=LAYOUTS):
    for shape in MESHES:
        yield parity.model_parallel(shape, layouts)


def sequential():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh", name="up"),
            layers.Dense(5, name="down"),
        ]
    )


def weights_of(model):
    return [np.asarray(w) for w in model.get_weights()]


def step(model, x, y):
    """A step of SGD, and what is predicted after it."""
    log = model.train_on_batch(x, y)
    return log, model.predict_on_batch(x)


def compiled(model):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def shared():
    up = layers.Dense(6, "tanh", name="up")
    x = inputs = keras.Input((6,))
    for _ in range(3):
        x = up(x)
    return keras.Model(inputs, layers.Dense(5, name="down")(x))


def nested():
    inner = sequential()
    first, second = keras.Input((6,)), keras.Input((6,))
    twice = ops.concatenate([inner(first), inner(second)], -1)
    middle = keras.Model([first, second], layers.Dense(6, name="up")(twice))
    inputs = keras.Input((6,))
    return keras.Model(inputs, inner(middle([inputs, inputs * 2.0])))


def cloned():
    return keras.models.clone_model(nested())


def rebuilt():
    model = shared()
    return type(model).from_config(model.get_config())


class Lazy(keras.Model):
    """Builds its layers at their first call."""

    def __init__(self):
        super().__init__()
        self.up = layers.Dense(8, name="up")
        self.down = layers.Dense(5, name="down")

    def call(self, x):
        # Code of its own, that DTensor has a rule for.
        return self.down(ops.tanh(self.up(x)) * 2.0)


class Reshaping(keras.Model):
    """Has code of its own that DTensor has no rule for, at 3 x 5 columns."""

    def __init__(self):
        super().__init__()
        self.up = layers.Dense(30, name="up")
        self.down = layers.Dense(5, name="down")
        self.drop = layers.Dropout(0.5, seed=3)
        self.norm = layers.BatchNormalization()

    def call(self, x, training=None):
        x = self.norm(self.up(x), training=training)
        if training:
            self.add_loss(ops.mean(ops.square(x)))
        x = ops.reshape(x, (-1, 3, 10))
        return self.down(self.drop(ops.max(x, axis=1), training=training))


def checkpointed():
    with keras.RematScope(mode="full"):
        inputs = keras.Input((6,))
        x = layers.Dense(8, "tanh", name="up")(inputs)
        x = layers.Reshape((2, 4))(x)
        x = layers.EinsumDense("abc,cde->abde", (2, 3, 2), name="mix")(x)
        x = layers.Flatten()(x)
        return keras.Model(inputs, layers.Dense(5, name="down")(x))


@pytest.mark.parametrize(
    "make",
    [shared, nested, cloned, rebuilt, Lazy, checkpointed],
)
def test_structure(make):
    x, y = rows(6), rows(5)
    expected = parity.train(make, x, y)
    for distribution in distributions():
        actual = parity.train(make, x, y, distribution=distribution)
        parity.assert_same(actual, expected)


# Dropout draws other numbers where rows differ: only the model axis.
def test_code_between_layers_that_cannot_run_on_shards():
    distribution = parity.model_parallel((1, 2), LAYOUTS)
    parity.assert_parity(Reshaping, rows(6), rows(5), distribution, 3e-5)


@pytest.mark.parametrize("cut", [("model", "batch"), ("batch", "model")])
def test_tied_embedding(cut):
    def make():
        inputs = keras.Input((5,), dtype="int32")
        table = layers.ReversibleEmbedding(VOCABULARY, 6, name="table")
        x = layers.Dense(6, "tanh", name="up")(table(inputs))
        return keras.Model(inputs, table(x, reverse=True))

    x = tokens()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    expected = parity.train(make, x, x, loss=loss)
    layouts = {**LAYOUTS, ".*table/embeddings": cut}
    for distribution in distributions(layouts):
        actual = parity.train(make, x, x, distribution=distribution, loss=loss)
        parity.assert_same(actual, expected)


def on_each_mesh(program, layouts=LAYOUTS, tolerance=1e-5):
    """A program gives under a distribution what it gives without one.

    Collective: every process calls it.

    Args:
        program: function of a distribution, or None, which it may enter.
    """

    def run(distribution):
        with parity.fresh(distribution, 7):
            return program(distribution)

    expected = parity.on_one_device(lambda: run(None))
    for distribution in distributions(layouts):
        parity.assert_same(run(distribution), expected, tolerance)


def scope_of(distribution):
    return (
        contextlib.nullcontext()
        if distribution is None
        else (distribution.scope())
    )


def test_layers_added_after_the_first_fit():
    def program(distribution):
        model = compiled(sequential())
        results = [step(model, rows(6), rows(5))]
        model.add(layers.Dense(4, name="more_up"))
        compiled(model)
        results.append(step(model, rows(6), rows(4)))
        return results, weights_of(model)

    on_each_mesh(program)


def test_two_models_with_two_distributions():
    others = [
        None,
        parity.model_parallel((2, 1), {".*kernel": ("batch", None)}),
        parity.model_parallel((1, 2), {".*kernel": ("model", None)}),
    ]

    def program(distribution):
        other = None if distribution is None else others.pop()
        models = []
        for each in (distribution, other):
            with scope_of(each):
                models.append(compiled(sequential()))
        results = []
        for _ in range(2):
            for model, each in zip(models, (distribution, other)):
                with scope_of(each):
                    results.append(step(model, rows(6), rows(5)))
        return results

    on_each_mesh(program)


def implicit_replication():
    """Whether a plain tensor may meet a DTensor now."""
    mesh = keras.distribution.DeviceMesh(
        (1, 2), ("batch", "model"), keras.distribution.list_devices()
    )
    placements = (Replicate(), Shard(0))
    sharded = storage.shard(ops.ones(4), mesh.backend_mesh, placements)
    try:
        sharded + ops.ones(4)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("end", ["scope", "set", "clear", "clear_in_scope"])
def test_nothing_of_an_ended_distribution_stays(end):
    distribution = parity.model_parallel((1, 2), LAYOUTS)
    keras.utils.set_random_seed(7)
    expected = step(compiled(sequential()), rows(6), rows(5))
    assert not implicit_replication()
    scope = contextlib.ExitStack()
    if end in ("scope", "clear_in_scope"):
        scope.enter_context(distribution.scope())
    else:
        keras.distribution.set_distribution(distribution)
    step(compiled(sequential()), rows(6), rows(5))
    assert implicit_replication()
    if end == "set":
        keras.distribution.set_distribution(None)
    if end.startswith("clear"):
        keras.utils.clear_session()
    if end == "scope":
        scope.close()
    assert keras.distribution.distribution() is None
    assert not implicit_replication()
    scope.close()
    assert keras.distribution.distribution() is None
    assert not implicit_replication()
    keras.utils.set_random_seed(7)
    model = compiled(sequential())
    parity.assert_same(step(model, rows(6), rows(5)), expected)
    assert not any(isinstance(v.value, DTensor) for v in model.variables)


def mixture():
    """A model with each of the layers that LoRA and int8 know."""
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(VOCABULARY, 6, name="table")(inputs)
    x = layers.EinsumDense("abc,cde->abde", (5, 4, 2), name="mix")(x)
    x = layers.Reshape((5, 8))(x)
    x = layers.Dense(8, "tanh", name="up")(x)
    return keras.Model(inputs, layers.Dense(5, name="down")(x))


MIXTURE = {**LAYOUTS, ".*table/embeddings": ("model", "batch")}
LORA = {
    **MIXTURE,
    ".*up/lora_kernel_a": ("batch", "model"),
    ".*down/lora_kernel_b": ("batch", "model"),
}


@pytest.mark.parametrize("layouts", [MIXTURE, LORA], ids=["whole", "sharded"])
def test_lora(layouts):
    def program(distribution):
        model = compiled(mixture())
        results = [step(model, tokens(), rows(5, 5))]
        for name in ("table", "mix", "up", "down"):
            model.get_layer(name).enable_lora(2)
        compiled(model)
        for _ in range(3):
            results.append(step(model, tokens(), rows(5, 5)))
        return results, weights_of(model)

    on_each_mesh(program, layouts)


def test_int8():
    def program(distribution):
        model = compiled(mixture())
        step(model, tokens(), rows(5, 5))
        model.quantize("int8")
        return model.predict_on_batch(tokens()), weights_of(model)

    on_each_mesh(program, MIXTURE, 1e-4)


def test_weights_in_and_out(tmp_path, rank):
    def program(distribution):
        # Without a distribution each process writes what it is told to.
        own = str(tmp_path / f"own{rank}")
        path = own if distribution is None else str(tmp_path / "model")
        model = compiled(sequential())
        results = [step(model, rows(6), rows(5))]
        saved = weights_of(model)
        model.save(path + ".keras")
        model.save_weights(path + ".weights.h5")
        with scope_of(None) if distribution is None else outside():
            plain = keras.models.load_model(path + ".keras")
            assert not any(isinstance(v.value, DTensor) for v in plain.weights)
            results.append((weights_of(plain), step(plain, rows(6), rows(5))))
            other = compiled(sequential())
            other.set_weights(saved)
            results.append(step(other, rows(6), rows(5)))
            other.save_weights(own + "_plain.weights.h5")
            other.save(own + "_plain.keras")
        model.load_weights(own + "_plain.weights.h5")
        results.append(step(model, rows(6), rows(5)))
        model.load_weights(path + ".weights.h5")
        results.append(step(model, rows(6), rows(5)))
        model.set_weights(saved)
        results.append(step(model, rows(6), rows(5)))
        model = keras.models.load_model(own + "_plain.keras")
        assert distribution is None or any(
            isinstance(v.value, DTensor) for v in model.weights
        )
        results.append(step(model, rows(6), rows(5)))
        return results, weights_of(model)

    on_each_mesh(program)


@contextlib.contextmanager
def outside():
    """Within it there is no distribution."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies(duplicate):
    def program(distribution):
        model = compiled(sequential())
        results = [step(model, rows(6), rows(5))]
        other = duplicate(model)
        assert distribution is None or any(
            isinstance(v.value, DTensor) for v in other.weights
        )
        results.append(step(other, rows(6), rows(5)))
        results.append(weights_of(model))
        results.append(step(model, rows(6), rows(5)))
        return results, weights_of(other)

    on_each_mesh(program)
