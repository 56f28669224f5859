"""Training in Keras: through `fit`, and in a bare loop as torch's users write.

Each function makes one `Variant`. All start from the torch peers' weights and
train on the same global batch.
"""

import contextlib
import time

import keras_models
import numpy as np
import torch
import torch_models
import torch_peers
import workloads
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from variant import LocalAdam
from variant import TorchStep
from variant import Variant

import keras


class Fit(Variant):
    """`model.fit` with Keras's own loss and Adam.

    Args:
        sizes: of `workloads`.
        distribution: of `keras.distribution`, or None for none.
        attention: of `keras_models.make_model`.
        copy_weights: whether to start from the torch peers' weights.
    """

    def __init__(
        self, sizes, distribution=None, attention="dense", copy_weights=True
    ):
        super().__init__()
        self.sizes = sizes
        self.distribution = distribution
        self.timer = EpochTimer()
        if isinstance(sizes, workloads.MLP):
            loss = "mse"
        else:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        with scope(distribution):
            self.model = keras_models.make_model(sizes, attention)
            if copy_weights:
                keras_models.copy_torch_weights(self.model, sizes)
            optimizer = keras.optimizers.Adam(
                sizes.learning_rate, epsilon=workloads.ADAM_EPSILON
            )
            self.model.compile(optimizer=optimizer, loss=loss)
        self.batch = [t.numpy() for t in keras_batch(sizes)]

    def scope(self):
        return scope(self.distribution)

    def fit(self, steps):
        x, y = (np.concatenate([array] * steps) for array in self.batch)
        return self.model.fit(
            x,
            y,
            batch_size=self.sizes.batch,
            shuffle=False,
            verbose=0,
            callbacks=[self.timer],
        )

    def run(self, steps):
        with self.scope():
            self.fit(steps)
        return self.timer.seconds

    def step(self):
        return torch.tensor(self.fit(1).history["loss"][0])

    def parameters(self):
        return [v.value for v in self.model.trainable_variables]

    def optimizer_tensors(self):
        return [v.value for v in self.model.optimizer.variables]


class EpochTimer(keras.callbacks.Callback):
    """Times an epoch by itself: what `fit` does once is not its steps."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.start


class BareStep(TorchStep):
    """Keras's layers in a loop with the torch peers' loss and Adam.

    Args:
        sizes: of `workloads`.
        distribution: of `keras.distribution`, or None for none.
        attention: of `keras_models.make_model`.
        copy_weights: whether to start from the torch peers' weights.
        **kwargs: of `TorchStep`.
    """

    def __init__(
        self,
        sizes,
        distribution=None,
        attention="dense",
        copy_weights=True,
        **kwargs,
    ):
        self.distribution = distribution
        with scope(distribution):
            model = keras_models.make_model(sizes, attention)
            if copy_weights:
                keras_models.copy_torch_weights(model, sizes)
        parameters = [v.value for v in model.trainable_variables]
        kwargs.setdefault("batch", keras_batch(sizes, targets="int64"))
        super().__init__(
            sizes,
            lambda x: model(x, training=True),
            LocalAdam(sizes, parameters),
            parameters=parameters,
            **kwargs,
        )

    def scope(self):
        return scope(self.distribution)


class ShardedOutputStep(BareStep):
    """A bare step whose model returns logits sharded on the vocabulary."""

    def forward_backward(self):
        logits = self.model(self.x)
        if not isinstance(logits, DTensor):
            raise TypeError(
                'The layout of "head/output" should make the model return a '
                f"DTensor. Received: a tensor of type {type(logits)}"
            )
        loss = self.loss_function(logits, self.y)
        loss.backward()
        return loss


def scope(distribution):
    return distribution.scope() if distribution else contextlib.nullcontext()


def keras_batch(sizes, targets="int32"):
    """The global batch; tokens as Keras's `Input` wants them."""
    x, y = torch_models.make_batch(sizes)
    if isinstance(sizes, workloads.GPT):
        x, y = x.to(torch.int32), y.to(getattr(torch, targets))
    return x, y


def fit_single(sizes, mesh=None, **kwargs):
    return Fit(sizes, **kwargs)


def fit_model_parallel(sizes, mesh=None, attention="dense", **kwargs):
    distribution = keras_models.model_parallel(sizes, attention=attention)
    return Fit(sizes, distribution, attention, **kwargs)


def fit_data_parallel(sizes, mesh=None, **kwargs):
    return Fit(sizes, keras_models.data_parallel(), **kwargs)


def fit_fully_sharded(sizes, mesh=None, **kwargs):
    return Fit(sizes, keras_models.fully_sharded(), **kwargs)


def bare_single(sizes, mesh=None, **kwargs):
    return BareStep(sizes, **kwargs)


def bare_model_parallel(sizes, mesh=None, attention="dense", **kwargs):
    distribution = keras_models.model_parallel(sizes, attention=attention)
    return BareStep(sizes, distribution, attention, **kwargs)


def bare_sharded_output(sizes, mesh=None, attention="dense", **kwargs):
    distribution = keras_models.model_parallel(
        sizes, attention=attention, sharded_output=True
    )
    return ShardedOutputStep(
        sizes, distribution, attention, context=loss_parallel, **kwargs
    )


def bare_data_parallel(sizes, mesh=None, **kwargs):
    return _bare_on_rows(sizes, keras_models.data_parallel(), **kwargs)


def bare_fully_sharded(sizes, mesh=None, **kwargs):
    return _bare_on_rows(sizes, keras_models.fully_sharded(), **kwargs)


def bare_two_axes(sizes, mesh=None, **kwargs):
    """FSDP on one axis of the mesh, tensor parallelism on the other."""
    shape = torch_peers.two_axes()
    distribution = keras_models.fully_sharded(sizes, shape)
    return _bare_on_rows(sizes, distribution, shape[0], **kwargs)


def _bare_on_rows(sizes, distribution, data_shards=None, **kwargs):
    x, y = torch_peers.local_batch(sizes, data_shards)
    if isinstance(sizes, workloads.GPT):
        x = x.to(torch.int32)
    return BareStep(
        sizes, distribution, batch=(x, y), splits_rows=True, **kwargs
    )
