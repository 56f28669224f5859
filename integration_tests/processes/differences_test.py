"""Processes that differ say so, all of them, before two models are trained."""

import os

import numpy as np
import pytest
import torch

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers

pytestmark = [pytest.mark.world(2), pytest.mark.limit(60)]

MESHES = [(2, 1), (1, 2)]


def is_odd():
    """Whether this is the process that differs from the others."""
    return os.environ["RANK"] == "1"


def here(usual, odd):
    return odd if is_odd() else usual


def arrays(seed=0, rows=23):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 5)).astype("float32")
    return x, x[:, :3] * 2


def make_model(activation="tanh", rate=0.1, **dense):
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8, activation, name="first", **dense),
            layers.Dropout(rate, name="drop"),
            layers.Dense(3, name="last"),
        ],
        name="model",
    )
    return model


def compiled(loss="mse", metrics=("mae",), optimizer=None, **how):
    model = make_model(**how)
    optimizer = optimizer or keras.optimizers.SGD(0.1)
    model.compile(optimizer, loss, metrics=list(metrics))
    return model


def fit(model, data=None, **arguments):
    x, y = data or arrays()
    arguments = {"batch_size": 6, "epochs": 2, "verbose": 0, **arguments}
    return model.fit(x, y, **arguments).history


class LearningRate(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch and is_odd():
            self.model.optimizer.learning_rate = 0.02


class Draw(keras.callbacks.Callback):
    """Draws on torch's random state, which shuffles the next epoch."""

    def on_epoch_end(self, epoch, logs=None):
        if is_odd():
            torch.rand(1)


class Batches(keras.utils.PyDataset):
    def __init__(self, seed):
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        x = self.rng.standard_normal((5, 5))
        return x, x[:, :3]


def loader(seed):
    data = torch.utils.data.TensorDataset(*map(torch.as_tensor, arrays()))
    return torch.utils.data.DataLoader(
        data, 6, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )


def scaled(weights, factor):
    return [w * factor for w in weights]


def set_weights_between_fits():
    model = compiled()
    fit(model)
    # All of them, as reading is collective.
    weights = model.get_weights()
    if is_odd():
        model.set_weights(scaled(weights, 2))
    fit(model)


def set_weights_while_training():
    class SetWeights(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            weights = self.model.get_weights()
            if is_odd():
                self.model.set_weights(scaled(weights, 0.5))

    # Weights are looked at now and then.
    fit(compiled(), epochs=110, batch_size=23, callbacks=[SetWeights()])


def train_on_other_batches():
    model = compiled()
    x, y = arrays()
    for step in range(3):
        order = slice(None, None, here(1, -1) if step == 2 else 1)
        model.train_on_batch(x[order], y[order])


def predict_other_rows():
    x, _ = arrays()
    make_model().predict_on_batch(here(x, x + 1))


def permuted(x, y):
    order = np.random.default_rng(4).permutation(len(x))
    return x[order], y[order]


PROGRAMS = {
    "learning rate": (
        lambda: fit(compiled(optimizer=keras.optimizers.SGD(here(0.1, 0.2)))),
        ["compile, optimizer, learning_rate: 0.1", "on process 0; 0.2"],
    ),
    "schedule": (
        lambda: fit(
            compiled(
                optimizer=keras.optimizers.SGD(
                    keras.optimizers.schedules.ExponentialDecay(
                        0.1, here(10, 20), 0.9
                    )
                )
            )
        ),
        ["compile, optimizer, learning_rate", "decay_steps"],
    ),
    "learning rate of a callback": (
        lambda: fit(compiled(), callbacks=[LearningRate()]),
        ["learning rate: 0.1", "0.0199", "Callbacks"],
    ),
    "optimizer": (
        lambda: fit(compiled(optimizer=here("sgd", "lion"))),
        ["compile, optimizer: 'SGD' on process 0; 'Lion' on process 1"],
    ),
    "loss": (
        lambda: fit(compiled(loss=here("mse", "mae"))),
        ["compile, loss: 'mse' on process 0; 'mae' on process 1"],
    ),
    "metric": (
        lambda: fit(compiled(metrics=[here("mae", "mse")])),
        ["compile, metrics: ['mae'] on process 0; ['mse'] on"],
    ),
    "activation": (
        lambda: fit(compiled(activation=here("tanh", "relu"))),
        ["first, activation: 'tanh' on process 0; 'relu' on process 1"],
    ),
    "function": (
        lambda: fit(
            compiled(activation=here(lambda x: x * 2.0, lambda x: x + 2.0))
        ),
        ["first, activation"],
    ),
    "rate": (
        lambda: fit(compiled(rate=here(0.1, 0.2))),
        ["drop, rate: 0.1 on process 0; 0.2 on process 1"],
    ),
    "regularizer": (
        lambda: fit(compiled(kernel_regularizer=here("l1", "l2"))),
        ["first, kernel_regularizer"],
    ),
    "dtype policy": (
        lambda: fit(compiled(dtype=here("float32", "mixed_bfloat16"))),
        ["first, dtype", "mixed_bfloat16"],
    ),
    "trainable": (
        lambda: fit(compiled(trainable=here(True, False))),
        ["first"],
    ),
    "argument shuffle": (
        lambda: fit(compiled(), shuffle=here(True, False)),
        ["argument shuffle of fit: True on process 0; False on process 1"],
    ),
    "argument epochs": (
        lambda: fit(compiled(), epochs=here(1, 2)),
        ["argument epochs of fit: 1 on process 0; 2 on process 1"],
    ),
    "class weights": (
        lambda: compiled(loss="sparse_categorical_crossentropy").fit(
            arrays()[0],
            np.arange(23) % 3,
            class_weight={0: 1.0, 1: here(1.0, 2.0), 2: 1.0},
            verbose=0,
        ),
        ["argument class_weight of fit", "{'0': 1.0, '1': 1.0"],
    ),
    "argument of evaluate": (
        lambda: compiled().evaluate(
            *arrays(), verbose=0, batch_size=here(23, 12)
        ),
        ["argument batch_size of evaluate: 23 on process 0; 12"],
    ),
    "other data": (
        lambda: fit(compiled(), arrays(here(0, 1))),
        ["batch, x: [0.12573", "batch, y", "auto_shard_dataset=False"],
    ),
    "other order": (
        lambda: fit(compiled(), here(arrays(), permuted(*arrays()))),
        ["batch, x: [0.12573", "one seed"],
    ),
    "other validation data": (
        lambda: fit(compiled(), validation_data=arrays(here(0, 1))),
        ["batch, x: [0.12573"],
    ),
    "other labels of a set": (
        lambda: fit(compiled(), (arrays()[0], here(1, -1) * arrays()[1])),
        ["batch, y: ["],
    ),
    "random state of a callback": (
        lambda: fit(compiled(), callbacks=[Draw()]),
        ["batch, order of its rows: (6, "],
    ),
    "a dataset": (
        lambda: compiled().fit(Batches(here(0, 1)), verbose=0),
        ["in a batch", "batch, x: [0.12573"],
    ),
    "a generator": (
        lambda: compiled().fit(iter(Batches(here(0, 1))), verbose=0),
        ["in a batch", "batch, x: [0.12573"],
    ),
    "a loader": (
        lambda: compiled().fit(loader(here(0, 1)), verbose=0),
        ["in a batch", "batch, order of its rows"],
    ),
    "data to predict": (
        lambda: make_model().predict(arrays(here(0, 1))[0], verbose=0),
        ["in the data", "batch, x: [0.12573"],
    ),
    "batch to predict": (predict_other_rows, ["in a prediction", "batch, x"]),
    "batch to train on": (train_on_other_batches, ["in a train step"]),
    "weights between fits": (
        set_weights_between_fits,
        ["weights, model/first/kernel", "must be set on every process"],
    ),
    "weights while training": (
        set_weights_while_training,
        ["weights, model/first/"],
    ),
}


@pytest.fixture(params=MESHES, ids=str)
def distribution(request):
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    layouts = {".*kernel": (None, "model")} if request.param[1] == 2 else {}
    with parity.model_parallel(request.param, layouts).scope():
        yield request.param


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_differs_is_said_by_all(distribution, name):
    program, parts = PROGRAMS[name]
    for outcome in everyone.outcomes(program):
        assert "ValueError: " in outcome
        for part in parts:
            assert part in outcome


def test_what_may_differ(distribution):
    """Callbacks, what is printed, and names that nobody trains by."""

    class Ours(keras.callbacks.Callback):
        pass

    model = compiled()
    callbacks = here([], [Ours()])
    history = fit(model, callbacks=callbacks, verbose=here(2, 0))
    model.predict(arrays()[0], verbose=here(1, 0))
    model.evaluate(*arrays(), verbose=here(0, 1))
    assert all(each == history for each in everyone.gather(history))


def test_what_keras_numbers_may_differ(distribution):
    """One process has made layers before, as for a model of its own."""

    def trained():
        model = keras.Sequential(
            [
                keras.Input((5,)),
                layers.Dense(8, "tanh"),
                layers.Dropout(0.1),
                keras.Sequential([layers.Dense(8), layers.Dense(3)]),
            ]
        )
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
        return fit(model), model.get_weights()

    expected = trained()
    if is_odd():
        keras.Sequential([layers.Dense(8), layers.Dropout(0.5)])
        keras.optimizers.SGD()
        keras.Model(x := keras.Input((5,)), x)
    keras.utils.set_random_seed(1)
    history, weights = trained()
    assert history == expected[0]
    for value, other in zip(weights, expected[1]):
        np.testing.assert_array_equal(value, other)


def test_a_key_that_matches_on_one_process():
    """Since Keras has numbered a layer otherwise there."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)

    def program():
        if is_odd():
            layers.Dense(1)
        with parity.model_parallel(
            (1, 2), {".*dense_1/kernel": (None, "model")}
        ).scope():
            model = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
            model.compile("sgd", "mse")
            model.fit(*arrays(), verbose=0)

    for outcome in everyone.outcomes(program):
        assert "All processes must build the same model" in outcome
        assert "dense/kernel (5, 3) float32 laid out as (" in outcome


def test_layers_that_are_called_in_another_order():
    """Collectives of one shape would pair up, each with the other's numbers."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)

    class Turns(keras.Model):
        def __init__(self):
            super().__init__()
            self.pair = [layers.Dense(5, name=name) for name in "ab"]
            for layer in self.pair:
                layer.build((None, 5))
            self.turns = False

        def call(self, x):
            for layer in self.pair[:: -1 if self.turns else 1]:
                x = layer(x)
            return x

    class Turn(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.turns = is_odd() and batch == 2

    def program():
        cut = parity.model_parallel((1, 2), {".*kernel": (None, "model")})
        with cut.scope():
            model = Turns()
            model.compile("sgd", "mse")
            x, _ = arrays()
            model.fit(x, x, batch_size=4, verbose=0, callbacks=[Turn()])

    for outcome in everyone.outcomes(program):
        assert "what the step has communicated for" in outcome
        assert "'a, as number 1' on process 0" in outcome
        assert "'b, as number 1' on process 1" in outcome
        assert "must be called in one order" in outcome


def test_models_that_are_made_in_another_order():
    """Their gradients would be added up across."""
    keras.utils.clear_session(free_memory=False)

    def program():
        with keras.distribution.DataParallel().scope():
            models = []
            for _ in range(2):
                keras.utils.set_random_seed(1)
                models.append(
                    keras.Sequential([keras.Input((5,)), layers.Dense(3)])
                )
            model = models[here(0, 1)]
            model.compile("sgd", "mse")
            model.fit(*arrays(), verbose=0)

    for outcome in everyone.outcomes(program):
        assert "All processes must build the same model" in outcome
        assert "trainable variable 0 of those ever made against" in outcome
        assert "trainable variable 2 of" in outcome


def test_nan_is_the_same_everywhere(distribution):
    x, y = arrays()
    x[3] = np.nan
    history = fit(compiled(), (x, y))
    assert all(np.isnan(np.array(h["loss"])).all() for h in [history])


def test_goes_on_after_a_difference(distribution):
    """What was raised by all leaves no process waiting for another."""
    model = compiled()
    outcomes = everyone.outcomes(lambda: fit(model, arrays(here(0, 1))))
    assert all("ValueError" in outcome for outcome in outcomes)
    assert len(fit(model)["loss"]) == 2


def test_a_sharded_weight_that_one_process_sets():
    """No entry of it can be compared: each process stores another part."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    with parity.model_parallel(
        (1, 2), {".*only/kernel": (None, "model")}
    ).scope():
        inputs = keras.Input((5,))
        outputs = layers.Dense(4, use_bias=False, name="only")(inputs)
        model = keras.Model(inputs, outputs)
        model.compile("sgd", "mse")
        kernel = model.layers[-1].kernel
        kernel.assign(np.full((5, 4), here(1.0, 2.0), "float32"))
        x, _ = arrays()

        def program():
            model.fit(x, x[:, :4], verbose=0)

        for outcome in everyone.outcomes(program):
            assert "weights, only/kernel: [1, 1, 1, 1, ...]" in outcome


def test_local_rows_may_differ_between_data_shards():
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    data = arrays(here(0, 1))
    both = parity.model_parallel((2, 1), {}, auto_shard_dataset=False)
    with both.scope():
        assert len(fit(compiled(), data)["loss"]) == 2
        compiled().fit(Batches(here(0, 1)), verbose=0)
    one = parity.model_parallel((1, 2), {}, auto_shard_dataset=False)
    with one.scope():
        for outcome in everyone.outcomes(lambda: fit(compiled(), data)):
            assert "in the data" in outcome and "batch, x" in outcome
