"""Steps that do something of their own with gradients."""

import torch

import keras
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from keras import layers
from keras import ops


def build(model_class):
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, "tanh", name="hidden")(inputs)
    return model_class(inputs, layers.Dense(2, name="out")(hidden))


def train(model, rows=11, **kwargs):
    history = model.fit(
        normal(rows, 6),
        normal(rows, 2, seed=1),
        batch_size=4,
        verbose=0,
        **kwargs,
    )
    return report(history, model)


class Accumulating(keras.Model):
    """Applies the mean gradient of every second batch and the one before."""

    every = 2

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = 0
        self.sums = None

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        loss.backward()
        trained = self.trainable_variables
        gradients = [v.value.grad.clone() for v in trained]
        if self.sums is None:
            self.sums = gradients
        else:
            self.sums = [s + g for s, g in zip(self.sums, gradients)]
        self.seen += 1
        if self.seen % self.every == 0:
            with torch.no_grad():
                mean = [s / self.every for s in self.sums]
                self.optimizer.apply(mean, trained)
            self.sums = None
        self._loss_tracker.update_state(loss)
        return self.compute_metrics(x, y, y_pred)


@program
def accumulated_by_hand():
    model = build(Accumulating)
    model.compile(sgd(0.1), "mse", metrics=["mae"])
    return train(model, epochs=2)


class Clipping(keras.Model):
    """torch's clipping, and the norm before it."""

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        trained = self.trainable_variables
        gradients = [v.value.grad for v in trained]
        largest = max(float(ops.max(ops.abs(g))) for g in gradients)
        with torch.no_grad():
            self.optimizer.apply(gradients, trained)
        return {"loss": loss.detach(), "norm": norm, "largest": largest}


@program
def clipped_by_torch():
    model = build(Clipping)
    model.compile(sgd(0.2), "mse")
    return train(model, epochs=2)


class Adaptive(keras.Model):
    """Each gradient clipped to a share of its weight's norm, by hand."""

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        loss.backward()
        clipped = []
        with torch.no_grad():
            for v in self.trainable_variables:
                gradient = v.value.grad
                limit = 0.1 * torch.clamp(torch.linalg.norm(v.value), min=0.1)
                norm = torch.linalg.norm(gradient)
                if norm > limit:
                    gradient = gradient * (limit / norm)
                clipped.append(gradient)
            self.optimizer.apply(clipped, self.trainable_variables)
        self._loss_tracker.update_state(loss)
        return {"loss": self._loss_tracker.result()}


@program
def clipped_adaptively():
    model = build(Adaptive)
    model.compile(sgd(0.5), "mse")
    return train(model, rows=9)


class Scaled(keras.Model):
    """A loss that is scaled before backward."""

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        self._loss_tracker.update_state(loss)
        self.optimizer.scale_loss(loss).backward()
        trained = self.trainable_variables
        gradients = [v.value.grad for v in trained]
        with torch.no_grad():
            self.optimizer.apply(gradients, trained)
        logs = self.compute_metrics(x, y, y_pred)
        logs["scale"] = float(self.optimizer.dynamic_scale)
        return logs


@program
def loss_scale():
    model = build(Scaled)
    optimizer = keras.optimizers.LossScaleOptimizer(
        sgd(0.1), initial_scale=64.0, dynamic_growth_steps=2
    )
    model.compile(optimizer, "mse", metrics=["mae"])
    return train(model)


class ByHand(keras.Model):
    """No optimizer at all: weights, momentum and a penalty by hand."""

    rate, momentum = 0.05, 0.5

    def build_velocities(self):
        self.velocities = [
            keras.Variable(
                ops.zeros(v.shape), trainable=False, name=f"velocity_{i}"
            )
            for i, v in enumerate(self.trainable_variables)
        ]

    def train_step(self, data):
        x, y = data
        trained = self.trainable_variables
        y_pred = self(x, training=True)
        penalty = sum(ops.sum(ops.square(v)) for v in trained)
        loss = ops.mean(ops.square(y - y_pred)) + 0.01 * penalty
        gradients = torch.autograd.grad(loss, [v.value for v in trained])
        with torch.no_grad():
            for v, speed, gradient in zip(trained, self.velocities, gradients):
                speed.assign(self.momentum * speed - self.rate * gradient)
                v.assign_add(speed)
        return {"loss": loss.detach(), "penalty": penalty.detach()}


@program
def updated_by_hand():
    model = build(ByHand)
    model.build_velocities()
    model.compile()
    return train(model, rows=7, epochs=2)
