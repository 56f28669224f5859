"""Models of a fixed batch shape, that see the whole batch."""

import torch

import keras
from integration_tests.user_code import running
from integration_tests.user_code.running import CLASSES
from integration_tests.user_code.running import FEATURES
from integration_tests.user_code.running import UNITS
from integration_tests.user_code.running import Own
from keras import layers
from keras import ops

ROWS, BATCH = 8, 4


def own(function):
    return lambda x: Own(function, name="own")(x)


class OfShape(layers.Layer):
    """A weight for each row of the batch."""

    def build(self, input_shape):
        self.rows = self.add_weight((input_shape[0], 1), "ones", name="rows")
        self.state = self.add_weight(
            input_shape, "zeros", trainable=False, name="kept"
        )

    def call(self, x):
        self.state.assign(0.5 * self.state + x)
        return x * self.rows + 0.1 * self.state

    def compute_output_shape(self, input_shape):
        return input_shape


class Accumulating(layers.Layer):
    """Rows that go on in the next batch."""

    def build(self, input_shape):
        self.last = self.add_weight(
            input_shape, "zeros", trainable=False, name="last"
        )

    def call(self, x):
        x = ops.tanh(x + self.last)
        self.last.assign(x)
        return x


def stateful(cell):
    return lambda x: cell(UNITS, stateful=True)(
        layers.Reshape((2, UNITS // 2))(x)
    )


MIDDLES = {
    "a weight a row": lambda x: OfShape(name="own")(x),
    "rows that go on": lambda x: Accumulating(name="own")(x),
    "the static shape": lambda x: x / x.shape[0],
    "reshaped to fixed": lambda x: (
        ops.reshape(ops.reshape(x, (BATCH * UNITS,)), (BATCH, UNITS))
        - ops.mean(x, axis=0)
    ),
    "a plain (B, B)": own(lambda layer, x: torch.ones(BATCH, BATCH).tril() @ x),
    "a plain (B, 1)": own(
        lambda layer, x: x + torch.arange(BATCH)[:, None] / 9
    ),
    "asserts": own(
        lambda layer, x: x if x.shape[0] == BATCH else x[:, :, None, None]
    ),
    "stateful RNN of one's own": lambda x: layers.RNN(
        layers.SimpleRNNCell(UNITS), stateful=True
    )(ops.expand_dims(x - ops.mean(x), 1)),
}


# Keras's on torch are not trained: backward finds a state that has changed.
PREDICTED = {
    cell.__name__: stateful(cell) for cell in (layers.LSTM, layers.GRU)
}
PREDICTED["of one's own"] = MIDDLES["rows that go on"]


def predict(model, x, y, batch_size):
    return [model.predict(x, batch_size, verbose=0) for _ in range(2)]


def of_predicted(middle, rows):
    return of_fixed(middle, rows, said=predict)


def of_fixed(middle, rows=ROWS, **kwargs):
    """Of a function of a symbolic `(BATCH, UNITS)`."""

    def make_model():
        inputs = keras.Input(batch_shape=(BATCH, FEATURES))
        x = layers.Dense(UNITS, "tanh", name="up")(inputs)
        x = layers.Dense(CLASSES, name="out")(middle(x))
        return running.compiled(keras.Model(inputs, x))

    x = running.normal(ROWS, FEATURES)
    y = running.normal(ROWS, CLASSES, seed=4)
    if not kwargs:
        kwargs = {"epochs": 2}
    return running.program(make_model, x, y, **kwargs)
