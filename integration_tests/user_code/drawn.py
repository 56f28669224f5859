"""Programs of lines that hypothesis draws: layers, a loss, a metric, a step."""

import typing

import numpy as np
import torch
from hypothesis import strategies

import keras
from integration_tests.harness import parity
from integration_tests.user_code import grammar
from integration_tests.user_code.running import CLASSES
from integration_tests.user_code.running import FEATURES
from integration_tests.user_code.running import UNITS
from integration_tests.user_code.running import compiled
from integration_tests.user_code.running import descend
from integration_tests.user_code.running import normal
from integration_tests.user_code.running import squares
from keras import layers
from keras import ops


class Program(typing.NamedTuple):
    rows: int
    # No more than three batches.
    batch: int
    blocks: tuple
    loss: tuple
    metric: tuple
    step: str
    weighted: bool


class Block(layers.Layer):
    """A layer of drawn lines, whose output is as its input."""

    def __init__(self, lines):
        super().__init__()
        self.code = grammar.Code(lines, self)
        self.known = {
            name: make()
            for name, make in grammar.KNOWN.items()
            if any(line[0] == f"call {name}" for line in lines)
        }

    def build(self, input_shape):
        self.scale = self.add_weight((UNITS,), "ones", name="scale")
        self.state = self.add_weight(
            (UNITS,), "zeros", trainable=False, name="state"
        )
        sequences = (None, None, UNITS)
        for layer in self.known.values():
            if isinstance(layer, layers.MultiHeadAttention):
                layer.build(sequences, sequences)
            else:
                layer.build(sequences)
        self.built = True

    def call(self, x):
        z = ops.tanh(self.code(x))
        if z.shape == x.shape:
            return 0.5 * x + z
        if z.ndim == 1 and z.shape[0] == x.shape[0]:
            return x + z[:, None]
        if z.ndim == 1 and z.shape[0] == x.shape[1]:
            return x * (1 + 0.3 * z)
        return x * (1 + 0.3 * ops.mean(z))

    def compute_output_shape(self, input_shape):
        return input_shape


class OfList(keras.metrics.Metric):
    """The mean of numbers that are kept in a list."""

    def __init__(self, function):
        super().__init__(name="listed")
        self.function, self.numbers = function, []

    def update_state(self, y_true, y_pred, sample_weight=None):
        value = ops.mean(self.function(y_true - y_pred))
        self.numbers.append(float(value))

    def result(self):
        return np.mean(self.numbers) if self.numbers else 0.0

    def reset_state(self):
        self.numbers = []


def loss_of(kind, lines):
    code = grammar.Code(lines)

    def loss(y, p):
        z = ops.mean(ops.tanh(code(y - p)))
        if kind == "rows":
            return ops.mean(squares(y, p), axis=-1) * (1 + 0.3 * z)
        if kind == "by a size":
            return ops.sum(squares(y, p)) / len(y) / CLASSES + z
        return ops.mean(squares(y, p)) + 0.5 * z

    return loss


def metric_of(kind, lines):
    code = grammar.Code(lines)
    if kind == "list":
        return OfList(code)

    def metric(y, p):
        z = code(y - p)
        return ops.mean(squares(y, p), axis=-1) if kind == "rows" else z.mean()

    return metric


def noisy(model, x, y):
    return squares(y, model(x + 0.1 * torch.randn(x.shape))).mean()


def mixed(model, x, y):
    order = torch.randperm(len(x))
    return squares(0.5 * (y + y[order]), model(0.5 * (x + x[order]))).mean()


def twice(model, x, y):
    a, b = model(torch.cat([x, x.flip(0) * 0.5])).chunk(2)
    return squares(y, a).mean() + 0.1 * squares(a, b).mean()


def parts(model, x, y):
    n = (len(x) + 1) // 2
    return squares(y[:n], model(x[:n])).mean()


def penalised(model, x, y):
    penalty = sum(torch.sum(v.value**2) for v in model.trainable_variables)
    return squares(y, model(x)).mean() + 0.01 * penalty


def of_gradient(model, x, y):
    x = x.detach().requires_grad_(True)
    p = model(x)
    (g,) = torch.autograd.grad(p.sum() / len(x), x, create_graph=True)
    return squares(y, p).mean() + g.square().sum()


def compiled_loss(model, x, y):
    return model.compute_loss(x, y, model(x, training=True))


STEPS = {
    f.__name__: f
    for f in (
        noisy,
        mixed,
        twice,
        parts,
        penalised,
        of_gradient,
        compiled_loss,
    )
}


def model_of(step):
    """A class of models with a step of its own, or Keras's."""
    if step == "keras":
        return keras.Model

    class Stepping(keras.Model):
        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            if step == "super":
                x = x - 0.5 * ops.mean(x, axis=0)
                return {**super().train_step((x, y)), "rows": len(x)}
            loss = STEPS[step](self, x, y)
            descend(self, loss)
            return {"loss": loss.detach(), "least": float(y.min())}

    return Stepping


def run(drawn):
    """A function of a distribution that runs what was drawn."""
    x, y = normal(drawn.rows, FEATURES), normal(drawn.rows, CLASSES, seed=4)
    weights = np.linspace(0.5, 1.5, drawn.rows) if drawn.weighted else None

    def make_model():
        inputs = keras.Input((FEATURES,))
        z = layers.Dense(UNITS, "tanh", name="up")(inputs)
        for lines in drawn.blocks:
            z = Block(lines)(z)
        z = layers.Dense(CLASSES, name="out")(z)
        model = model_of(drawn.step)(inputs, z)
        metrics = [metric_of(*drawn.metric), "mae"]
        return compiled(model, loss_of(*drawn.loss), metrics=metrics)

    def said(model):
        arguments = {"batch_size": drawn.batch, "verbose": 0}
        history = model.fit(
            x, y, shuffle=False, sample_weight=weights, **arguments
        )
        return (
            history.history,
            model.evaluate(x, y, return_dict=True, **arguments),
            model.predict(x, **arguments),
        )

    def program(distribution=None):
        return parity.run_here(said, make_model, distribution)

    return program


def lines(names, least=0):
    number = strategies.integers(0, 6)
    line = strategies.tuples(
        strategies.sampled_from(sorted(names)), number, number
    )
    return strategies.lists(line, min_size=least, max_size=6).map(tuple)


# How Keras trains is drawn as often as all other steps.
EACH_STEP = ["keras"] * 5 + ["super"] * 2 + sorted(STEPS)


@strategies.composite
def programs(draw):
    rows = draw(strategies.integers(1, 40))
    every = set(grammar.LINES)
    without_layers = every - set(grammar.OF_LAYERS)
    step = draw(strategies.sampled_from(EACH_STEP))
    if step == "of_gradient":
        # torch's attention is not differentiated twice.
        every.discard("call attention")
    return Program(
        rows=rows,
        batch=draw(strategies.integers(-(-rows // 3), rows + 2)),
        blocks=tuple(
            draw(strategies.lists(lines(every, 1), min_size=0, max_size=2))
        ),
        loss=(
            draw(strategies.sampled_from(["number", "rows", "by a size"])),
            draw(lines(without_layers)),
        ),
        metric=(
            draw(strategies.sampled_from(["number", "rows", "list"])),
            draw(lines(without_layers)),
        ),
        step=step,
        weighted=draw(strategies.booleans()),
    )
