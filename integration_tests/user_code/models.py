"""Classes of models with methods and calls of one's own; callbacks."""

import os
import tempfile

import numpy as np
import torch

import keras
from integration_tests.user_code.running import CLASSES
from integration_tests.user_code.running import UNITS
from integration_tests.user_code.running import note
from integration_tests.user_code.running import squares
from keras import layers
from keras import ops


class Base(keras.Model):
    """Two layers, called by `call`."""

    def __init__(self):
        super().__init__()
        self.up = layers.Dense(UNITS, "tanh", name="up")
        self.out = layers.Dense(CLASSES, name="out")

    def call(self, x):
        return self.out(self.up(x))


def of_call(function):
    """A class of a function of the model and its input."""
    return type("Model", (Base,), {"call": lambda self, x: function(self, x)})


def counting(model, x):
    model.kept = getattr(model, "kept", 0) + 1
    return model.out(model.up(x)) * model.kept


CALLS = {
    "plain": Base,
    "centred": of_call(lambda m, x: m.out(m.up(x - ops.mean(x, axis=0)))),
    "a half": of_call(
        lambda m, x: torch.cat(
            [
                m.out(m.up(x[: len(x) // 2])),
                m.out(m.up(x[len(x) // 2 :])).flip(0),
            ]
        )
    ),
    "over rows": of_call(
        lambda m, x: m.out(torch.stack([m.up(r[None])[0] for r in x]))
    ),
    "counting": of_call(counting),
    "no rows": of_call(lambda m, x: m.out(m.up(ops.mean(x, 0, True)))),
    "noise": of_call(lambda m, x: m.out(m.up(x + 0.1 * torch.randn(x.shape)))),
    "branch": of_call(
        lambda m, x: m.out(m.up(x if float(x.mean()) > 0.0123 else 2 * x))
    ),
    "weights by hand": of_call(
        lambda m, x: m.out(m.up(x)) + m.up(x) @ ops.abs(m.out.kernel)
    ),
    "sorted": of_call(lambda m, x: m.out(ops.sort(m.up(x), axis=0))),
    "adds a loss": of_call(
        lambda m, x: (m.add_loss(0.1 * ops.std(m.up(x))), m.out(m.up(x)))[1]
    ),
    "two of a size": of_call(
        lambda m, x: m.out(m.up(torch.cat([x, x.flip(0)])))[: len(x)]
    ),
}


class ComputeLoss(keras.Model):
    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        compiled = super().compute_loss(x, y, y_pred, sample_weight, training)
        return compiled + ops.sum(ops.abs(y_pred)) / len(x)


class ComputeLossAlone(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
        centred = y_pred - ops.mean(y_pred, axis=0)
        return ops.mean(squares(y, centred)) + ops.std(y_pred)


class ComputeLossOfPairs(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        note(self.calls)
        far = torch.cdist(x, x + 0.1) - torch.cdist(y_pred, y_pred + 0.1)
        return far.square().mean()


class ComputeMetrics(keras.Model):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        logs["spread"] = ops.std(y_pred)
        logs["rows"] = len(x)
        logs["largest"] = float(ops.max(y_pred))
        return logs


class AroundTrainStep(keras.Model):
    def train_step(self, data):
        x, y = data
        logs = super().train_step((x - ops.mean(x, axis=0), y))
        logs["mean"] = ops.mean(y)
        logs["rows"] = x.shape[0]
        return logs


class Augmented(keras.Model):
    """Twice as many rows for Keras's own step."""

    def train_step(self, data):
        x, y = data
        return super().train_step((torch.cat([x, -x]), torch.cat([y, -y])))


class Halved(keras.Model):
    def train_step(self, data):
        x, y = data
        n = (len(x) + 1) // 2
        return super().train_step((x[:n], y[:n]))


class TestStep(keras.Model):
    def test_step(self, data):
        x, y = data
        p = self(x, training=False)
        loss = ops.sqrt(ops.mean(squares(y, p)))
        return {"loss": loss, "median": float(p.median()), "n": len(x)}


class AroundTestStep(keras.Model):
    def test_step(self, data):
        x, y = data
        logs = super().test_step((x.flip(0), y))
        return {**logs, "first": y[0, 0]}


class PredictStep(keras.Model):
    def predict_step(self, data):
        p = self(data[0] if isinstance(data, tuple) else data, training=False)
        return ops.softmax(p, axis=0)


class PredictNumpy(keras.Model):
    def predict_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return np.sort(ops.convert_to_numpy(self(x)), axis=0)


class PredictMean(keras.Model):
    """One row, whatever the batch."""

    def predict_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return ops.mean(self(x), axis=0, keepdims=True)


class PredictNumber(keras.Model):
    def predict_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return ops.reshape(ops.max(self(x)), (1,))


class PredictParts(keras.Model):
    def predict_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        p = self(x)
        return {"half": p[::2], "gram": p @ p.T @ p, "twice": p.repeat(2, 1)}


class PredictNoise(keras.Model):
    def predict_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self(x + torch.randn(x.shape))


class PredictAround(keras.Model):
    def predict_step(self, data):
        p = super().predict_step(data)
        return p - ops.mean(p, axis=0)


METHODS = {
    cls.__name__: cls
    for cls in (
        ComputeLoss,
        ComputeLossAlone,
        ComputeLossOfPairs,
        ComputeMetrics,
        AroundTrainStep,
        Augmented,
        Halved,
        TestStep,
        AroundTestStep,
        PredictStep,
        PredictNumpy,
        PredictMean,
        PredictNumber,
        PredictParts,
        PredictNoise,
        PredictAround,
    )
}


class Rate(keras.callbacks.Callback):
    """A learning rate by the logs."""

    def on_train_batch_end(self, batch, logs=None):
        note(logs["loss"])
        rate = 0.1 / (1 + logs["loss"])
        self.model.optimizer.learning_rate = rate

    def on_epoch_end(self, epoch, logs=None):
        note(self.model.optimizer.learning_rate)


class Weights(keras.callbacks.Callback):
    """Numbers read from weights."""

    def on_epoch_end(self, epoch, logs=None):
        for v in self.model.trainable_variables:
            note(np.mean(np.asarray(v)))
            note(float(ops.norm(v)))
            note(float(ops.sum(ops.abs(v))))
            note(ops.max(v).item())
            note(v.value.detach().float().mean())
            note(int(ops.count_nonzero(v > 0.01)))


class Parameters(keras.callbacks.Callback):
    """Numbers read from torch's parameters."""

    def on_epoch_end(self, epoch, logs=None):
        note(sum(p.numel() for p in self.model.parameters()))
        note(sum(float(p.square().sum()) for p in self.model.parameters()))
        vector = torch.nn.utils.parameters_to_vector(self.model.parameters())
        note(vector.detach().std())


class Predicting(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.x = np.linspace(-1, 1, 20, dtype="float32").reshape(5, 4)

    def on_epoch_end(self, epoch, logs=None):
        note(self.model.predict(self.x, verbose=0))
        note(ops.mean(self.model(self.x), axis=0))


class Evaluating(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        x = np.linspace(-1, 1, 12, dtype="float32").reshape(3, 4)
        note(self.model.evaluate(x, x[:, :3], verbose=0))


class Changing(keras.callbacks.Callback):
    """Weights assigned between batches."""

    def on_train_batch_end(self, batch, logs=None):
        for v in self.model.trainable_variables:
            v.assign(v / (1 + 0.1 * ops.norm(v)))


class Stopping(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        note(batch)
        self.losses = [*getattr(self, "losses", []), logs["loss"]]
        if len(self.losses) > 2 and self.losses[-1] != self.losses[0]:
            self.model.stop_training = True


class Averaging(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.average = [np.array(w) for w in self.model.get_weights()]

    def on_epoch_end(self, epoch, logs=None):
        pairs = zip(self.average, self.model.get_weights())
        self.average = [0.5 * a + 0.5 * b for a, b in pairs]

    def on_train_end(self, logs=None):
        self.model.set_weights(self.average)


class Best(keras.callbacks.ModelCheckpoint):
    """Keeps the best; what that was is told."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        path = os.path.join(self.folder.name, "best.weights.h5")
        super().__init__(
            path, "mae", save_best_only=True, save_weights_only=True
        )

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        note(self.best)


CALLBACKS = {
    cls.__name__: cls
    for cls in (
        Rate,
        Weights,
        Parameters,
        Predicting,
        Evaluating,
        Changing,
        Stopping,
        Averaging,
        Best,
    )
} | {
    "LambdaCallback": lambda: keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: note(logs["mae"])
    ),
    "LearningRateScheduler": lambda: keras.callbacks.LearningRateScheduler(
        lambda epoch, rate: rate * 0.5
    ),
    "ReduceLROnPlateau": lambda: keras.callbacks.ReduceLROnPlateau(
        monitor="val_loss", factor=0.5, patience=0, min_delta=10.0, cooldown=1
    ),
    "EarlyStopping": lambda: keras.callbacks.EarlyStopping(
        monitor="val_mae", min_delta=10.0, restore_best_weights=True
    ),
    "TerminateOnNaN": keras.callbacks.TerminateOnNaN,
}
