"""Lines of user code that hypothesis puts together: `(name, a, b)`.

Each takes and gives a tensor of any shape, and keeps its numbers near 1. No
line jumps where rounding decides: values are compared with numbers that they
have no reason to be, and what is normalised is kept from zero.
"""

import numpy as np
import torch
import torch.nn.functional as F

import keras
from integration_tests.user_code.running import UNITS
from keras import ops

# As many numbers as a line may make.
LARGEST = 3000


class Code:
    """Lines, and what they keep from one to the next and from call to call.

    Args:
        lines: tuple of `(name, a, b)`.
        layer: the layer that they are of, if they are a layer's.
    """

    def __init__(self, lines, layer=None):
        self.lines, self.layer = lines, layer
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        z = self.kept = x
        for name, a, b in self.lines:
            made = (
                LINES[name](self, z, a, b)
                if z.ndim
                else POINTS.get(name, same)(self, z, a, b)
            )
            if 0 < made.numel() <= LARGEST:
                z = made
        return z


def same(code, z, a, b):
    return z


def threshold(a):
    return 0.1234567 + 0.1 * a


def some(z, d):
    """Seven of ten entries of a dim, at least one."""
    return max(1, int(0.7 * z.shape[d]))


def along(function):
    """A line that goes along a dim, counted from either end."""

    def line(code, z, a, b):
        d = a % z.ndim
        return function(z, d - z.ndim if b % 2 else d, b)

    return line


def with_keepdims(function):
    """A line that reduces a dim, and keeps it or does not."""

    def line(code, z, a, b):
        return function(z, a % z.ndim, bool(b % 2))

    return line


POINTS = {
    "tanh": lambda code, z, a, b: torch.tanh(z),
    "ops.tanh": lambda code, z, a, b: ops.tanh(z),
    "sin": lambda code, z, a, b: ops.sin(z * (1 + a / 4)),
    "sigmoid": lambda code, z, a, b: z.sigmoid() * 2 - 0.3,
    "scale": lambda code, z, a, b: z * (0.5 + a / 5),
    "shift": lambda code, z, a, b: 0.2 * b - z,
    "square": lambda code, z, a, b: ops.square(z) / (1 + ops.square(z)),
    "where": lambda code, z, a, b: torch.where(z > threshold(a), z, 0.5 * z),
    "double": lambda code, z, a, b: (z.double() * 1.1).float(),
    "in place": lambda code, z, a, b: z.clone().mul_(0.8).add_(0.1),
    "rand": lambda code, z, a, b: z + 0.2 * torch.rand(z.shape),
    "randn_like": lambda code, z, a, b: z + 0.1 * torch.randn_like(z),
    "keras.random": lambda code, z, a, b: (
        z + 0.1 * keras.random.normal(ops.shape(z), seed=a)
    ),
    "numpy.random": lambda code, z, a, b: (
        z + 0.1 * torch.as_tensor(np.random.rand(*z.shape), dtype=z.dtype)
    ),
    "counter": lambda code, z, a, b: z * (1 + 0.1 * code.calls),
    "detached": lambda code, z, a, b: z / (1 + z.detach().square().mean()),
    "item": lambda code, z, a, b: z / (1 + abs(z.mean().item())),
    "if": lambda code, z, a, b: (
        z * 1.2 if float(z.mean()) > threshold(a) else z - 0.1
    ),
    "if any": lambda code, z, a, b: (
        z + 0.2 if (z > threshold(a + 3)).any() else z * 0.9
    ),
    "centre": lambda code, z, a, b: z - ops.mean(z),
    "by the spread": lambda code, z, a, b: z / (0.5 + z.std(correction=0)),
    "by the largest": lambda code, z, a, b: z / (0.3 + ops.max(z * z)),
    "by the norm": lambda code, z, a, b: (
        z / (0.3 + torch.sqrt(0.1 + (z * z).mean()))
    ),
}
REDUCTIONS = {
    "sum": lambda z, d, k: z.sum(d, keepdim=k) / z.shape[d],
    "ops.sum": lambda z, d, k: ops.sum(z, axis=d, keepdims=k) / ops.shape(z)[d],
    "mean": lambda z, d, k: z.mean(dim=d, keepdim=k),
    "ops.mean": lambda z, d, k: ops.mean(z, axis=d, keepdims=k),
    "max": lambda z, d, k: torch.amax(z, d, keepdim=k),
    "min": lambda z, d, k: z.min(dim=d, keepdim=k).values,
    "ops.max": lambda z, d, k: ops.max(z, axis=d, keepdims=k),
    "var": lambda z, d, k: z.var(d, correction=0, keepdim=k),
    "ops.std": lambda z, d, k: ops.sqrt(0.1 + ops.var(z, axis=d, keepdims=k)),
    "logsumexp": lambda z, d, k: (
        torch.logsumexp(z, d, keepdim=k) - np.log(z.shape[d])
    ),
    "root": lambda z, d, k: ((z * z).mean(d, keepdim=k) + 0.1).sqrt(),
    "prod": lambda z, d, k: torch.tanh(1 + z).prod(d, keepdim=k),
    "quantile": lambda z, d, k: torch.quantile(z, 0.37, dim=d, keepdim=k),
    "of all but one": lambda z, d, k: z.mean(
        [i for i in range(z.ndim) if i != d] or [0], keepdim=k
    ),
}
ALONG = {
    "centred": lambda z, d, b: z - z.mean(d, keepdim=True),
    "softmax": lambda z, d, b: z.softmax(d) * z.shape[d] ** 0.5,
    "ops.softmax": lambda z, d, b: ops.softmax(z, axis=d) + 0.1 * z,
    "cumsum": lambda z, d, b: torch.cumsum(z, d) / z.shape[d],
    "ops.cumsum": lambda z, d, b: ops.cumsum(z, axis=d) / z.shape[d],
    "sort": lambda z, d, b: torch.sort(z, dim=d, descending=b > 3).values,
    "flip": lambda z, d, b: z.flip(d),
    "ops.flip": lambda z, d, b: ops.flip(z, axis=d),
    "roll": lambda z, d, b: torch.roll(z, b - 3, d),
    "normalize": lambda z, d, b: (
        z / ((z * z).mean(d, keepdim=True) + 0.1).sqrt()
    ),
    "half": lambda z, d, b: z.narrow(d, 0, (z.shape[d] + 1) // 2),
    "seven of ten": lambda z, d, b: z.narrow(d, 0, some(z, d)),
    "last": lambda z, d, b: z.narrow(d, z.shape[d] - some(z, d), some(z, d)),
    "one": lambda z, d, b: z.select(d, b % z.shape[d]),
    "taken": lambda z, d, b: z.index_select(
        d,
        torch.arange(b % 2, z.shape[d], 2)
        if z.shape[d] > 1
        else (torch.zeros(1, dtype=torch.long)),
    ),
    "ends": lambda z, d, b: ops.take(z, [0, z.shape[d] - 1], axis=d),
    "chunk": lambda z, d, b: z.chunk(2, d)[0],
    "cat": lambda z, d, b: torch.cat([z, 0.5 - z], d),
    "ops.concatenate": lambda z, d, b: ops.concatenate([z, z * z], axis=d),
    "stack": lambda z, d, b: torch.stack([z, 0.3 - z], d),
    "repeat": lambda z, d, b: z.repeat_interleave(2, d),
    "unsqueeze": lambda z, d, b: z.unsqueeze(d),
    "permuted": lambda z, d, b: z.index_select(d, torch.randperm(z.shape[d])),
    "positions": lambda z, d, b: (
        z.movedim(d, -1) * (torch.arange(z.shape[d]) / z.shape[d])
    ).movedim(-1, d),
    "weighted": lambda z, d, b: (
        (z.movedim(d, -1) * torch.linspace(0.5, 1, z.shape[d])).sum(-1)
        / z.shape[d]
    ),
}


def looped(code, z, a, b):
    """State that goes over the entries of the first dim."""
    states = [torch.tanh(z[0])]
    for entry in z[1:]:
        states.append(torch.tanh(0.5 * states[-1] + entry))
    return torch.stack(states)


def summed(code, z, a, b):
    total = 0.0
    for i in range(z.shape[0]):
        total = total + z[i] * (i + 1) / z.shape[0]
    return total / z.shape[0]


def halved(code, z, a, b):
    for _ in range(9):
        if float(ops.max(z)) < threshold(3):
            break
        z = z * 0.6
    return z


def masked(code, z, a, b):
    mask = z > threshold(a)
    return z[mask] if mask.any() else z


def masked_rows(code, z, a, b):
    mask = z.reshape(z.shape[0], -1)[:, 0] > threshold(a)
    return z[mask] if bool(mask.any()) else z


def filled(code, z, a, b):
    y = z.clone()
    y[y > threshold(a)] = 0.2
    y[0] = 0.1 * b
    return y


def counted(code, z, a, b):
    return z * (0.5 + int((z > threshold(a)).sum()) / z.numel())


def sliced(code, z, a, b):
    return [z[: (len(z) + 1) // 2], z[::2], z[:3], z[..., :2], z[-1:]][a % 5]


def reshaped(code, z, a, b):
    if a % 3 == 0:
        return z.reshape(-1)
    if a % 3 == 1:
        return ops.reshape(z, (-1, z.shape[-1]))
    return z.reshape(1 + b, -1) if z.numel() % (1 + b) == 0 else z.view(-1, 1)


def transposed(code, z, a, b):
    if b % 3 == 0:
        return ops.transpose(z)
    return z.transpose(a % z.ndim, b % z.ndim)


def gram(code, z, a, b):
    if z.ndim < 2 or z.shape[-2] * z.numel() > 100 * LARGEST:
        return z
    other = z if a % 2 else ops.tanh(z).flip(-2)
    if b % 2:
        return torch.tanh(torch.matmul(z, other.mT) / z.shape[-1])
    return torch.tanh(torch.matmul(z.mT, other) / z.shape[-2])


def einsum(code, z, a, b):
    if z.ndim != 2:
        return z
    form = ["bi,bj->ij", "bi,ci->bc", "bi,bi->b", "bi,bi->i", "bi,cj->bj"]
    y = torch.einsum(form[a % 5], z, torch.sin(z))
    return torch.tanh(y / max(z.shape))


def pairs(code, z, a, b):
    if z.shape[0] * z.numel() > LARGEST:
        return z
    return ops.square(z[:, None] - z[None]) / (1 + ops.square(z[None]))


def keep(code, z, a, b):
    code.kept = z
    return z


def join(code, z, a, b):
    """With what was kept, as far as the shapes allow it."""
    try:
        torch.broadcast_shapes(z.shape, code.kept.shape)
    except RuntimeError:
        return z + ops.mean(code.kept)
    return z * code.kept if a % 2 else 0.5 * (z - code.kept)


LINES = (
    POINTS
    | {k: with_keepdims(f) for k, f in REDUCTIONS.items()}
    | {k: along(f) for k, f in ALONG.items()}
    | {
        f.__name__: f
        for f in (
            looped,
            summed,
            halved,
            masked,
            masked_rows,
            filled,
            counted,
            sliced,
            reshaped,
            transposed,
            gram,
            einsum,
            pairs,
            keep,
            join,
        )
    }
    | {
        "dropout": lambda code, z, a, b: F.dropout(z, 0.3),
        "vmap": lambda code, z, a, b: torch.vmap(torch.tanh)(z),
        "checked": lambda code, z, a, b: z * (1 if z.shape[0] % 2 else 0.9),
    }
)


def of_state(code, z, a, b):
    state = code.layer.state
    state.assign(0.5 * state + 0.1 * ops.mean(z))
    return z + ops.mean(state)


def of_columns(code, z, a, b):
    state = code.layer.state
    if z.shape[-1] == UNITS:
        means = z.detach().reshape(-1, UNITS).mean(0)
        state.assign(0.9 * state + 0.1 * means)
        return z - state
    return z * (1 + ops.max(state))


def of_weight(code, z, a, b):
    scale = code.layer.scale
    return z * scale if z.shape[-1] == UNITS else z * ops.mean(scale)


def of_read_weight(code, z, a, b):
    return z * float(ops.norm(code.layer.scale)) / UNITS**0.5


def of_loss(code, z, a, b):
    code.layer.add_loss(0.1 * ops.mean(ops.square(z)) + 0.1 * ops.tanh(z).max())
    return z


def calling(name):
    """A line that calls a known layer, where the shape allows it."""

    def line(code, z, a, b):
        layer = code.layer.known[name]
        if z.shape[-1] != UNITS or z.ndim not in (2, 3):
            return z
        if name in ("dense", "norm", "batch_norm"):
            return layer(z)
        sequence = z if z.ndim == 3 else z[None]
        if name == "attention":
            y = layer(sequence, sequence)
        else:
            y = layer(sequence)
        return y if z.ndim == 3 else y[0]

    return line


KNOWN = {
    "dense": lambda: keras.layers.Dense(UNITS, "tanh", name="inner"),
    "norm": lambda: keras.layers.LayerNormalization(epsilon=0.1),
    "batch_norm": lambda: keras.layers.BatchNormalization(epsilon=0.1),
    "attention": lambda: keras.layers.MultiHeadAttention(2, 3),
    "gru": lambda: keras.layers.GRU(UNITS, return_sequences=True),
    "conv": lambda: keras.layers.Conv1D(UNITS, 3, padding="same"),
}
OF_LAYERS = {
    f.__name__: f
    for f in (of_state, of_columns, of_weight, of_read_weight, of_loss)
} | {f"call {name}": calling(name) for name in KNOWN}
LINES |= OF_LAYERS
