"""Keras's training loops on several processes give one device's numbers."""

import numpy as np
import pytest
import torch

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops

pytestmark = [pytest.mark.world(2, 4), pytest.mark.limit(60)]

ROWS, FEATURES, CLASSES = 23, 6, 3
LAYOUTS = {
    "model/up/kernel": (None, "model"),
    "model/up/bias": ("model",),
    "model/down/kernel": ("model", None),
    "model/out/kernel": ("batch", None),
}


def distributions(world_size, **kwargs):
    """Ways to split rows and weights over the processes, by name."""
    shapes = [(1, 2), (2, 1)] if world_size == 2 else [(2, 2)]
    yield "DataParallel", keras.distribution.DataParallel(**kwargs)
    for shape in shapes:
        yield (
            f"ModelParallel{shape}",
            parity.model_parallel(shape, LAYOUTS, **kwargs),
        )


def make_model(model_class=keras.Model, optimizer=None):
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(8, activation="relu", name="up")(inputs)
    x = layers.Dense(4, activation="tanh", name="down")(x)
    outputs = layers.Dense(CLASSES, name="out")(x)
    model = model_class(inputs, outputs, name="model")
    model.compile(
        optimizer or keras.optimizers.SGD(0.1),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", "mae"],
        weighted_metrics=["accuracy"],
    )
    return model


def data(rows=ROWS):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((rows, FEATURES)).astype("float32")
    y = np.eye(CLASSES, dtype="float32")[rng.integers(0, CLASSES, rows)]
    return x, y


def run(program, distribution=None, make_model=make_model):
    return parity.run(program, make_model, distribution)


def assert_as_alone(program, world_size, make_model=make_model):
    """Asserts that a program gives one device's numbers, on every process."""
    expected = run(program, make_model=make_model)
    for name, distribution in distributions(world_size):
        actual = run(program, distribution, make_model)
        parity.assert_equal_on_all(name, actual, expected)


class Logs(keras.callbacks.Callback):
    """Keeps the logs of each batch and epoch."""

    def __init__(self):
        super().__init__()
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append({k: float(v) for k, v in logs.items()})

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append({k: float(v) for k, v in logs.items()})


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_fit(kind, world_size):
    x, y = data()
    if kind == "torch":
        x, y = torch.from_numpy(x), torch.from_numpy(y)

    def program(model):
        # The last batch has 2 rows.
        history = model.fit(
            x,
            y,
            batch_size=7,
            epochs=2,
            shuffle=True,
            verbose=0,
            validation_data=(x[:9], y[:9]),
            validation_batch_size=4,
        )
        return history.history

    assert_as_alone(program, world_size)


def test_validation_split(world_size):
    x, y = data()

    def program(model):
        history = model.fit(
            x, y, batch_size=5, epochs=2, verbose=0, validation_split=0.3
        )
        assert "val_accuracy" in history.history
        return history.history

    assert_as_alone(program, world_size)


def test_logs_of_each_batch_are_global(world_size):
    x, y = data()

    def program(model):
        callback = Logs()
        model.fit(x, y, batch_size=7, verbose=0, callbacks=[callback])
        assert len(callback.logs) == 5
        return callback.logs

    assert_as_alone(program, world_size)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_evaluate_and_predict(kind, world_size):
    x, y = data()
    if kind == "torch":
        x, y = torch.from_numpy(x), torch.from_numpy(y)

    def program(model):
        predictions = model.predict(x, batch_size=7, verbose=0)
        assert predictions.shape == (ROWS, CLASSES)
        return {
            "predict": predictions,
            "evaluate": model.evaluate(x, y, batch_size=7, verbose=0),
            "logs": model.evaluate(x, y, verbose=0, return_dict=True),
        }

    assert_as_alone(program, world_size)


def test_predictions_of_every_dtype(world_size):
    """Of those that no backend sends, too."""
    dtypes = "bool", "float16", "int8", "int16", "int64", "uint8"
    x, _ = data()

    def make_casting_model():
        inputs = keras.Input((FEATURES,))
        x = layers.Dense(8, name="up")(inputs)
        outputs = [ops.cast(ops.round(9 * ops.abs(x)), d) for d in dtypes]
        return keras.Model(inputs, outputs, name="model")

    def program(model):
        outputs = model.predict(x, batch_size=7, verbose=0)
        assert [str(y.dtype) for y in outputs] == list(dtypes)
        return [y.astype("float32") for y in outputs]

    assert_as_alone(program, world_size, make_casting_model)


def test_single_batches(world_size):
    x, y = data(7)

    def program(model):
        return {
            "predict": model.predict_on_batch(x),
            "train": model.train_on_batch(x, y),
            "again": model.train_on_batch(x, y, return_dict=True),
            "test": model.test_on_batch(x, y, return_dict=True),
            "after": model.predict_on_batch(x),
        }

    assert_as_alone(program, world_size)


def test_fewer_rows_than_data_shards(world_size):
    x, y = data(1)

    def program(model):
        return {
            "batch": model.train_on_batch(x, y, return_dict=True),
            "fit": model.fit(x, y, epochs=2, verbose=0).history,
            "evaluate": model.evaluate(x, y, verbose=0),
            "predict": model.predict(x, verbose=0),
        }

    assert_as_alone(program, world_size)


def test_sample_and_class_weights(world_size):
    x, y = data()
    weights = np.linspace(0.0, 3.0, ROWS, dtype="float32")
    by_class = {0: 0.5, 1: 2.0, 2: 1.0}

    def program(model):
        arguments = {"batch_size": 7, "verbose": 0}
        fit = [
            model.fit(x, y, sample_weight=weights, **arguments),
            model.fit(x, y, class_weight=by_class, **arguments),
        ]
        return {
            "fit": [h.history for h in fit],
            "evaluate": model.evaluate(
                x, y, sample_weight=weights, **arguments
            ),
            "batch": [
                model.train_on_batch(x, y, sample_weight=weights),
                model.train_on_batch(x, y, class_weight=by_class),
                model.test_on_batch(x, y, sample_weight=weights),
            ],
        }

    assert_as_alone(program, world_size)


def test_batches_of_other_sources(world_size):
    x, y = data()
    dataset = torch.utils.data.TensorDataset(
        torch.from_numpy(x), torch.from_numpy(y)
    )

    def generator():
        while True:
            for start in range(0, ROWS, 7):
                yield x[start : start + 7], y[start : start + 7]

    def program(model):
        loader = torch.utils.data.DataLoader(dataset, batch_size=7)
        histories = [
            model.fit(loader, epochs=2, verbose=0),
            model.fit(generator(), steps_per_epoch=3, epochs=2, verbose=0),
            model.fit(
                x, y, batch_size=7, steps_per_epoch=3, epochs=2, verbose=0
            ),
        ]
        return {
            "fit": [h.history for h in histories],
            "evaluate": model.evaluate(generator(), steps=3, verbose=0),
            "predict": model.predict(loader, verbose=0),
        }

    assert_as_alone(program, world_size)


@pytest.mark.parametrize("source", ["arrays", "loader"])
def test_local_rows(source, world_size):
    # Data shard i has 7 + i % 2 rows, in batches of 4: their sizes differ.
    x, y = data(8 * world_size)

    def rows_of(shard):
        return slice(8 * shard, 8 * shard + 7 + shard % 2)

    def local_data(distribution):
        ours = rows_of(distribution.data_shard_id)
        if source == "arrays":
            return {"x": x[ours], "y": y[ours], "batch_size": 4}
        dataset = torch.utils.data.TensorDataset(
            torch.from_numpy(x[ours]), torch.from_numpy(y[ours])
        )
        return {"x": torch.utils.data.DataLoader(dataset, batch_size=4)}

    for name, distribution in distributions(
        world_size, auto_shard_dataset=False
    ):
        shards = distribution.num_model_replicas

        def global_batches():
            for start in (0, 4):
                batches = [
                    (x[rows_of(i)][start:][:4], y[rows_of(i)][start:][:4])
                    for i in range(shards)
                ]
                yield tuple(np.concatenate(part) for part in zip(*batches))

        def together(model):
            said = [model.fit(global_batches(), verbose=0).history]
            said.append(model.evaluate(global_batches(), verbose=0))
            for batch in global_batches():
                said.append(model.train_on_batch(*batch, return_dict=True))
            return said

        def apart(model):
            arguments = local_data(distribution)
            said = [
                model.fit(**arguments, shuffle=False, verbose=0).history,
                model.evaluate(**arguments, verbose=0),
            ]
            ours = rows_of(distribution.data_shard_id)
            for start in (0, 4):
                batch = x[ours][start:][:4], y[ours][start:][:4]
                said.append(model.train_on_batch(*batch, return_dict=True))
            return said

        parity.assert_equal_on_all(
            name, run(apart, distribution), run(together)
        )


def test_predictions_of_local_rows_stay_local(world_size):
    x, _ = data(3 * world_size)
    whole = run(lambda model: model.predict(x, verbose=0))["said"]
    for name, distribution in distributions(
        world_size, auto_shard_dataset=False
    ):
        start = 3 * distribution.data_shard_id
        ours = slice(start, start + 3)

        def program(model):
            return [
                model.predict(x[ours], batch_size=2, verbose=0),
                model.predict_on_batch(x[ours]),
            ]

        said = run(program, distribution)["said"]
        parity.assert_same(said, [whole[ours], whole[ours]])


@pytest.mark.parametrize("source", ["arrays", "generator"])
def test_too_few_local_batches_stop_all(source, rank, world_size):
    x, y = data(8)
    # The last process has one batch of 4, the others have two.
    batches = 1 if rank == world_size - 1 else 2
    if source == "arrays":
        rows = 4 * batches
        arguments = {"x": x[:rows], "y": y[:rows], "batch_size": 4}
        expected = f"batches={[2] * (world_size - 1) + [1]}"
    else:
        arguments = {"x": ((x[:4], y[:4]) for _ in range(batches))}
        expected = f"1 of {world_size} processes ran out of data"
    distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    with distribution.scope():
        model = make_model()
        outcomes = everyone.outcomes(lambda: model.fit(**arguments, verbose=0))
    for outcome in outcomes:
        assert outcome.startswith("ValueError: With `auto_shard_dataset=False`")
        assert expected in outcome


class CustomStep(keras.Model):
    """The custom train step of Keras's guide for torch."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        loss.backward()
        trainable_weights = self.trainable_weights
        gradients = [v.value.grad for v in trainable_weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, trainable_weights)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {m.name: m.result() for m in self.metrics}


class OwnLoss(keras.Model):
    """A train step that knows nothing of Keras's losses and metrics."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        loss = torch.nn.functional.cross_entropy(
            self(x, training=True), ops.convert_to_tensor(y)
        )
        self.zero_grad()
        loss.backward()
        gradients = [v.value.grad for v in self.trainable_weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_weights)
        return {"own_loss": loss}


@pytest.mark.parametrize("model_class", [CustomStep, OwnLoss])
def test_custom_train_step(model_class, world_size):
    x, y = data()

    def program(model):
        logs = [
            model.train_on_batch(x[start : start + 7], y[start : start + 7])
            for start in (0, 7)
        ]
        # Some data shards have no row of the last batch.
        history = model.fit(x, y, batch_size=7, epochs=2, verbose=0)
        return logs, history.history

    assert_as_alone(program, world_size, lambda: make_model(model_class))


def test_hand_written_loop(rank, world_size):
    x, y = data(3 * world_size)

    def gradients(model, x, y):
        steps = []
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                model(ops.convert_to_tensor(x)), ops.convert_to_tensor(y)
            )
            loss.backward()
            steps.append(
                [
                    ops.convert_to_numpy(v.value.grad)
                    for v in model.trainable_variables
                ]
            )
            optimizer.step()
        return steps

    ours = slice(3 * rank, 3 * rank + 3)
    expected = run(lambda model: gradients(model, x, y))
    actual = run(
        lambda model: gradients(model, x[ours], y[ours]),
        keras.distribution.DataParallel(),
    )
    parity.assert_equal_on_all("DataParallel", actual, expected)


def test_gradients_of_two_backward_passes_add_up(rank, world_size):
    x, y = data(4 * world_size)

    def gradients(model, *batches):
        for x, y in batches:
            torch.nn.functional.cross_entropy(
                model(ops.convert_to_tensor(x)), ops.convert_to_tensor(y)
            ).backward()
        return [
            ops.convert_to_numpy(v.value.grad)
            for v in model.trainable_variables
        ]

    half = 2 * world_size
    first, second = slice(0, half), slice(half, None)
    expected = run(
        lambda model: gradients(
            model, (x[first], y[first]), (x[second], y[second])
        )
    )
    mine = slice(2 * rank, 2 * rank + 2)
    actual = run(
        lambda model: gradients(
            model,
            (x[first][mine], y[first][mine]),
            (x[second][mine], y[second][mine]),
        ),
        keras.distribution.DataParallel(),
    )
    parity.assert_equal_on_all("DataParallel", actual, expected)


def test_early_stopping(world_size):
    x, y = data()

    def program(model):
        callback = keras.callbacks.EarlyStopping(
            monitor="val_loss", patience=1, restore_best_weights=True
        )
        history = model.fit(
            x[:14],
            y[:14],
            batch_size=7,
            epochs=9,
            verbose=0,
            validation_data=(x[14:], y[14:]),
            callbacks=[callback],
        )
        assert 1 < len(history.epoch) < 9
        return len(history.epoch), callback.stopped_epoch, history.history

    # Steps that are too long soon make it worse.
    assert_as_alone(
        program,
        world_size,
        lambda: make_model(optimizer=keras.optimizers.SGD(4.0)),
    )


class StopAt(keras.callbacks.Callback):
    """Stops at the end of an epoch, or of its first batch."""

    def __init__(self, epoch, when):
        super().__init__()
        self.stop_epoch = epoch
        self.when = when
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.when == "batch" and self.epoch == self.stop_epoch:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if self.when == "epoch" and epoch == self.stop_epoch:
            self.model.stop_training = True


@pytest.mark.parametrize("when", ["batch", "epoch"])
def test_one_process_stops_all(when, rank, world_size):
    x, y = data()
    for _, distribution in distributions(world_size):
        with distribution.scope():
            model = make_model()
            callbacks = None
            if rank == world_size - 1:
                callbacks = [StopAt(1, when)]
            history = model.fit(
                x, y, batch_size=7, epochs=4, verbose=0, callbacks=callbacks
            )
            assert model.stop_training
            steps = int(model.optimizer.iterations.value)
        assert len(history.epoch) == 2
        # Keras ends an epoch early where a batch asks for it.
        assert everyone.gather(steps) == [steps] * world_size


def test_callbacks_of_rank_0_only(rank, world_size, tmp_path):
    x, y = data()
    for name, distribution in distributions(world_size):
        with distribution.scope():
            model = make_model()
            callbacks = None
            if rank == 0:
                callbacks = [
                    keras.callbacks.CSVLogger(str(tmp_path / f"{name}.csv")),
                    keras.callbacks.LambdaCallback(
                        on_epoch_end=lambda epoch, logs: print(logs)
                    ),
                ]
            model.fit(
                x,
                y,
                batch_size=7,
                epochs=2,
                verbose=0,
                validation_data=(x[:5], y[:5]),
                callbacks=callbacks,
            )
        if rank == 0:
            lines = (tmp_path / f"{name}.csv").read_text().splitlines()
            assert len(lines) == 3


def test_callbacks_list(world_size):
    x, y = data()

    def program(model):
        callbacks = keras.callbacks.CallbackList(
            [StopAt(1, "epoch")],
            add_history=True,
            model=model,
            epochs=4,
            steps=4,
            verbose=0,
        )
        history = model.fit(
            x, y, batch_size=7, epochs=4, verbose=0, callbacks=callbacks
        )
        assert len(history.epoch) == 2
        return history.history

    assert_as_alone(program, world_size)
