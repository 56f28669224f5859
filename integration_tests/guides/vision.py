"""Networks of images."""

import torch

import keras
from integration_tests.guides.guide import descend
from integration_tests.guides.guide import images
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from keras import layers
from keras import ops


@program
def unet():
    """Down, up, and connections across; a class for each pixel."""
    inputs = keras.Input((8, 8, 1))
    one = layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    x = layers.MaxPooling2D()(one)
    two = layers.SeparableConv2D(6, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(two)
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    x = layers.UpSampling2D()(x)
    x = layers.Conv2DTranspose(6, 3, padding="same")(x)
    x = layers.add([x, two])
    x = layers.UpSampling2D()(x)
    x = layers.concatenate([x, one])
    outputs = layers.Conv2D(2, 1, activation="softmax")(x)
    model = keras.Model(inputs, outputs)

    def dice(y, p):
        y = ops.one_hot(ops.cast(y[..., 0], "int32"), 2)
        both = ops.sum(y * p, axis=(1, 2))
        either = ops.sum(y + p, axis=(1, 2))
        return 1 - ops.mean((2 * both + 1) / (either + 1))

    def crossentropy_and_dice(y, p):
        # Keras's sparse one fails on what a convolution returns.
        classes = ops.one_hot(ops.cast(y[..., 0], "int32"), 2)
        cross = keras.losses.categorical_crossentropy(classes, p)
        return ops.mean(cross) + dice(y, p)

    model.compile(sgd(0.1), crossentropy_and_dice, metrics=[dice])
    x = images(7)
    y = (x > 0.5).astype("int32")
    history = model.fit(
        x, y, validation_data=(x[:3], y[:3]), batch_size=4, epochs=2, verbose=0
    )
    return report(history, model)


class Residual(layers.Layer):
    """A block of two convolutions, made of layers."""

    def __init__(self, filters, strides=1, **kwargs):
        super().__init__(**kwargs)
        same = {"padding": "same", "use_bias": False}
        self.main = [
            layers.Conv2D(filters, 3, strides, name="one", **same),
            layers.BatchNormalization(name="norm_one"),
            layers.ReLU(),
            layers.Conv2D(filters, 3, name="two", **same),
            layers.BatchNormalization(name="norm_two"),
        ]
        self.skip = []
        if strides > 1:
            self.skip = [layers.Conv2D(filters, 1, strides, name="skip")]

    def call(self, x, training=None):
        skipped = x
        for layer in self.main:
            if isinstance(layer, layers.BatchNormalization):
                x = layer(x, training=training)
            else:
                x = layer(x)
        for layer in self.skip:
            skipped = layer(skipped)
        return ops.relu(x + skipped)


@program
def residual_cnn():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Rescaling(2.0, offset=-1.0),
            # Of other channels, backward of a strided convolution of 1 x 1
            # writes beyond its memory in torch 2.13, on one device of AVX2.
            layers.Conv2D(8, 3, padding="same"),
            Residual(8),
            Residual(8, strides=2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    model.compile(
        sgd(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    x, y = images(11), integers(3, 11)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, evaluated=model.evaluate(x, y, batch_size=4, verbose=0)
    )


class Patches(layers.Layer):
    """Cuts images into squares, each a row of numbers."""

    def __init__(self, side, **kwargs):
        super().__init__(**kwargs)
        self.side = side

    def call(self, x):
        n, height, width, channels = ops.shape(x)
        down, right = height // self.side, width // self.side
        x = ops.reshape(x, (n, down, self.side, right, self.side, channels))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        return ops.reshape(x, (n, down * right, -1))


class MixerBlock(layers.Layer):
    """Mixes patches, then channels."""

    def __init__(self, patches, width, **kwargs):
        super().__init__(**kwargs)
        self.across = keras.Sequential(
            [layers.Dense(patches, "gelu"), layers.Dense(patches)],
            name="across",
        )
        self.within = keras.Sequential(
            [layers.Dense(width, "gelu"), layers.Dense(width)], name="within"
        )
        self.norm = layers.LayerNormalization()

    def build(self, shape):
        self.norm.build(shape)
        self.across.build((shape[0], shape[2], shape[1]))
        self.within.build(shape)

    def call(self, x):
        channels = ops.transpose(self.norm(x), (0, 2, 1))
        x = x + ops.transpose(self.across(channels), (0, 2, 1))
        return x + self.within(self.norm(x))


@program
def mixer():
    inputs = keras.Input((8, 8, 1))
    x = layers.Dense(6)(Patches(4)(inputs))
    x = keras.Sequential([MixerBlock(4, 6) for _ in range(2)])(x)
    x = layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, layers.Dense(3)(x))
    model.compile(
        sgd(0.1, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseTopKCategoricalAccuracy(2)],
    )
    history = model.fit(
        normal(11, 8, 8, 1), integers(3, 11), batch_size=4, epochs=2, verbose=0
    )
    return report(history, model)


class FocalModulation(layers.Layer):
    """Gated sums of contexts of growing reach modulate a query."""

    levels = 2

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.project_in = layers.Dense(2 * width + self.levels + 1, name="in")
        self.contexts = [
            layers.DepthwiseConv2D(
                3 + 2 * i, padding="same", activation="gelu", name=f"focal_{i}"
            )
            for i in range(self.levels)
        ]
        self.mix = layers.Conv2D(width, 1, name="mix")
        self.project_out = layers.Dense(width, name="out")

    def call(self, x):
        query, context, gates = ops.split(
            self.project_in(x), [self.width, 2 * self.width], axis=-1
        )
        total = 0.0
        for i, layer in enumerate(self.contexts):
            context = layer(context)
            total = total + context * gates[..., i : i + 1]
        everywhere = ops.gelu(ops.mean(context, axis=(1, 2), keepdims=True))
        total = total + everywhere * gates[..., self.levels :]
        return x + self.project_out(query * self.mix(total))


@program
def focal_modulation():
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 2, strides=2)(inputs)
    x = layers.LayerNormalization()(FocalModulation(4)(x))
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(3, "softmax")(x))
    model.compile(
        sgd(0.2), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    history = model.fit(
        images(7), integers(3, 7), batch_size=5, epochs=2, verbose=0
    )
    return report(history, model)


class Dreamer(keras.Model):
    """`predict` climbs the gradient of a feature with respect to its input."""

    def predict_step(self, data):
        x = data[0] if isinstance(data, tuple) else data
        start = x
        with torch.enable_grad():
            for _ in range(3):
                x = x.detach().requires_grad_(True)
                gain = torch.mean(torch.square(self(x)))
                (gradient,) = torch.autograd.grad(gain, x)
                largest = torch.clamp(gradient.abs().mean(), min=1e-3)
                x = x + 0.05 * gradient / largest
        return {"dream": x.detach(), "moved": (x - start).detach()}


@program
def dream():
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, strides=2, activation="tanh")(inputs)
    model = Dreamer(inputs, layers.Dense(3)(layers.Flatten()(x)))
    model.compile(sgd(0.1), "mse")
    x = images(7)
    history = model.fit(x, normal(7, 3), batch_size=4, verbose=0)
    return report(
        history, model, dreamt=model.predict(x, batch_size=4, verbose=0)
    )


class Style(keras.Model):
    """Features as they are in the content, Gram matrices as in one style."""

    def __init__(self, features, style):
        super().__init__()
        self.features = features
        self.style = ops.convert_to_tensor(style)
        self.painter = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(4, 3, padding="same", activation="tanh"),
                layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
            ],
            name="painter",
        )
        self.built = True

    def gram(self, x):
        x = ops.reshape(x, (ops.shape(x)[0], -1, x.shape[-1]))
        return ops.einsum("bif,big->bfg", x, x) / x.shape[1]

    def train_step(self, content):
        painted = self.painter(content, training=True)
        seen, wanted = self.features(painted), self.features(content)
        style = self.gram(self.features(self.style))
        style_loss = ops.sum(ops.square(self.gram(seen) - style))
        style_loss = style_loss / ops.shape(content)[0]
        content_loss = ops.mean(ops.square(seen - wanted.detach()))
        edges = painted[:, 1:] - painted[:, :-1]
        loss = style_loss + content_loss + 0.1 * ops.mean(ops.square(edges))
        descend(loss, self.painter.trainable_weights, self.optimizer)
        return {"style": style_loss.detach(), "content": content_loss.detach()}


@program
def neural_style():
    features = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, strides=2, activation="tanh"),
        ],
        name="features",
    )
    features.trainable = False
    model = Style(features, images(1, seed=5))
    model.compile(sgd(0.2))
    history = model.fit(images(7), batch_size=4, epochs=2, verbose=0)
    return report(history, model)


class CrossAttention(layers.Layer):
    """A learned array of latents reads the input."""

    def __init__(self, latents, width, **kwargs):
        super().__init__(**kwargs)
        self.attend = layers.MultiHeadAttention(2, width // 2, name="attend")
        self.latents = self.add_weight(
            shape=(latents, width),
            initializer=keras.initializers.RandomNormal(stddev=0.5, seed=1),
            name="latents",
        )

    def call(self, x):
        query = ops.expand_dims(self.latents, 0)
        query = ops.repeat(query, ops.shape(x)[0], axis=0)
        return query + self.attend(query, x)


@program
def perceiver():
    inputs = keras.Input((8, 8, 1))
    x = layers.Dense(4)(Patches(2)(inputs))
    x = CrossAttention(3, 4)(x)
    x = x + layers.MultiHeadAttention(2, 2, name="self")(x, x)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    model = keras.Model(inputs, layers.Dense(3)(x))
    model.compile(
        sgd(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = model.fit(
        images(7), integers(3, 7), batch_size=4, epochs=2, verbose=0
    )
    return report(history, model)
