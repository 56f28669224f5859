"""Losses of Keras's functions, of transforms, and subclasses of `Loss`."""

import torch
import torch.utils.checkpoint

import keras
from integration_tests.user_code.running import note
from integration_tests.user_code.running import squares
from keras import losses
from keras import ops
from keras.src.losses.losses import LossFunctionWrapper


def rows_of(y, p):
    return ops.mean(squares(y, p), axis=-1)


def whiled(y, p):
    def cond(i, total):
        return i < ops.shape(y)[0]

    def body(i, total):
        return i + 1, total + ops.sum(squares(y[i], p[i]))

    return ops.while_loop(cond, body, (0, 0.0))[1] / len(y)


def scanned(y, p):
    def step(carry, row):
        carry = 0.5 * carry + row
        return carry, carry

    carry, all_of_them = ops.scan(step, ops.zeros(3), y - p)
    return ops.mean(ops.square(all_of_them)) + ops.mean(ops.square(carry))


def fori(y, p):
    return (
        ops.fori_loop(
            0, len(y), lambda i, s: s + ops.sum(squares(y[i], p[i])), 0.0
        )
        / 9
    )


def associative(y, p):
    return ops.mean(ops.associative_scan(lambda a, b: a * 0.5 + b, y - p) ** 2)


def conditioned(y, p):
    return ops.cond(
        ops.mean(y) > 0.0321,
        lambda: ops.mean(squares(y, p)),
        lambda: ops.mean(ops.abs(y - p)),
    )


def gradients_kept(y, p):
    """As gradient penalties have it; without a gradient in `evaluate`."""
    if not p.requires_grad:
        return squares(y, p).mean()
    loss = squares(y, p).mean()
    (gradient,) = torch.autograd.grad(loss, p, create_graph=True)
    return loss + gradient.square().sum()


def gradients_as_weights(y, p):
    if not p.requires_grad:
        return squares(y, p).mean()
    (gradient,) = torch.autograd.grad((p**3).sum(), p, retain_graph=True)
    return (gradient * squares(y, p)).mean()


def hooked(y, p):
    if p.requires_grad:
        p.register_hook(lambda g: g.clamp(-0.05, 0.05))
    return squares(y, p).mean()


def hooked_over_rows(y, p):
    if p.requires_grad:
        p.register_hook(lambda g: g - g.mean(0))
    return squares(y, p).sum() / 9


class Reversed(torch.autograd.Function):
    """The rows the other way round, with twice the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(0)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.flip(0)


class Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / (1 + x.square().sum())

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient / (1 + x.square().sum())


@ops.custom_gradient
def clipped(x):
    def backward(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        return ops.clip(upstream, -0.05, 0.05)

    return x * 1.0, backward


TRANSFORMS = {
    "vmap": lambda y, p: torch.vmap(lambda a, b: squares(a, b).mean())(
        y, p
    ).mean(),
    "vmap over columns": lambda y, p: torch.vmap(
        lambda a, b: squares(a, b).max(), in_dims=1
    )(y, p).mean(),
    "vmap of pairs": lambda y, p: torch.vmap(
        lambda a: torch.vmap(lambda b: squares(a, b).mean())(y)
    )(p).mean(),
    "vectorized_map": lambda y, p: ops.mean(
        ops.vectorized_map(lambda x: ops.sum(ops.square(x)), y - p)
    ),
    "func.grad": lambda y, p: (
        torch.func.grad(lambda q: (q**3).mean())(p) * squares(y, p)
    ).sum(),
    "jacrev": lambda y, p: (
        torch.func.jacrev(lambda q: (q**3).mean(0))(p).sum((0, 1)) * p
    ).mean(),
    "jvp": lambda y, p: (
        torch.func.jvp(torch.sin, (p,), (y,))[1].square().sum() / 9
    ),
    "map": lambda y, p: ops.mean(ops.map(lambda x: ops.sum(x**2), y - p)),
    "autograd.Function": lambda y, p: squares(y, Reversed.apply(p)).mean(),
    "autograd.Function of all": lambda y, p: squares(
        y, Normalised.apply(p)
    ).mean(),
    "custom_gradient": lambda y, p: squares(y, clipped(p)).mean(),
    "checkpoint": lambda y, p: torch.utils.checkpoint.checkpoint(
        lambda q: squares(y, q).mean(0).prod(), p, use_reentrant=False
    ),
    "detached": lambda y, p: (
        squares(p, p.detach().mean(0)).mean() + squares(y, p).mean()
    ),
    "stop_gradient": lambda y, p: ops.mean(
        ops.stop_gradient(ops.std(p, axis=0)) * squares(y, p)
    ),
    "no_grad": lambda y, p: squares(y, p).mean() * centre_of(p),
    "requires_grad": lambda y, p: (
        squares(y, p).mean() * (2 if p.requires_grad else 1)
    ),
    "autocast": lambda y, p: squares(y, p).to(torch.float64).mean().float(),
}


@torch.no_grad()
def centre_of(p):
    return p.mean().abs()


for function in (
    whiled,
    scanned,
    fori,
    associative,
    conditioned,
    gradients_kept,
    gradients_as_weights,
    hooked,
    hooked_over_rows,
):
    TRANSFORMS[function.__name__] = function

KERAS = {
    "a loss called": lambda y, p: losses.MeanSquaredError()(y, p) ** 0.5,
    "a loss of a sum": lambda y, p: losses.Huber(reduction="sum")(y, p) / 9,
    "a function": lambda y, p: losses.mean_squared_error(y, p),
    "a function over all": lambda y, p: losses.log_cosh(y, p).max(),
    "kl": lambda y, p: losses.KLDivergence()(ops.softmax(y), ops.softmax(p)),
    "weights by hand": lambda y, p: losses.MeanSquaredError()(
        y, p, sample_weight=ops.abs(y[:, 0])
    ),
    "normalised weights": lambda y, p: ops.sum(
        rows_of(y, p) * ops.abs(y[:, 0]) / ops.sum(ops.abs(y[:, 0]))
    ),
    "on halves": lambda y, p: losses.MeanSquaredError()(
        y[: len(y) // 2 + 1], p[: len(y) // 2 + 1]
    ),
    "of pairs": lambda y, p: losses.MeanSquaredError()(
        y[:, None] * ops.ones((1, len(y), 1)),
        p[None] * ops.ones((len(y), 1, 1)),
    ),
    "of a constant": lambda y, p: losses.MeanSquaredError()(
        ops.zeros((3, 3)), p.T @ y / len(y)
    ),
    "cross entropy of pairs": lambda y, p: losses.CategoricalCrossentropy(
        from_logits=True
    )(ops.eye(len(y)), ops.matmul(p, ops.transpose(y))),
    "segment_sum": lambda y, p: ops.mean(
        ops.square(
            ops.segment_sum(y - p, ops.cast(y[:, 0] > 0, "int32"), 2) / len(y)
        )
    ),
    "slice_update": lambda y, p: ops.mean(
        squares(y, ops.slice_update(p, (0, 1), ops.ones((1, 2))))
    ),
    "scatter_update": lambda y, p: ops.mean(
        squares(y, ops.scatter_update(p, [[0]], ops.ones((1, 3))))
    ),
    "one_hot": lambda y, p: ops.mean(
        ops.one_hot(ops.argmax(p, axis=0), len(y)).sum(0) * rows_of(y, p)
    ),
    "correlate": lambda y, p: (
        ops.mean(
            ops.square(ops.correlate(y[:, 0] - p[:, 0], ops.tanh(p[:, 1])))
        )
        / len(y)
    ),
    "digitize": lambda y, p: ops.mean(
        (1.0 + ops.digitize(y, [-0.5, 0.5])) * squares(y, p)
    ),
    "average": lambda y, p: ops.average(
        rows_of(y, p), weights=1 + ops.abs(y[:, 0])
    ),
    "logsumexp": lambda y, p: ops.logsumexp(rows_of(y, p)),
    "normalize": lambda y, p: ops.mean(
        squares(ops.normalize(y, axis=0), ops.normalize(p, axis=0))
    ),
    "broadcast_to": lambda y, p: ops.mean(
        squares(ops.broadcast_to(ops.mean(y, axis=0), ops.shape(p)), p)
    ),
    "repeat": lambda y, p: ops.mean(squares(ops.repeat(y, 2, 0)[: len(y)], p)),
    "pad": lambda y, p: ops.sum(ops.pad(squares(y, p), [[1, 1], [0, 0]])) / 9,
}


class Rows(losses.Loss):
    def call(self, y_true, y_pred):
        return rows_of(y_true, y_pred)


class Number(losses.Loss):
    def call(self, y_true, y_pred):
        return ops.sqrt(ops.mean(squares(y_true, y_pred)))


class Contrast(losses.Loss):
    def call(self, y_true, y_pred):
        similar = ops.matmul(y_pred, ops.transpose(y_true))
        return ops.logsumexp(similar, axis=1) - ops.diagonal(similar)


class OwnCall(losses.Loss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        n = ops.shape(y_true)[0]
        if sample_weight is None:
            sample_weight = ops.ones((n,))
        return ops.sum(rows_of(y_true, y_pred) * sample_weight) / n


class AroundCall(losses.Loss):
    def call(self, y_true, y_pred):
        return rows_of(y_true, y_pred)

    def __call__(self, y_true, y_pred, sample_weight=None):
        return ops.sqrt(super().__call__(y_true, y_pred, sample_weight))


class Counting(Number):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, y_true, y_pred):
        self.calls += 1
        note(self.calls)
        return super().call(y_true, y_pred) / self.calls


class Remembering(Number):
    """The mean of the targets over all batches so far, in a Python number."""

    def __init__(self):
        super().__init__()
        self.mean = 0.0

    def call(self, y_true, y_pred):
        self.mean = 0.5 * self.mean + float(ops.mean(y_true))
        return ops.mean(ops.square(y_pred - self.mean))


class Queue(losses.Loss):
    """The rows of the last batch count as well."""

    def __init__(self):
        super().__init__()
        self.last = None

    def call(self, y_true, y_pred):
        others = y_pred.detach() if self.last is None else self.last
        if y_pred.device.type != "meta":
            self.last = y_pred.detach()
        return ops.mean(squares(y_pred[:, None], others[None]), axis=(1, 2))


class OfVariable(losses.Loss):
    def __init__(self):
        super().__init__()
        self.centre = keras.Variable(ops.zeros((3,)), trainable=False)

    def call(self, y_true, y_pred):
        self.centre.assign(0.9 * self.centre + 0.1 * ops.mean(y_true, axis=0))
        return ops.mean(squares(self.centre, y_pred), axis=-1)


class OfKeras(losses.MeanSquaredError):
    """Changes what goes into one of Keras's."""

    def call(self, y_true, y_pred):
        return super().call(y_true - ops.mean(y_true, axis=0), y_pred)


def wrapped(function, reduction):
    return lambda: LossFunctionWrapper(function, reduction)


OBJECTS = {
    cls.__name__: cls
    for cls in (
        Rows,
        Number,
        Contrast,
        OwnCall,
        AroundCall,
        Counting,
        Remembering,
        Queue,
        OfVariable,
        OfKeras,
    )
}
REDUCTIONS = (
    "sum_over_batch_size",
    "mean",
    "mean_with_sample_weight",
    "sum",
    "none",
)
for name in REDUCTIONS:
    OBJECTS[f"rows, {name}"] = wrapped(rows_of, name)
    OBJECTS[f"number, {name}"] = wrapped(
        lambda y, p: ops.sqrt(ops.sum(squares(y, p))) / 9, name
    )
# Without weights.
ALONE = dict(OBJECTS) | {
    f"entries, {name}": wrapped(squares, name) for name in REDUCTIONS
}
