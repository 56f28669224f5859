"""In how many collectives of a step processes agree, and on what."""

import threading
import time

import numpy as np
import pytest
import torch

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras.src.backend.torch.distribution.report.collectives import (
    CollectiveCounter,
)

pytestmark = [pytest.mark.world(2), pytest.mark.limit(60)]

BATCH, FEATURES = 4, 8


def data(steps):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((BATCH * steps, FEATURES)).astype("float32")
    return x, x[:, :2].copy()


def batches(steps):
    x, y = data(steps)
    return list(zip(np.split(x, steps), np.split(y, steps)))


class Batches(keras.utils.PyDataset):
    def __init__(self, steps):
        super().__init__()
        self.batches = batches(steps)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def tf_data(steps):
    tensorflow = pytest.importorskip(
        "tensorflow", reason="Datasets of tf.data need TensorFlow."
    )
    dataset = tensorflow.data.Dataset.from_tensor_slices(data(steps))
    return {"x": dataset.batch(BATCH)}


SOURCES = {
    "arrays": lambda steps: {
        **dict(zip("xy", data(steps))),
        "batch_size": BATCH,
    },
    "generator": lambda steps: {
        "x": (batch for batch in batches(steps)),
        "steps_per_epoch": steps,
    },
    "PyDataset": lambda steps: {"x": Batches(steps)},
    "DataLoader": lambda steps: {
        "x": torch.utils.data.DataLoader(
            list(zip(*data(steps))), batch_size=BATCH
        )
    },
    "tf.data": tf_data,
}


class OnBatches(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        pass


class OnEpochs(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        pass


class Own(keras.Model):
    """With a step of its own."""

    def __init__(self):
        super().__init__()
        self.up = layers.Dense(16, "relu", name="up")
        self.down = layers.Dense(2, name="down")

    def call(self, x):
        return self.down(self.up(x))

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        loss = keras.ops.mean((self(x, training=True) - y) ** 2)
        loss.backward()
        self.optimizer.apply(
            [v.value.grad for v in self.trainable_weights],
            self.trainable_weights,
        )
        return {"loss": loss}


def make_model(is_own=False):
    model = Own() if is_own else keras.Sequential()
    if not is_own:
        model.add(keras.Input((FEATURES,)))
        model.add(layers.Dense(16, "relu", name="up"))
        model.add(layers.Dense(2, name="down"))
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model


def distributions():
    data_parallel = keras.distribution.DataParallel()
    tensor = {
        ".*up/kernel": (None, "model"),
        ".*up/bias": ("model",),
        ".*down/kernel": ("model", None),
    }
    fully_sharded = {".*up/kernel": (None, "batch")}
    return {
        "data": data_parallel,
        "tensor": parity.model_parallel((1, 2), tensor),
        "fully sharded": parity.model_parallel((2, 1), fully_sharded),
    }


# What a step takes besides: gradients in one bucket, an activation, or a weight
# that is gathered and whose gradient is scattered, and gradients.
WORK = {"data": 1, "tensor": 1, "fully sharded": 3}


def collectives_of_a_step(model, make_arguments, **kwargs):
    def count(steps):
        with CollectiveCounter() as counter:
            model.fit(**make_arguments(steps), verbose=0, **kwargs)
        return sum(counter.calls.values())

    count(2)  # Builds the model; all agree on what its gradients are.
    few, more = count(2), count(5)
    assert (more - few) % 3 == 0
    return (more - few) // 3


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("is_own", [False, True], ids=["Keras's", "own"])
def test_a_step_agrees_once(source, is_own):
    # With the reduction of logs go stop flags, and digests of what must be
    # the same. Of what is read from anything but arrays, one more tells who
    # has a batch, before it is computed on.
    agreements = 1 + (source != "arrays")
    for name, distribution in distributions().items():
        with distribution.scope():
            found = collectives_of_a_step(make_model(is_own), SOURCES[source])
        assert found == WORK[name] + agreements, name


@pytest.mark.parametrize("callback, more", [(OnEpochs, 0), (OnBatches, 1)])
def test_callbacks_agree_where_they_do_something(callback, more, rank):
    for name, distribution in distributions().items():
        with distribution.scope():
            found = collectives_of_a_step(
                make_model(),
                SOURCES["arrays"],
                # It is enough that one process has it.
                callbacks=[callback()] if rank else None,
            )
        assert found == WORK[name] + 1 + more, name


class StopLater(keras.callbacks.Callback):
    """A thread that stops training, at any moment of a step."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def on_train_begin(self, logs=None):
        threading.Thread(target=self.stop).start()

    def stop(self):
        time.sleep(self.seconds)
        self.model.stop_training = True


def test_a_thread_of_one_process_stops_all(rank):
    for seconds in (0.03, 0.05, 0.07):
        with distributions()["data"].scope():
            model = make_model()
            callbacks = [StopLater(seconds)] if rank else None
            model.fit(
                **SOURCES["arrays"](50),
                epochs=1000,
                verbose=0,
                callbacks=callbacks,
            )
            steps = int(model.optimizer.iterations.value)
            assert model.stop_training
        assert everyone.gather(steps) == [steps] * 2
        assert steps < 50 * 1000
