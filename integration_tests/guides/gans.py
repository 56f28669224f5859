"""Adversarial models: two networks, two optimizers, noise in the step."""

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

LATENT = 4


def discriminator(channels=1, name="discriminator"):
    return keras.Sequential(
        [
            keras.Input((8, 8, channels)),
            layers.Conv2D(4, 3, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2D(6, 3, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(1),
        ],
        name=name,
    )


def generator(width=LATENT):
    return keras.Sequential(
        [
            keras.Input((width,)),
            layers.Dense(2 * 2 * 6),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Reshape((2, 2, 6)),
            layers.Conv2DTranspose(4, 4, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2DTranspose(
                1, 4, strides=2, padding="same", activation="sigmoid"
            ),
        ],
        name="generator",
    )


class Adversarial(keras.Model):
    """What the two of them have in common."""

    def __init__(self, discriminator, generator):
        super().__init__()
        self.discriminator = discriminator
        self.generator = generator
        self.seed_generator = keras.random.SeedGenerator(1337)
        self.d_loss_tracker = keras.metrics.Mean(name="d_loss")
        self.g_loss_tracker = keras.metrics.Mean(name="g_loss")
        self.built = True

    @property
    def metrics(self):
        return [self.d_loss_tracker, self.g_loss_tracker]

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.loss_function = keras.losses.BinaryCrossentropy(from_logits=True)

    def noise(self, rows):
        return keras.random.normal((rows, LATENT), seed=self.seed_generator)

    def said(self, d_loss, g_loss):
        self.d_loss_tracker.update_state(d_loss)
        self.g_loss_tracker.update_state(g_loss)
        return {
            "d_loss": self.d_loss_tracker.result(),
            "g_loss": self.g_loss_tracker.result(),
        }


class Gan(Adversarial):
    """Labels with noise; real and generated images in one batch."""

    def train_step(self, real):
        real = real[0] if isinstance(real, tuple) else real
        n = ops.shape(real)[0]
        generated = self.generator(self.noise(n))
        both = ops.concatenate([generated, real], axis=0)
        labels = ops.concatenate([ops.ones((n, 1)), ops.zeros((n, 1))], axis=0)
        labels += 0.05 * keras.random.uniform(
            ops.shape(labels), seed=self.seed_generator
        )
        d_loss = self.loss_function(labels, self.discriminator(both.detach()))
        descend(d_loss, self.discriminator.trainable_weights, self.d_optimizer)
        wrong = ops.zeros((n, 1))
        g_loss = self.loss_function(
            wrong, self.discriminator(self.generator(self.noise(n)))
        )
        descend(g_loss, self.generator.trainable_weights, self.g_optimizer)
        return self.said(d_loss, g_loss)


@program
def gan():
    model = Gan(discriminator(), generator())
    model.compile(sgd(0.1), sgd(0.2))
    history = model.fit(images(11), batch_size=4, epochs=2, verbose=0)
    drawn = model.generator(normal(3, LATENT))
    return report(history, model, drawn=ops.convert_to_numpy(drawn))


class ConditionalGan(Adversarial):
    """Classes beside the noise, and as channels of the images."""

    def with_class(self, image, classes):
        planes = ops.repeat(classes, repeats=8 * 8, axis=0)
        planes = ops.reshape(planes, (-1, 8, 8, ops.shape(classes)[-1]))
        return ops.concatenate([image, planes], axis=-1)

    def train_step(self, data):
        real, classes = data
        n = ops.shape(real)[0]
        latent = ops.concatenate([self.noise(n), classes], axis=1)
        generated = self.generator(latent)
        both = ops.concatenate(
            [
                self.with_class(generated, classes),
                self.with_class(real, classes),
            ],
            axis=0,
        )
        labels = ops.concatenate([ops.ones((n, 1)), ops.zeros((n, 1))], axis=0)
        d_loss = self.loss_function(labels, self.discriminator(both.detach()))
        descend(d_loss, self.discriminator.trainable_weights, self.d_optimizer)
        latent = ops.concatenate([self.noise(n), classes], axis=1)
        judged = self.discriminator(
            self.with_class(self.generator(latent), classes)
        )
        g_loss = self.loss_function(ops.zeros((n, 1)), judged)
        descend(g_loss, self.generator.trainable_weights, self.g_optimizer)
        return self.said(d_loss, g_loss)


@program
def conditional_gan():
    model = ConditionalGan(discriminator(4), generator(LATENT + 3))
    model.compile(sgd(0.1), sgd(0.2))
    classes = keras.utils.to_categorical(integers(3, 7), 3)
    history = model.fit(images(7), classes, batch_size=5, epochs=2, verbose=0)
    return report(history, model)


class WassersteinGan(Adversarial):
    """A critic, trained twice as often, whose gradient should have norm 1."""

    def gradient_penalty(self, real, fake):
        n = ops.shape(real)[0]
        share = keras.random.uniform((n, 1, 1, 1), seed=self.seed_generator)
        between = real + share * (fake - real)
        between = between.detach().requires_grad_(True)
        judged = self.discriminator(between, training=True)
        (gradient,) = torch.autograd.grad(
            judged.sum(), between, create_graph=True
        )
        norm = ops.sqrt(ops.sum(ops.square(gradient), axis=[1, 2, 3]) + 1e-6)
        return ops.mean((norm - 1.0) ** 2)

    def train_step(self, real):
        n = real.shape[0]
        for _ in range(2):
            fake = self.generator(self.noise(n)).detach()
            difference = ops.mean(self.discriminator(fake)) - ops.mean(
                self.discriminator(real)
            )
            d_loss = difference + 2.0 * self.gradient_penalty(real, fake)
            descend(
                d_loss, self.discriminator.trainable_weights, self.d_optimizer
            )
        g_loss = -ops.mean(self.discriminator(self.generator(self.noise(n))))
        descend(g_loss, self.generator.trainable_weights, self.g_optimizer)
        return self.said(d_loss, g_loss)


@program
def wasserstein_gan():
    model = WassersteinGan(discriminator(), generator())
    model.compile(sgd(0.02), sgd(0.05))
    history = model.fit(images(7), batch_size=4, verbose=0)
    return report(history, model)


def translator(name):
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, padding="same", activation="tanh")(inputs)
    x = x + layers.Conv2D(4, 3, padding="same", activation="tanh")(x)
    x = layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x)
    return keras.Model(inputs, x, name=name)


class CycleGan(keras.Model):
    """Two translators and two judges; there and back is the identity."""

    def __init__(self):
        super().__init__()
        self.there = translator("there")
        self.back = translator("back")
        self.judge_a = discriminator(name="judge_a")
        self.judge_b = discriminator(name="judge_b")
        self.built = True

    def compile(self, optimizers):
        super().compile()
        self.optimizers = optimizers

    def train_step(self, data):
        a, b = data
        mse = keras.losses.MeanSquaredError()
        mae = keras.losses.MeanAbsoluteError()
        fake_b, fake_a = self.there(a), self.back(b)
        judged_a, judged_b = self.judge_a(fake_a), self.judge_b(fake_b)
        cycle = mae(a, self.back(fake_b)) + mae(b, self.there(fake_a))
        identity = mae(a, self.back(a)) + mae(b, self.there(b))
        g_loss = (
            mse(ops.ones_like(judged_a), judged_a)
            + mse(ops.ones_like(judged_b), judged_b)
            + 2.0 * cycle
            + 0.5 * identity
        )
        trained = self.there.trainable_weights + self.back.trainable_weights
        descend(g_loss, trained, self.optimizers[0])
        logs = {"g_loss": g_loss.detach(), "cycle": cycle.detach()}
        for name, judge, real, fake, optimizer in (
            ("a", self.judge_a, a, fake_a, self.optimizers[1]),
            ("b", self.judge_b, b, fake_b, self.optimizers[2]),
        ):
            right, wrong = judge(real), judge(fake.detach())
            loss = mse(ops.ones_like(right), right)
            loss = 0.5 * (loss + mse(ops.zeros_like(wrong), wrong))
            descend(loss, judge.trainable_weights, optimizer)
            logs[f"d_loss_{name}"] = loss.detach()
        return logs


@program
def cycle_gan():
    model = CycleGan()
    model.compile([sgd(0.05), sgd(0.05), sgd(0.05)])
    history = model.fit(
        images(7), 1.0 - images(7, seed=1), batch_size=4, verbose=0
    )
    return report(history, model)
