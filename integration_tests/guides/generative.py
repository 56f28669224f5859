"""Diffusion models and autoencoders that draw noise."""

import math

import torch

import keras
from integration_tests.guides.guide import descend
from integration_tests.guides.guide import images
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from keras import layers
from keras import ops

STEPS = 20


class TimeEmbedding(layers.Layer):
    """Sines and cosines of a time, one row each."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        rates = [math.log(50.0) * i / (width // 2) for i in range(width // 2)]
        self.rates = ops.exp(ops.convert_to_tensor(rates, "float32"))

    def call(self, times):
        angles = ops.cast(times, "float32")[:, None] * self.rates[None]
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)


def denoiser(name="denoiser"):
    image, time = keras.Input((8, 8, 1)), keras.Input(())
    embedded = layers.Dense(6, "silu")(TimeEmbedding(6)(time))
    x = layers.Conv2D(6, 3, padding="same")(image)
    x = x + layers.Reshape((1, 1, 6))(embedded)
    x = layers.GroupNormalization(2)(x)
    x = layers.Conv2D(6, 3, padding="same", activation="silu")(x)
    x = layers.Conv2D(1, 1)(x)
    return keras.Model([image, time], x, name=name)


class Ddpm(keras.Model):
    """Discrete times; an average of the weights beside the network."""

    def __init__(self):
        super().__init__()
        self.network = denoiser()
        self.ema_network = denoiser("ema")
        self.ema_network.set_weights(self.network.get_weights())
        betas = ops.linspace(1e-3, 0.2, STEPS)
        self.kept = ops.cumprod(1.0 - betas)
        self.seed_generator = keras.random.SeedGenerator(3)
        self.built = True

    def train_step(self, real):
        n = ops.shape(real)[0]
        times = keras.random.randint((n,), 0, STEPS, seed=self.seed_generator)
        noise = keras.random.normal(ops.shape(real), seed=self.seed_generator)
        kept = ops.reshape(ops.take(self.kept, times), (n, 1, 1, 1))
        noisy = ops.sqrt(kept) * real + ops.sqrt(1.0 - kept) * noise
        predicted = self.network([noisy, ops.cast(times, "float32")])
        loss = ops.mean(ops.square(noise - predicted))
        descend(loss, self.network.trainable_weights, self.optimizer)
        with torch.no_grad():
            for mean, v in zip(self.ema_network.weights, self.network.weights):
                mean.assign(0.9 * mean + 0.1 * v)
        return {"noise_loss": loss.detach()}


@program
def ddpm():
    model = Ddpm()
    model.compile(sgd(0.1))
    history = model.fit(images(11), batch_size=4, epochs=2, verbose=0)
    return report(history, model)


class Ddim(keras.Model):
    """Continuous times, normalised images, noise of torch's generator."""

    def __init__(self):
        super().__init__()
        self.normalizer = layers.Normalization(axis=-1)
        self.network = denoiser()
        self.noise_tracker = keras.metrics.Mean(name="noise_loss")
        self.image_tracker = keras.metrics.Mean(name="image_loss")
        self.built = True

    @property
    def metrics(self):
        return [self.noise_tracker, self.image_tracker]

    def rates(self, times):
        angles = 0.2 + times * 1.2
        return ops.cos(angles), ops.sin(angles)

    def denoise(self, noisy, signal, noise_rate, training):
        power = ops.reshape(noise_rate**2, (-1,))
        noises = self.network([noisy, power], training=training)
        return noises, (noisy - noise_rate * noises) / signal

    def shared(self, data, training):
        real = self.normalizer(data, training=training)
        noises = torch.randn(real.shape)
        times = torch.rand((real.shape[0], 1, 1, 1))
        signal, noise_rate = self.rates(times)
        noisy = signal * real + noise_rate * noises
        guess, image = self.denoise(noisy, signal, noise_rate, training)
        noise_loss = ops.mean(ops.abs(noises - guess))
        self.noise_tracker.update_state(noise_loss)
        self.image_tracker.update_state(ops.mean(ops.abs(real - image)))
        return noise_loss

    def train_step(self, data):
        loss = self.shared(data, training=True)
        descend(loss, self.network.trainable_weights, self.optimizer)
        return {m.name: m.result() for m in self.metrics}

    def test_step(self, data):
        self.shared(data, training=False)
        return {m.name: m.result() for m in self.metrics}

    def draw(self, n, steps=3):
        noisy = keras.random.normal((n, 8, 8, 1), seed=5)
        for step in range(steps):
            times = ops.ones((n, 1, 1, 1)) - step / steps
            signal, noise_rate = self.rates(times)
            guess, image = self.denoise(noisy, signal, noise_rate, False)
            signal, noise_rate = self.rates(times - 1 / steps)
            noisy = signal * image + noise_rate * guess
        return ops.tanh(image)


@program
def ddim():
    x = images(9)
    model = Ddim()
    model.normalizer.adapt(x)
    model.compile(sgd(0.05))
    keras.utils.set_random_seed(21)
    history = model.fit(
        x, validation_data=(x[:5],), batch_size=4, epochs=2, verbose=0
    )
    return report(history, model, drawn=ops.convert_to_numpy(model.draw(3)))


class Sampling(layers.Layer):
    """Draws from a normal distribution, given its mean and log variance."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(9)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * noise


def encoder():
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(
        inputs
    )
    x = layers.Dense(8, "relu")(layers.Flatten()(x))
    mean = layers.Dense(2, name="mean")(x)
    log_variance = layers.Dense(2, name="log_variance")(x)
    drawn = Sampling()([mean, log_variance])
    return keras.Model(inputs, [mean, log_variance, drawn], name="encoder")


def decoder():
    return keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(4 * 4 * 4, "relu"),
            layers.Reshape((4, 4, 4)),
            layers.Conv2DTranspose(
                1, 3, strides=2, padding="same", activation="sigmoid"
            ),
        ],
        name="decoder",
    )


def divergence(mean, log_variance):
    """Of a normal distribution from the standard one, a number a row."""
    terms = 1 + log_variance - ops.square(mean) - ops.exp(log_variance)
    return -0.5 * ops.sum(terms, axis=1)


class Vae(keras.Model):
    """Both parts of the loss, in the step."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.trackers = [
            keras.metrics.Mean(name=name)
            for name in ("loss", "reconstruction_loss", "kl_loss")
        ]
        self.built = True

    @property
    def metrics(self):
        return self.trackers

    def train_step(self, data):
        mean, log_variance, drawn = self.encoder(data)
        image = self.decoder(drawn)
        crossentropy = keras.losses.binary_crossentropy(data, image)
        reconstruction = ops.mean(ops.sum(crossentropy, axis=(1, 2)))
        kl = ops.mean(divergence(mean, log_variance))
        loss = reconstruction + kl
        descend(loss, self.trainable_weights, self.optimizer)
        for tracker, value in zip(self.trackers, (loss, reconstruction, kl)):
            tracker.update_state(value)
        return {tracker.name: tracker.result() for tracker in self.trackers}


@program
def vae_step():
    model = Vae(encoder(), decoder())
    model.compile(optimizer=sgd(0.01))
    history = model.fit(images(11), batch_size=4, epochs=2, verbose=0)
    return report(history, model)


class AddingVae(keras.Model):
    """The divergence as a loss that the call adds."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def call(self, inputs):
        mean, log_variance, drawn = self.encoder(inputs)
        self.add_loss(0.05 * ops.mean(divergence(mean, log_variance)))
        return self.decoder(drawn)


@program
def vae_add_loss():
    model = AddingVae(encoder(), decoder())
    model.compile(sgd(0.1), "binary_crossentropy", metrics=["mse"])
    x = images(7)
    history = model.fit(x, x, batch_size=5, epochs=2, verbose=0)
    return report(
        history, model, evaluated=model.evaluate(x, x, batch_size=4, verbose=0)
    )


class Quantizer(layers.Layer):
    """The nearest entry of a code book; gradients go straight through."""

    def __init__(self, entries, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.book = self.add_weight(
            shape=(width, entries),
            initializer=keras.initializers.RandomUniform(-1, 1, seed=4),
            name="book",
        )

    def call(self, x):
        flat = ops.reshape(x, (-1, self.width))
        distances = (
            ops.sum(flat**2, axis=1, keepdims=True)
            + ops.sum(self.book**2, axis=0)
            - 2 * ops.matmul(flat, self.book)
        )
        nearest = ops.one_hot(ops.argmin(distances, axis=1), self.book.shape[1])
        found = ops.matmul(nearest, ops.transpose(self.book))
        found = ops.reshape(found, ops.shape(x))
        commitment = ops.mean((ops.stop_gradient(found) - x) ** 2)
        book_loss = ops.mean((found - ops.stop_gradient(x)) ** 2)
        self.add_loss(0.25 * commitment + book_loss)
        return x + ops.stop_gradient(found - x)


class VqVae(keras.Model):
    """Adds up what its quantizer added, in the step."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.total = keras.metrics.Mean(name="loss")
        self.built = True

    @property
    def metrics(self):
        return [self.total]

    def train_step(self, x):
        image = self.network(x)
        error = ops.mean((x - image) ** 2) / 0.05
        loss = error + sum(self.network.losses)
        descend(loss, self.network.trainable_variables, self.optimizer)
        self.total.update_state(loss)
        return {"loss": self.total.result(), "error": error.detach()}


@program
def vq_vae():
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu")(
        inputs
    )
    x = Quantizer(5, 4)(layers.Conv2D(4, 1)(x))
    x = layers.Conv2DTranspose(1, 3, strides=2, padding="same")(x)
    model = VqVae(keras.Model(inputs, x))
    model.compile(sgd(0.05))
    history = model.fit(images(11), batch_size=4, epochs=2, verbose=0)
    return report(history, model)
