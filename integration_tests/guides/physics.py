"""Equations, and a player: losses that are no distance to a target."""

import numpy as np
import torch

import keras
from integration_tests.guides.guide import descend
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from integration_tests.guides.guide import uniform
from keras import layers
from keras import ops


def field(name="field"):
    return keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(8, "tanh"),
            layers.Dense(8, "tanh"),
            layers.Dense(1),
        ],
        name=name,
    )


class Heat(keras.Model):
    """A field that obeys the heat equation, with its walls at zero."""

    def __init__(self, walls):
        super().__init__()
        self.field = field()
        self.walls = ops.convert_to_tensor(walls)
        self.diffusivity = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(0.5),
            name="diffusivity",
        )
        self.built = True

    def residual(self, points):
        points = points.detach().requires_grad_(True)
        values = self.field(points)
        (slope,) = torch.autograd.grad(values.sum(), points, create_graph=True)
        (bend,) = torch.autograd.grad(
            slope[:, 0].sum(), points, create_graph=True
        )
        return slope[:, 1] - self.diffusivity * bend[:, 0]

    def train_step(self, data):
        points, values = data
        equation = ops.mean(ops.square(self.residual(points)))
        known = ops.mean(ops.square(self.field(points) - values))
        walls = ops.mean(ops.square(self.field(self.walls)))
        loss = equation + known + walls
        descend(loss, self.trainable_weights, self.optimizer)
        return {
            "equation": equation.detach(),
            "known": known.detach(),
            "walls": walls.detach(),
        }

    def test_step(self, data):
        points, _ = data
        with torch.enable_grad():
            residual = self.residual(points)
        return {"residual": ops.max(ops.abs(residual.detach()))}


@program
def heat_equation():
    walls = np.concatenate([np.zeros((5, 1)), uniform(5, 1)], 1)
    model = Heat(walls.astype("float32"))
    model.compile(sgd(0.1))
    x = uniform(11, 2, seed=1)
    y = np.exp(-x[:, 1:]) * np.sin(np.pi * x[:, :1])
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history,
        model,
        evaluated=model.evaluate(x, y, batch_size=4, verbose=0),
    )


class Potential(keras.Model):
    """Forces are the gradient of an energy: in the call itself."""

    def __init__(self):
        super().__init__()
        self.energy = field("energy")
        self.built = True

    def call(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.energy(x)
            (force,) = torch.autograd.grad(-energy.sum(), x, create_graph=True)
        return {"energy": energy, "force": force}


@program
def potential():
    model = Potential()
    model.compile(
        sgd(0.1),
        loss={"energy": "mse", "force": "mae"},
        loss_weights={"energy": 0.5, "force": 1.0},
    )
    x = normal(9, 2)
    y = {"energy": 0.5 * np.sum(x**2, 1, keepdims=True), "force": -x}
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(history, model)


class ActorCritic(keras.Model):
    """One update out of an episode: advantages, entropy, and a critic."""

    def __init__(self, actions):
        super().__init__()
        self.trunk = layers.Dense(8, "tanh", name="trunk")
        self.actor = layers.Dense(actions, name="actor")
        self.critic = layers.Dense(1, name="critic")

    def call(self, x):
        x = self.trunk(x)
        return self.actor(x), self.critic(x)

    def train_step(self, data):
        states, (actions, rewards) = data
        logits, values = self(states, training=True)
        returns, running = [], 0.0
        for reward in ops.flip(rewards):
            running = reward + 0.9 * running
            returns.insert(0, running)
        returns = ops.stack(returns)
        returns = (returns - ops.mean(returns)) / (ops.std(returns) + 0.1)
        advantage = ops.stop_gradient(returns - values[:, 0])
        chances = torch.distributions.Categorical(logits=logits)
        policy = -ops.sum(chances.log_prob(actions) * advantage)
        entropy = ops.mean(chances.entropy())
        critic = keras.losses.Huber(reduction="sum")(returns[:, None], values)
        loss = 0.1 * policy + 0.1 * critic - 0.01 * entropy
        descend(loss, self.trainable_weights, self.optimizer)
        return {
            "policy": policy.detach(),
            "critic": critic.detach(),
            "entropy": entropy.detach(),
        }


@program
def actor_critic():
    model = ActorCritic(3)
    model.compile(sgd(0.1))
    model(normal(1, 4))
    states, rewards = normal(11, 4), normal(11, seed=1)
    actions = integers(3, 11).astype("int64")
    history = model.fit(
        states,
        (actions, rewards),
        batch_size=5,
        epochs=2,
        shuffle=False,
        verbose=0,
    )
    return report(history, model)


class DeepQ(keras.Model):
    """A target network, and actions that are drawn in `predict`."""

    def __init__(self, actions):
        super().__init__()
        self.online = self.network("online", actions)
        self.target = self.network("target", actions)
        self.target.set_weights(self.online.get_weights())
        self.target.trainable = False
        self.steps = 0
        self.seeds = keras.random.SeedGenerator(12)
        self.built = True

    def network(self, name, actions):
        return keras.Sequential(
            [keras.Input((4,)), layers.Dense(6, "tanh"), layers.Dense(actions)],
            name=name,
        )

    def train_step(self, data):
        (states, actions, after), rewards = data
        best = ops.max(self.target(after), axis=1)
        wanted = rewards + 0.9 * best
        chosen = ops.one_hot(actions, 3)
        values = ops.sum(self.online(states) * chosen, axis=1)
        loss = ops.mean(ops.square(wanted.detach() - values))
        descend(loss, self.online.trainable_weights, self.optimizer)
        self.steps += 1
        if self.steps % 2 == 0:
            self.target.set_weights(self.online.get_weights())
        return {"loss": loss.detach(), "best": ops.max(best).detach()}

    def predict_step(self, data):
        (states,) = data
        return keras.random.categorical(self.online(states), 1, seed=self.seeds)


@program
def deep_q():
    model = DeepQ(3)
    model.compile(sgd(0.1))
    x = (normal(11, 4), integers(3, 11), normal(11, 4, seed=1))
    history = model.fit(
        x, normal(11, seed=2), batch_size=4, epochs=2, verbose=0
    )
    drawn = model.predict((normal(7, 4, seed=3),), batch_size=4, verbose=0)
    return report(history, model, drawn=drawn)
