"""What a layer of one's own does to its input, `(rows, UNITS)`.

A function is handed the layer, which has a weight `scale`, a state of as many
entries and a Python counter `calls`.
"""

import numpy as np
import torch
import torch.nn.functional as F

import keras
from integration_tests.user_code.losses_of_keras import Normalised
from integration_tests.user_code.losses_of_keras import Reversed
from integration_tests.user_code.losses_of_keras import clipped
from integration_tests.user_code.running import note
from keras import ops

STATISTICS = {
    "centred": lambda layer, x: x - ops.mean(x, axis=0),
    "standardised": lambda layer, x: (
        (x - x.mean(0)) / torch.sqrt(0.1 + x.var(0, correction=0))
    ),
    "by the largest": lambda layer, x: x / (0.1 + ops.max(ops.abs(x))),
    "by the norm": lambda layer, x: x / (0.1 + torch.norm(x)),
    "by a size": lambda layer, x: x * len(x) / 10,
    "by ops.shape": lambda layer, x: x / ops.shape(x)[0],
    "softmax over rows": lambda layer, x: ops.softmax(x, axis=0),
    "mean of all": lambda layer, x: x + ops.mean(x),
    "mean of a row": lambda layer, x: x + ops.mean(x, axis=-1, keepdims=True),
    "only the mean": lambda layer, x: x.mean(0, keepdim=True).expand(x.shape),
    "ops.var": lambda layer, x: x / ops.sqrt(0.1 + ops.var(x, axis=0)),
    "ops.moments": lambda layer, x: x - ops.moments(x, axes=[0, 1])[0],
    "median": lambda layer, x: x - x.median(0).values,
    "quantile": lambda layer, x: x - torch.quantile(x, 0.7, dim=0),
    "batch_norm": lambda layer, x: F.batch_norm(
        torch.cat([x, -2 * x + 1]), None, None, training=True
    )[: len(x)],
    "whitened": lambda layer, x: (
        torch.linalg.solve(torch.eye(6) + x.T @ x / len(x), x.T).T
    ),
    "largest row": lambda layer, x: x + x[x[:, 0].argmax()],
    "logsumexp": lambda layer, x: x - ops.logsumexp(x, axis=0),
    "bfloat": lambda layer, x: x - x.double().mean(0).float(),
}
MIXES = {
    "cumulated": lambda layer, x: ops.cumsum(x, axis=0) / len(x),
    "sorted": lambda layer, x: ops.sort(x, axis=0),
    "flipped": lambda layer, x: ops.flip(x, axis=0),
    "rolled": lambda layer, x: x + ops.roll(x, 1, axis=0),
    "shifted": lambda layer, x: torch.cat([torch.zeros(1, 6), x[:-1]]) + x,
    "halves swapped": lambda layer, x: torch.cat(
        [x[len(x) // 2 :], x[: len(x) // 2]]
    ),
    "every other row": lambda layer, x: torch.cat([x[::2], x[1::2]]),
    "repeated": lambda layer, x: x.repeat_interleave(2, 0)[: len(x)],
    "gram": lambda layer, x: x + ops.matmul(ops.matmul(x, x.T), x) / 9,
    "attention": lambda layer, x: (
        x + ops.matmul(ops.softmax(ops.matmul(x, ops.transpose(x))), x)
    ),
    "torch's attention": lambda layer, x: (
        x + F.scaled_dot_product_attention(x[None], x[None], x[None])[0]
    ),
    "einsum": lambda layer, x: (
        x + torch.einsum("bi,ci,cj->bj", x, x, x) / len(x)
    ),
    "covariance": lambda layer, x: x @ (x.T @ x) / len(x),
    "distances": lambda layer, x: (
        x + torch.cdist(x, x + 0.1).mean(1, keepdim=True)
    ),
    "neighbours": lambda layer, x: x[
        torch.cdist(x, x + 0.1).topk(min(2, len(x))).indices
    ].mean(1),
    "transposed": lambda layer, x: x.T.contiguous().view(-1, 6),
    "turned": lambda layer, x: x.reshape(6, -1).T,
    "as one image": lambda layer, x: F.avg_pool2d(
        x[None, None], 3, 1, padding=1
    )[0, 0],
    "along rows": lambda layer, x: (
        F.conv1d(x.T[None], torch.ones(6, 6, 3) / 9, padding=1)[0].T
    ),
    "positions": lambda layer, x: (
        x + ops.cast(ops.arange(len(x)), "float32")[:, None] / 9
    ),
    "weights of positions": lambda layer, x: (
        x * torch.linspace(0.5, 1.5, len(x))[:, None]
    ),
    "permuted": lambda layer, x: x[torch.randperm(len(x))],
    "mixup": lambda layer, x: 0.7 * x + 0.3 * x[torch.randperm(len(x))],
    "graph": lambda layer, x: (
        (torch.ones(len(x), len(x)).tril() / len(x)) @ x + x
    ),
    "pairs in the row": lambda layer, x: torch.einsum(
        "bi,bj->bij", x, x
    ).reshape(len(x), -1)[:, :6],
    "padded": lambda layer, x: F.pad(x, (0, 0, 1, 0))[:-1] + x,
    "last row": lambda layer, x: x + x[-1],
    "first rows": lambda layer, x: x + x[: (len(x) + 1) // 2].mean(0),
    "vmap": lambda layer, x: torch.vmap(torch.tanh)(x) * layer.scale,
    "vectorized_map": lambda layer, x: ops.vectorized_map(
        lambda row: row - ops.mean(row), x
    ),
    "func.grad": lambda layer, x: (
        torch.func.grad(lambda z: (z**3).mean() + z.mean(0).prod())(x) * len(x)
    ),
    "autograd.Function": lambda layer, x: Reversed.apply(x),
    "autograd.Function of all": lambda layer, x: Normalised.apply(x),
    "custom_gradient": lambda layer, x: clipped(x),
    "scan": lambda layer, x: ops.scan(
        lambda carry, row: (carry * 0.5 + row, carry), ops.zeros(6), x
    )[1],
    "map": lambda layer, x: ops.map(lambda row: row - ops.max(row), x),
}


def over_rows(layer, x):
    rows, state = [], torch.zeros(6)
    for row in x:
        state = torch.tanh(0.5 * state + row)
        rows.append(state)
    return torch.stack(rows)


def over_sizes(layer, x):
    result = torch.zeros_like(x)
    for i in range(x.shape[0]):
        result[i] = x[i] * (i + 1) / len(x)
    return result


def if_large(layer, x):
    return x * 2 if float(ops.max(ops.abs(x))) > 0.87654 else x


def while_large(layer, x):
    while x.abs().mean() > 0.31234:
        x = x * 0.7
    return x


def rescaled(layer, x):
    return x / (1 + x.detach().abs().mean().item())


def by_numpy(layer, x):
    order = np.argsort(x.detach().cpu().numpy().sum(1))
    return x[torch.as_tensor(order.copy())]


def assigned(layer, x):
    y = x.clone()
    y[0] = 0.5
    y[:, 1] = y[:, 2]
    y[y > 0.6] = 0.6
    return y


def masked_rows(layer, x):
    keep = x[:, 0] > 0.0321
    result = torch.zeros_like(x)
    result[keep] = x[keep] - x[keep].mean(0) if keep.any() else x[keep]
    return result + 0.1 * x


def scattered(layer, x):
    groups = (x[:, 0] > 0.0321).long()
    sums = torch.zeros(2, 6).index_add(0, groups, x)
    return x - sums[groups] / len(x)


def top_rows(layer, x):
    values, indices = torch.topk(x.sum(1), (len(x) + 1) // 2)
    return x.index_add(0, indices, x[indices] * values[:, None].sigmoid())


def routed(layer, x):
    """Each of two experts takes no more rows than its capacity."""
    gates = ops.softmax(x[:, :2])
    taken = ops.one_hot(ops.argmax(gates, axis=-1), 2)
    position = ops.cumsum(taken, axis=0) * taken
    kept = taken * ops.cast(position <= len(x) * 0.6, "float32")
    layer.add_loss(0.1 * ops.sum(ops.mean(gates, 0) * ops.mean(taken, 0)))
    return x * ops.sum(kept * gates, axis=-1, keepdims=True) + 0.1 * x


VALUES = {
    function.__name__: function
    for function in (
        over_rows,
        over_sizes,
        if_large,
        while_large,
        rescaled,
        by_numpy,
        assigned,
        masked_rows,
        scattered,
        top_rows,
        routed,
    )
}


def penalised(layer, x):
    layer.add_loss(0.1 * ops.sum(ops.square(x)) / ops.shape(x)[0])
    layer.add_loss(0.1 * ops.mean(ops.exp(x)))
    layer.add_loss(0.1 * ops.sum(ops.square(layer.scale)))
    return x


def penalised_rows(layer, x):
    layer.add_loss(0.1 * ops.std(ops.mean(x, axis=1)))
    return x


def counted(layer, x):
    note(layer.calls)
    note(x.shape[0])
    return x * (1 + 0.1 * layer.calls)


def averaged(layer, x):
    layer.state.assign(0.9 * layer.state + 0.1 * ops.mean(x, axis=0))
    return x - layer.state


def summed(layer, x):
    layer.state.assign_add(ops.sum(x, axis=0))
    return x + 0.01 * layer.state


def largest_seen(layer, x):
    layer.state.assign(ops.maximum(layer.state, ops.max(x, axis=0)))
    return x - layer.state


def last_row(layer, x):
    before = ops.copy(ops.convert_to_tensor(layer.state))
    layer.state.assign(x[-1])
    return x + before


def state_of_python(layer, x):
    layer.mean = 0.5 * getattr(layer, "mean", 0.0) + float(x.mean())
    return x + layer.mean


def queue_of_python(layer, x):
    queue = getattr(layer, "queue", [])
    if x.device.type != "meta":
        layer.queue = [*queue, x.detach()][-2:]
        queue = layer.queue
    return x - torch.cat(queue).mean(0) if queue else x


def counts_rows(layer, x):
    layer.rows = getattr(layer, "rows", 0) + len(x)
    note(layer.rows)
    return x / layer.rows


def assigns_weight(layer, x):
    """Which autograd does not allow."""
    layer.scale.assign(layer.scale / ops.norm(layer.scale))
    return x * ops.sum(layer.scale)


def assigns_from_weight(layer, x):
    layer.state.assign(layer.scale / ops.norm(layer.scale))
    return x * ops.sum(layer.state)


def reads_weight(layer, x):
    return x * float(ops.norm(layer.scale)) / ops.max(layer.scale)


def uneven(layer, x):
    """Other code for each batch size."""
    return x * 2 if len(x) % 2 else x - x.mean(0)


STATE = {
    function.__name__: function
    for function in (
        penalised,
        penalised_rows,
        counted,
        averaged,
        summed,
        largest_seen,
        last_row,
        state_of_python,
        queue_of_python,
        counts_rows,
        assigns_weight,
        assigns_from_weight,
        reads_weight,
        uneven,
    )
}


RANDOM = {
    "randn": lambda layer, x: x + 0.1 * torch.randn(x.shape),
    "randn_like": lambda layer, x: x + 0.1 * torch.randn_like(x),
    "a number a row": lambda layer, x: x * torch.rand(len(x), 1),
    "keras.random": lambda layer, x: (
        x + 0.1 * keras.random.normal(ops.shape(x), seed=3)
    ),
    "SeedGenerator": lambda layer, x: (
        x + 0.1 * keras.random.normal(ops.shape(x), seed=layer.seeds)
    ),
    "keras dropout": lambda layer, x: keras.random.dropout(
        x, 0.4, seed=layer.seeds
    ),
    "keras shuffle": lambda layer, x: (
        x + keras.random.shuffle(x, seed=layer.seeds)
    ),
    "one draw for all": lambda layer, x: x + torch.randn(6) * 0.1,
    "F.dropout": lambda layer, x: F.dropout(x, 0.4),
    "noise in place": lambda layer, x: x + torch.empty_like(x).uniform_(0, 0.2),
    "numpy": lambda layer, x: (
        x * torch.as_tensor(np.random.rand(*x.shape), dtype=x.dtype)
    ),
    "stochastic depth": lambda layer, x: (
        x * (torch.rand(len(x), 1) > 0.3) if torch.rand(()) > 0.2 else x
    ),
    "a generator of torch": lambda layer, x: (
        x + 0.1 * torch.randn(x.shape, generator=torch.Generator())
    ),
}
