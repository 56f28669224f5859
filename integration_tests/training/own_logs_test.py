"""Logs that a train step of one's own returns under a metric's name."""

import numpy as np
import pytest
import torch

import keras
from integration_tests.harness import parity
from keras import layers

pytestmark = pytest.mark.world(2)


class OwnLoss(keras.Model):
    """Logs its loss as `loss`, as the unused tracker of `compile` is named."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        y = keras.ops.convert_to_tensor(y)
        self.zero_grad()
        loss = keras.ops.mean(keras.ops.square(self(x, training=True) - y))
        loss.backward()
        variables = self.trainable_weights
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in variables], variables)
        return {"loss": loss.detach()}


@pytest.mark.parametrize("number_of_rows", [1, 7])
def test_logs_of_a_train_step(number_of_rows):
    def make_model():
        inputs = keras.Input((3,))
        return OwnLoss(inputs, layers.Dense(2, name="out")(inputs))

    rng = np.random.default_rng(0)
    x = rng.standard_normal((number_of_rows, 3)).astype("float32")
    y = rng.standard_normal((number_of_rows, 2)).astype("float32")
    distribution = keras.distribution.DataParallel()
    parity.assert_parity(make_model, x, y, distribution, loss=None)
