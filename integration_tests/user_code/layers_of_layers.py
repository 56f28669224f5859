"""Layers of one's own that call others, and layers that call one's own."""

import torch

import keras
from integration_tests.user_code.running import CLASSES
from integration_tests.user_code.running import UNITS
from integration_tests.user_code.running import Own
from integration_tests.user_code.running import note
from keras import layers
from keras import ops


class Calling(layers.Layer):
    """A function of this layer and its input, that calls known layers."""

    def __init__(self, function, **sublayers):
        super().__init__(name="own")
        self.function = function
        self.dense = layers.Dense(UNITS, "tanh", name="inner")
        for name, layer in sublayers.items():
            setattr(self, name, layer)

    def call(self, x):
        return self.function(self, x)

    def compute_output_shape(self, input_shape):
        return input_shape


def calling(function, **make):
    return lambda: Calling(function, **{k: f() for k, f in make.items()})


CALLING = {
    "on all": calling(lambda layer, x: layer.dense(x)),
    "and centred": calling(
        lambda layer, x: layer.dense(x - ops.mean(layer.dense(x), axis=0))
    ),
    "on a half": calling(
        lambda layer, x: torch.cat(
            [layer.dense(x[: len(x) // 2]), x[len(x) // 2 :]]
        )
    ),
    "on every other": calling(
        lambda layer, x: x.index_add(
            0, torch.arange(0, len(x), 2), layer.dense(x[::2])
        )
    ),
    "on one row": calling(lambda layer, x: x + layer.dense(x[:1])),
    "on the last row": calling(lambda layer, x: x + layer.dense(x[-1:])),
    "row by row": calling(
        lambda layer, x: torch.cat(
            [layer.dense(x[i : i + 1]) for i in range(len(x))]
        )
    ),
    "on twice as many": calling(
        lambda layer, x: layer.dense(torch.cat([x, -x]))[len(x) :]
    ),
    "on twice as many, mixed": calling(
        lambda layer, x: layer.dense(torch.stack([x, -x], 1).view(-1, UNITS))[
            ::2
        ]
    ),
    "on a constant": calling(
        lambda layer, x: x + layer.dense(torch.ones(2, UNITS)).mean(0)
    ),
    "on a constant of the batch's size": calling(
        lambda layer, x: (
            x + layer.dense(torch.linspace(0, 1, len(x))[:, None].repeat(1, 6))
        )
    ),
    "on an identity": calling(lambda layer, x: x @ layer.dense(torch.eye(6))),
    "on noise": calling(lambda layer, x: x + layer.dense(torch.randn(x.shape))),
    "on the mean": calling(
        lambda layer, x: x + layer.dense(x.mean(0, keepdim=True))
    ),
    "on pairs": calling(
        lambda layer, x: layer.dense(x[:, None] - x[None]).mean(1)
    ),
    "on pairs, the other way": calling(
        lambda layer, x: layer.dense(x[:, None] + x[None]).mean(0)
    ),
    "on the transposed": calling(
        lambda layer, x: layer.dense(x.T @ x / len(x)).sum(0) + x
    ),
    "on sorted rows": calling(
        lambda layer, x: layer.dense(torch.sort(x, 0)[0])
    ),
    "on permuted rows": calling(
        lambda layer, x: layer.dense(x[torch.randperm(len(x))])
    ),
    "on a step of each": calling(
        lambda layer, x: layer.dense(x[:, None].repeat(1, 4, 1))[:, -1]
    ),
    "twice": calling(lambda layer, x: layer.dense(layer.dense(x).flip(0))),
    "its weights by hand": calling(
        lambda layer, x: (
            x @ layer.dense.kernel + ops.mean(layer.dense.bias)
            if layer.dense.built
            else layer.dense(x)
        )
    ),
    "by its kernel's norm": calling(
        lambda layer, x: layer.dense(x) / (0.5 + ops.norm(layer.dense.kernel))
    ),
    "batch norm of a half": calling(
        lambda layer, x: (
            x + ops.mean(layer.norm(x[: (len(x) + 1) // 2], training=True))
        ),
        norm=layers.BatchNormalization,
    ),
    "batch norm of twice as many": calling(
        lambda layer, x: layer.norm(torch.cat([x, x * x]), training=True)[
            : len(x)
        ],
        norm=layers.BatchNormalization,
    ),
    "layer norm of the transposed": calling(
        lambda layer, x: layer.norm((x.T @ x)).mean(0) + x,
        norm=layers.LayerNormalization,
    ),
    "attention over rows": calling(
        lambda layer, x: x + layer.heads(x[None], x[None])[0],
        heads=lambda: layers.MultiHeadAttention(2, 3),
    ),
    "attention of rows to their mean": calling(
        lambda layer, x: layer.heads(
            x[:, None], x.mean(0).expand(len(x), 2, 6)
        )[:, 0],
        heads=lambda: layers.MultiHeadAttention(2, 3),
    ),
    "GRU over rows": calling(
        lambda layer, x: x + layer.gru(x[None])[0],
        gru=lambda: layers.GRU(UNITS, return_sequences=True),
    ),
    "convolution over rows": calling(
        lambda layer, x: x + layer.conv(x[None])[0],
        conv=lambda: layers.Conv1D(UNITS, 3, padding="same"),
    ),
    "pooled rows": calling(
        lambda layer, x: x + layer.pool(x[None])[0],
        pool=layers.GlobalMaxPooling1D,
    ),
    "embedding of ranks": calling(
        lambda layer, x: x + layer.table(torch.arange(len(x)) % 5),
        table=lambda: layers.Embedding(5, UNITS),
    ),
    "one's own in one's own": calling(
        lambda layer, x: layer.dense(layer.inner(x)),
        inner=lambda: Own(lambda own, x: x - x.mean(0)),
    ),
    "one's own on a half": calling(
        lambda layer, x: x + layer.inner(x[: len(x) // 2 + 1]).sum(0),
        inner=lambda: Own(lambda own, x: x - x.mean(0) / len(x)),
    ),
    "a model": calling(
        lambda layer, x: layer.model(x) - x.mean(0),
        model=lambda: keras.Sequential([layers.Dense(UNITS, "tanh")]),
    ),
    "a model on a part": calling(
        lambda layer, x: x + layer.model(x[1:]).sum(0) / len(x),
        model=lambda: keras.Sequential(
            [keras.Input((UNITS,)), layers.Dense(UNITS, "tanh")]
        ),
    ),
    "add and concatenate": calling(
        lambda layer, x: layer.add(
            [x, layer.concatenate([x, x.flip(0)])[:, 3:9]]
        ),
        add=layers.Add,
        concatenate=layers.Concatenate,
    ),
    "concatenated rows": calling(
        lambda layer, x: layer.concatenate([x, x])[len(x) :] + x,
        concatenate=lambda: layers.Concatenate(axis=0),
    ),
    "reshaped to others": calling(
        lambda layer, x: layer.turn(x.T[None])[0] + x,
        turn=lambda: layers.Permute((2, 1)),
    ),
}


class Scores(layers.Layer):
    """Attention with a `(T, T)` bias: T may be the number of rows."""

    def build(self, input_shape):
        t = input_shape[1]
        self.bias = self.add_weight((t, t), "glorot_uniform", name="bias")
        self.dense = layers.Dense(UNITS, name="inner")
        self.dense.build(input_shape)

    def call(self, x):
        mask = torch.tril(torch.ones(self.bias.shape))
        scores = torch.einsum("bti,bsi->bts", x, self.dense(x)) + self.bias
        return ops.matmul(ops.softmax(scores * mask), x)


@keras.saving.register_keras_serializable("user_code")
class Cell(layers.Layer):
    """A cell that looks at all rows of a step."""

    state_size = output_size = UNITS

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(UNITS, name="inner")

    def build(self, input_shape):
        self.dense.build((None, 2 * UNITS))

    def call(self, x, states):
        state = ops.concatenate([x, states[0]], axis=-1)
        state = ops.tanh(self.dense(state))
        state = state - 0.5 * ops.mean(state, axis=0)
        return state, [state]


class Masking(layers.Layer):
    """Computes a mask, which the next layer reads."""

    supports_masking = True

    def call(self, x):
        return x

    def compute_mask(self, x, previous_mask=None):
        return ops.any(x > ops.mean(x), axis=-1)


class Masked(layers.Layer):
    supports_masking = True

    def call(self, x, mask=None):
        mask = ops.cast(mask, x.dtype)[..., None]
        return x * mask / (1 + ops.sum(mask))


class Twice(layers.Wrapper):
    def call(self, x):
        return self.layer(x) + ops.mean(self.layer(x[:1]), axis=0)

    def compute_output_shape(self, input_shape):
        return input_shape


def own(function):
    return lambda: Own(function, name="own")


def of_steps(layer, x):
    tokens = ops.reshape(x, (-1, x.shape[-1]))
    chances = ops.mean(ops.softmax(tokens, axis=-1), axis=0)
    layer.add_loss(ops.sum(ops.square(chances)))
    return ops.reshape(tokens - ops.max(tokens, axis=0), ops.shape(x))


def sequential(*make):
    return lambda: keras.Sequential([f() for f in make])


SEQUENCES = {
    "scores": Scores,
    "tokens": own(of_steps),
    "time major": own(lambda layer, x: x - x.transpose(0, 1).mean(0)[:, None]),
    "mean over rows": own(lambda layer, x: x - x.mean(0)),
    "mean over steps": own(lambda layer, x: x - x.mean(1, keepdim=True)),
    "mean over both": own(lambda layer, x: x - x.mean((0, 1))),
    "a plain (T, T)": own(
        lambda layer, x: torch.eye(x.shape[1]).flip(0) @ x + x
    ),
    "a plain (T, 6)": own(
        lambda layer, x: x + torch.linspace(0, 1, x.shape[1])[:, None]
    ),
    "rows of steps": own(
        lambda layer, x: (
            torch.einsum("bti,cti->bct", x, x).softmax(1) @ x / len(x)
            if len(x) == x.shape[1]
            else x
        )
    ),
    "steps flipped": own(lambda layer, x: x.flip(1)),
    "rows and steps flipped": own(lambda layer, x: x.flip(0, 1)),
    "step by step": own(
        lambda layer, x: torch.stack(
            [x[:, t] - x[:, t].mean(0) for t in range(x.shape[1])], 1
        )
    ),
    "reshaped to steps of all": own(
        lambda layer, x: (
            x.reshape(x.shape[1], -1, 6).reshape(x.shape) * layer.scale
        )
    ),
    "TimeDistributed": lambda: layers.TimeDistributed(
        own(lambda layer, x: x - x.mean(0))()
    ),
    "TimeDistributed, by size": lambda: layers.TimeDistributed(
        own(lambda layer, x: (note(len(x)), x / len(x))[1])()
    ),
    "RNN": lambda: layers.RNN(Cell(), return_sequences=True),
    "RNN, unrolled": lambda: layers.RNN(
        Cell(), return_sequences=True, unroll=True
    ),
    "RNN of two": lambda: layers.RNN([Cell(), Cell()], return_sequences=True),
    "Bidirectional": lambda: layers.Bidirectional(
        layers.RNN(Cell(), return_sequences=True),
        merge_mode="sum",
    ),
    "masks": sequential(Masking, Masked),
    "a mask for an LSTM": sequential(
        Masking, lambda: layers.LSTM(UNITS, return_sequences=True)
    ),
    "a mask for attention": lambda: calling(
        lambda layer, x: layer.heads(layer.masking(x), x),
        heads=lambda: layers.MultiHeadAttention(2, 3),
        masking=Masking,
    )(),
    "Wrapper": lambda: Twice(layers.Dense(UNITS, "tanh")),
    "Lambda": lambda: layers.Lambda(lambda x: x - ops.mean(x, axis=0)),
    "pool over steps": sequential(
        own(lambda layer, x: x - x.max()),
        lambda: layers.Conv1D(UNITS, 2, padding="same"),
    ),
}


def activation(x):
    return ops.tanh(x - ops.mean(x, axis=0))


def activity(x):
    return 0.1 * ops.sqrt(ops.sum(ops.square(x)))


class Activity(keras.regularizers.Regularizer):
    def __call__(self, x):
        return 0.1 * ops.sum(ops.square(ops.mean(x, axis=0)))


class Several(layers.Layer):
    """Outputs of rows, of none, and a number."""

    def call(self, x):
        return {"x": x, "mean": ops.mean(x, axis=0), "n": ops.max(x)}


def several(x):
    y = Several()(x)
    return y["x"] - y["mean"] * y["n"]


def captured():
    seen = []

    def function(x):
        seen.append(len(x))
        note(len(seen))
        return x * len(seen) / seen[-1]

    return layers.Lambda(function, output_shape=(UNITS,))


# Functions that make a layer, or take a symbolic tensor.
KNOWN = {
    "activation": lambda: layers.Dense(UNITS, activation),
    "activation layer": lambda: layers.Activation(activation),
    "activity regularizer": lambda: layers.Dense(
        UNITS, activity_regularizer=activity
    ),
    "activity regularizer, a class": lambda: layers.Dense(
        UNITS, activity_regularizer=Activity()
    ),
    "kernel regularizer": lambda: layers.Dense(
        UNITS, kernel_regularizer=lambda w: 0.1 * ops.max(ops.abs(w))
    ),
    "constraint": lambda: layers.Dense(
        UNITS, kernel_constraint=lambda w: w / (0.5 + ops.norm(w))
    ),
    "Lambda with a closure": captured,
    "an output without rows": lambda: (
        lambda x: (
            x + layers.Lambda(lambda x: ops.mean(x, axis=0, keepdims=True))(x)
        )
    ),
    "several outputs": lambda: several,
    "operations": lambda: lambda x: x - ops.mean(x, axis=0, keepdims=True),
    "operations of rows": lambda: lambda x: ops.cumsum(x, axis=0) / 9,
    "a product of operations": lambda: (
        lambda x: x + ops.matmul(x, ops.matmul(ops.transpose(x), x)) / 9
    ),
    "flip of operations": lambda: lambda x: ops.flip(x, axis=0) + x,
    "max of operations": lambda: lambda x: x / (0.1 + ops.max(ops.abs(x))),
    "operations and layers": lambda: (
        lambda x: layers.Dense(CLASSES)(
            layers.LayerNormalization()(x * ops.std(x, axis=0))
        )
    ),
    "rows of a shape": lambda: (
        lambda x: x / ops.cast(ops.shape(x)[1], "float32")
    ),
}
