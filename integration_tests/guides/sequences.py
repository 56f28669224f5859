"""Recurrent networks, and series."""

import numpy as np

import keras
from integration_tests.guides.guide import descend
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from keras import layers
from keras import ops


class CtcEndpoint(layers.Layer):
    """Adds the loss of a transcription, and hands the chances on."""

    def call(self, labels, chances):
        n, time = ops.shape(chances)[0], ops.shape(chances)[1]
        input_length = time * ops.ones((n,), dtype="int32")
        label_length = ops.shape(labels)[1] * ops.ones((n,), dtype="int32")
        loss = ops.ctc_loss(
            labels, ops.log(chances + 1e-7), label_length, input_length
        )
        self.add_loss(ops.mean(loss))
        return chances


@program
def ctc_endpoint():
    """Labels are an input; nothing is compiled but an optimizer."""
    image = keras.Input((8, 5), name="image")
    labels = keras.Input((3,), dtype="int32", name="label")
    x = layers.Conv1D(6, 3, padding="same", activation="relu")(image)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(x)
    chances = layers.Dense(5, "softmax", name="chances")(x)
    outputs = CtcEndpoint(name="ctc")(labels, chances)
    model = keras.Model([image, labels], outputs)
    model.compile(optimizer=sgd(0.02))
    x = {"image": normal(7, 8, 5), "label": integers(5, 7, 3, low=1)}
    history = model.fit(
        x, validation_data=(x,), batch_size=4, epochs=2, verbose=0
    )
    reader = keras.Model(image, chances)
    read = reader.predict(x["image"], batch_size=4, verbose=0)
    return report(history, model, read=read)


@program
def ctc_loss():
    """The same as a function of targets and logits."""

    def loss(y, p):
        n = ops.shape(y)[0]
        input_length = ops.full((n,), ops.shape(p)[1], dtype="int32")
        label_length = ops.sum(ops.cast(y > 0, "int32"), axis=-1)
        return ops.ctc_loss(y, p, label_length, input_length)

    class Accuracy(keras.metrics.Metric):
        """Of sequences as a whole, decoded greedily."""

        def __init__(self):
            super().__init__(name="sequences")
            self.right = self.add_weight(name="right", initializer="zeros")
            self.seen = self.add_weight(name="seen", initializer="zeros")

        def update_state(self, y, p, sample_weight=None):
            length = ops.full((ops.shape(p)[0],), ops.shape(p)[1], "int32")
            decoded, _ = ops.ctc_decode(p, length, strategy="greedy")
            found = decoded[0][:, : y.shape[1]]
            same = ops.all(ops.equal(found, ops.cast(y, found.dtype)), -1)
            self.right.assign_add(ops.sum(ops.cast(same, "float32")))
            self.seen.assign_add(float(y.shape[0]))

        def result(self):
            return self.right / self.seen

    model = keras.Sequential(
        [
            keras.Input((8, 5)),
            layers.GRU(6, return_sequences=True),
            layers.Dense(4),
        ]
    )
    model.compile(sgd(0.02), loss, metrics=[Accuracy()])
    y = integers(4, 11, 2, low=1)
    y[::3, 1] = 0
    history = model.fit(normal(11, 8, 5), y, batch_size=4, epochs=2, verbose=0)
    return report(history, model)


class ResidualCell(layers.Layer):
    """A cell with a state of two parts, of which one fades."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.state_size = [units, units]
        self.output_size = units

    def build(self, shape):
        self.kernel = self.add_weight(
            shape=(shape[-1], self.units), name="kernel"
        )
        self.recurrent_kernel = self.add_weight(
            shape=(self.units, self.units),
            initializer="orthogonal",
            name="recurrent_kernel",
        )

    def call(self, inputs, states):
        hidden, mean = 0.9 * states[0], states[1]
        x = ops.matmul(inputs, self.kernel)
        x = ops.tanh(x + ops.matmul(hidden, self.recurrent_kernel) + mean)
        mean = 0.9 * mean + 0.1 * x
        return x + mean, [x, mean]


@program
def own_cell():
    inputs = keras.Input((5, 3))
    x = layers.RNN(ResidualCell(4), return_sequences=True)(inputs)
    x = layers.RNN([ResidualCell(4), layers.GRUCell(3)])(x)
    model = keras.Model(inputs, layers.Dense(1)(x))
    model.compile(sgd(0.1), "mse")
    x, y = normal(11, 5, 3), normal(11, 1, seed=1)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, predicted=model.predict(x, batch_size=4, verbose=0)
    )


@program
def stateful():
    """A state that goes on from batch to batch, of a fixed number of rows."""
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(5, 3, 2)),
            layers.SimpleRNN(4, stateful=True, return_sequences=True),
            layers.RNN(ResidualCell(3), stateful=True),
            layers.Dense(1),
        ]
    )
    model.compile(sgd(0.1), "mse")
    x, y = normal(10, 3, 2), normal(10, 1, seed=1)
    said = []
    for _ in range(2):
        history = model.fit(x, y, batch_size=5, shuffle=False, verbose=0)
        said.append(history.history["loss"])
        for layer in model.layers[:-1]:
            layer.reset_state()
    said.append(model.predict(x, batch_size=5, verbose=0))
    # Keras's LSTM cannot be trained so on torch: it changes what backward
    # needs.
    reader = keras.Sequential(
        [keras.Input(batch_shape=(5, 3, 2)), layers.LSTM(4, stateful=True)]
    )
    for _ in range(2):
        said.append(reader.predict(x, batch_size=5, verbose=0))
    return report(history, model, reader, said=said)


@program
def bidirectional():
    """Sequences of words with padding, that a mask leaves out."""
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(12, 4, mask_zero=True)(inputs)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.Bidirectional(layers.GRU(3), merge_mode="sum")(x)
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(x))
    model.compile(sgd(0.2), "binary_crossentropy", metrics=["accuracy"])
    x = integers(12, 11, 6, low=1)
    for row, length in enumerate(integers(7, 11, seed=1, low=2)):
        x[row, length:] = 0
    y = integers(2, 11, 1, seed=2)
    history = model.fit(
        x, y, batch_size=4, epochs=2, validation_split=0.3, verbose=0
    )
    return report(history, model)


@program
def teacher_forcing():
    """An encoder's state starts a decoder, which then writes by itself."""
    tokens, units = 6, 4
    encoder_inputs = keras.Input((None, tokens))
    encoder = layers.LSTM(units, return_state=True)
    _, *states = encoder(encoder_inputs)
    decoder_inputs = keras.Input((None, tokens))
    decoder = layers.LSTM(units, return_sequences=True, return_state=True)
    outputs, _, _ = decoder(decoder_inputs, initial_state=states)
    head = layers.Dense(tokens, "softmax")
    model = keras.Model([encoder_inputs, decoder_inputs], head(outputs))
    model.compile(sgd(0.5), "categorical_crossentropy", metrics=["accuracy"])
    eye = np.eye(tokens, dtype="float32")
    source, target = eye[integers(6, 9, 5)], eye[integers(6, 9, 4, seed=1)]
    x = [source, np.roll(target, 1, axis=1)]
    history = model.fit(x, target, batch_size=4, epochs=2, verbose=0)

    encode = keras.Model(encoder_inputs, states)
    held = [keras.Input((units,)), keras.Input((units,))]
    written, *left = decoder(decoder_inputs, initial_state=held)
    decode = keras.Model([decoder_inputs, *held], [head(written), *left])
    states = encode.predict(source[:3], verbose=0)
    token, seen = eye[[0, 0, 0]][:, None], []
    for _ in range(3):
        token, *states = decode.predict([token, *states], verbose=0)
        seen.append(token)
    return report(history, model, seen=seen)


class SeriesNormalizer(layers.Layer):
    """Takes the scale off each series, and puts it back on.

    A scale of the whole batch is followed by a moving average.
    """

    def build(self, shape):
        self.scale = self.add_weight(
            shape=(), initializer="ones", trainable=False, name="scale"
        )
        self.gain = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x, training=False):
        self.mean = ops.mean(x, axis=1, keepdims=True)
        self.deviation = ops.sqrt(ops.var(x, axis=1, keepdims=True) + 1e-2)
        if training:
            seen = ops.std(x)
            self.scale.assign(0.9 * self.scale + 0.1 * seen.detach())
        return (x - self.mean) / self.deviation * self.gain / self.scale

    def undo(self, y):
        return y * self.scale * self.deviation + self.mean


class Forecaster(keras.Model):
    """The next values of series, with the normaliser on both sides."""

    def __init__(self, ahead):
        super().__init__()
        self.normalizer = SeriesNormalizer()
        self.mix = layers.Dense(ahead, name="mix")

    def call(self, x, training=False):
        x = self.normalizer(x, training=training)
        x = self.mix(ops.swapaxes(x, 1, 2))
        return self.normalizer.undo(ops.swapaxes(x, 1, 2))

    def train_step(self, data):
        x, y = data
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        descend(loss, self.trainable_weights, self.optimizer)
        errors = ops.abs(y - y_pred)
        return {
            "loss": loss.detach(),
            "smape": ops.mean(
                errors.detach() / (1 + ops.abs(y) + ops.abs(y_pred.detach()))
            ),
        }


@program
def timeseries():
    """Windows of one series; what comes after each is to be found."""
    series = np.cumsum(normal(30, 2), axis=0) * 0.3
    windows = np.stack([series[i : i + 8] for i in range(11)])
    model = Forecaster(2)
    model.compile(sgd(0.05), "huber")
    history = model.fit(
        windows[:, :6], windows[:, 6:], batch_size=4, epochs=2, verbose=0
    )
    return report(
        history,
        model,
        predicted=model.predict(windows[:, :6], batch_size=4, verbose=0),
    )
