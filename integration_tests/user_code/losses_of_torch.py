"""Losses of torch's functions: of targets `y` and predictions `p`."""

import numpy as np
import torch
import torch.nn.functional as F

from integration_tests.user_code.running import squares


def images(x):
    """The batch as one image of one channel, a row a line."""
    return x[None, None]


def steps(x):
    """The batch as one sequence: a column a channel, a row a step."""
    return x.T[None]


def ctc(y, p):
    """One alignment along the rows."""
    log_probabilities = F.log_softmax(p, dim=-1)[:, None]
    lengths = torch.tensor([len(p)])
    return F.ctc_loss(
        log_probabilities, torch.tensor([[1]]), lengths, torch.tensor([1])
    )


def weighted_nll(y, p):
    return F.nll_loss(
        F.log_softmax(p, -1), y.argmax(-1), torch.tensor([1.0, 2.0, 0.5])
    )


def ignoring(y, p):
    return F.cross_entropy(p, y.argmax(-1), ignore_index=1, reduction="sum") / (
        len(y)
    )


def margins(y, p):
    target = torch.sign(y[:, 0])
    return F.margin_ranking_loss(p[:, 0], p[:, 1], target, 0.3)


def embedding_cosine(y, p):
    return F.cosine_embedding_loss(p, y, torch.sign(y[:, 0]), 0.1)


LOSSES = {
    name: getattr(F, name) for name in ("mse_loss", "l1_loss", "huber_loss")
} | {
    "smooth_l1": lambda y, p: F.smooth_l1_loss(p, y, beta=0.3),
    "sum of mse": lambda y, p: F.mse_loss(p, y, reduction="sum") / 9,
    "none of mse": lambda y, p: F.mse_loss(p, y, reduction="none"),
    "deprecated arguments": lambda y, p: F.mse_loss(p, y, None, None, "mean"),
    "weighted mse": lambda y, p: F.mse_loss(p, y, weight=y.abs()),
    "module": lambda y, p: torch.nn.MSELoss()(p, y),
    "soft labels": lambda y, p: F.cross_entropy(p, y.softmax(-1)),
    "smoothed labels": lambda y, p: F.cross_entropy(
        p, y.argmax(-1), label_smoothing=0.1
    ),
    "bce": lambda y, p: F.binary_cross_entropy(p.sigmoid(), y.sigmoid()),
    "bce with logits": lambda y, p: F.binary_cross_entropy_with_logits(
        p, (y > 0).float(), pos_weight=(y > 0).sum(0) / len(y) + 0.1
    ),
    "kl_div of the batch": lambda y, p: F.kl_div(
        p.log_softmax(-1), y.softmax(-1), reduction="batchmean"
    ),
    "kl_div": lambda y, p: (
        F.kl_div(
            p.log_softmax(-1),
            y.log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        / len(y)
    ),
    "cosine similarity": lambda y, p: -F.cosine_similarity(p, y).mean(),
    "cosine similarity over rows": lambda y, p: (
        -F.cosine_similarity(p, y, dim=0).mean()
    ),
    "cosine similarity of pairs": lambda y, p: (
        F.cosine_similarity(p[:, None], y[None], dim=-1).square().mean()
    ),
    "triplets": lambda y, p: F.triplet_margin_loss(p, y, p.flip(0)),
    "pdist": lambda y, p: (
        F.pdist(p).square().sum() / len(y) ** 2 + squares(y, p).mean()
    ),
    "pairwise distance": lambda y, p: F.pairwise_distance(p, y).mean(),
    "poisson": lambda y, p: F.poisson_nll_loss(p, y.abs()),
    "gaussian": lambda y, p: F.gaussian_nll_loss(
        p, y, F.softplus(p[:, :1]) + 0.1
    ),
    "soft margin": lambda y, p: F.soft_margin_loss(p, torch.sign(y)),
    "multilabel": lambda y, p: F.multilabel_soft_margin_loss(
        p, (y > 0).float()
    ),
    "multi margin": lambda y, p: F.multi_margin_loss(p, y.argmax(-1)),
    "hinge embedding": lambda y, p: F.hinge_embedding_loss(p, torch.sign(y)),
}
for function in (ctc, weighted_nll, ignoring, margins, embedding_cosine):
    LOSSES[function.__name__] = function

CLASSES = {
    "cross entropy": lambda y, p: F.cross_entropy(p, y[:, 0].long()),
    "sum of a cross entropy": lambda y, p: (
        F.cross_entropy(p, y[:, 0].long(), reduction="sum") / len(y)
    ),
    "balanced": lambda y, p: F.cross_entropy(
        p,
        y[:, 0].long(),
        weight=1 / (1.0 + torch.bincount(y[:, 0].long(), minlength=3)),
    ),
    "picked": lambda y, p: (
        -p.log_softmax(-1)[torch.arange(len(y)), y[:, 0].long()].mean()
    ),
    "gathered": lambda y, p: -p.log_softmax(-1).gather(1, y.long()).mean(),
    "one_hot": lambda y, p: (
        -(F.one_hot(y[:, 0].long(), 3) * p.log_softmax(-1)).sum(-1).mean()
    ),
    "of a class": lambda y, p: p[y[:, 0] == 1].square().sum() / len(y),
    "looked up": lambda y, p: squares(torch.eye(3)[y[:, 0].long()], p).mean(),
    "embedding": lambda y, p: squares(
        F.embedding(y[:, 0].long(), torch.eye(3)), p
    ).mean(),
    "same class": lambda y, p: (
        (y == y.T).float() * torch.cdist(p, p + 0.1)
    ).mean(),
    "means of classes": lambda y, p: (
        torch.zeros(3, 3).index_add(0, y[:, 0].long(), p).square().mean()
    ),
}
FUNCTIONS = {
    "pad": lambda y, p: F.pad(squares(y, p), (0, 0, 1, 2), value=0.5).mean(),
    "pad of columns": lambda y, p: F.pad(squares(y, p), (1, 0)).mean(),
    "reflection": lambda y, p: F.pad(
        steps(squares(y, p)), (1, 1), mode="replicate"
    ).mean(),
    "interpolate": lambda y, p: (
        F.interpolate(steps(p - y), size=5, mode="linear").square().mean()
    ),
    "unfold of images": lambda y, p: (
        F.unfold(images(p - y), (1, 2)).square().mean()
    ),
    "conv over rows": lambda y, p: (
        F.conv1d(steps(p - y), torch.ones(2, 3, 1) / 3).square().mean()
    ),
    "conv over rows, padded": lambda y, p: (
        F.conv1d(steps(p - y), torch.ones(2, 3, 3) / 9, padding=1)
        .square()
        .mean()
    ),
    "max_pool over rows": lambda y, p: (
        F.max_pool1d(steps(p - y), 2, ceil_mode=True, padding=1).square().mean()
    ),
    "avg_pool over rows": lambda y, p: (
        F.adaptive_avg_pool1d(steps(p - y), 2).square().mean()
    ),
    "layer_norm of all": lambda y, p: squares(
        F.layer_norm(p, p.shape), y
    ).mean(),
    "layer_norm of rows": lambda y, p: squares(F.layer_norm(p, (3,)), y).mean(),
    "batch_norm": lambda y, p: squares(
        F.batch_norm(
            torch.cat([p, y]), torch.zeros(3), torch.ones(3), training=True
        )[: len(p)],
        y,
    ).mean(),
    "instance_norm": lambda y, p: squares(
        F.instance_norm(steps(torch.cat([p, y]))), 0.3
    ).mean(),
    "group_norm": lambda y, p: squares(
        F.group_norm(p[:, :, None], 1)[..., 0], y
    ).mean(),
    "normalize": lambda y, p: squares(F.normalize(p), y).mean(),
    "normalize over rows": lambda y, p: squares(
        F.normalize(p, dim=0), y
    ).mean(),
    "attention of rows": lambda y, p: squares(
        F.scaled_dot_product_attention(p[None], y[None], y[None]), y
    ).mean(),
    "linear by rows": lambda y, p: F.linear(p, y).square().mean() / 3,
    "bilinear": lambda y, p: (
        F.bilinear(p, y, torch.ones(2, 3, 3) / 9).square().mean()
    ),
    "glu over rows": lambda y, p: (
        F.glu(torch.cat([p, y]), dim=0).square().mean()
    ),
    "softmax over rows": lambda y, p: squares(F.softmax(p, 0), y).mean(),
    "softmin": lambda y, p: squares(F.softmin(p, dim=0), y).mean(),
    "dropout": lambda y, p: squares(F.dropout(p, 0.3), y).mean(),
    "pixel_shuffle": lambda y, p: squares(
        F.pixel_shuffle(torch.stack([p, y, y, p])[None], 2), 0.3
    ).mean(),
    "grid of rows": lambda y, p: (
        F.grid_sample(
            images(p), torch.tanh(y[None, :, None, :2]), align_corners=False
        )
        .square()
        .mean()
    ),
}


def assigned(y, p):
    buffer = torch.zeros(len(y), 3)
    buffer[:, 0] = p[:, 1]
    buffer[0] = y[0]
    return squares(buffer, y).mean() + squares(y, p).mean()


def in_place(y, p):
    q = p.clone()
    q[:, 1] *= 2.0
    q[0] = 0.5
    q[y > 0.3] = 0.1
    q[::2] += y[::2]
    q.add_(0.1).mul_(y)
    return q.square().mean()


def views_written(y, p):
    q = p * 1.0
    first, rest = q[:1], q[1:]
    first.zero_()
    rest.sub_(y[1:])
    return q.square().sum() / len(y)


def out_of(y, p):
    total = torch.empty(3)
    torch.sum(y, dim=0, out=total)
    return squares(p, total / len(y)).mean()


def autoregressive(y, p):
    rows = [p[0]]
    for i in range(1, len(p)):
        rows.append(0.5 * rows[-1] + p[i])
    return squares(torch.stack(rows), y).mean()


def empty_first(y, p):
    rows = torch.empty(0, 3)
    for row in p:
        rows = torch.cat([rows, row[None]])
    return squares(rows, y).mean()


def copied(y, p):
    q = torch.empty_like(p)
    q.copy_(p)
    q.data.mul_(1.0)
    return squares(q, y).mean()


def histogram(y, p):
    counts = torch.histc(y, 4, -2.0, 2.0)
    return squares(y, p).mean() * counts.max() / counts.sum()


def frequencies(y, p):
    values, inverse, counts = torch.unique(
        torch.round(y[:, 0]), return_inverse=True, return_counts=True
    )
    return (squares(y, p).mean(1) / counts[inverse]).sum() / len(values)


MOVES = {
    "where": lambda y, p: torch.where(y > 0.2, squares(y, p), p).mean(),
    "where of indices": lambda y, p: (
        squares(y, p)[torch.where(y > 0.2)].sum() / len(y)
    ),
    "masked": lambda y, p: squares(y[y > -9.0], p[y > -9.0]).mean(),
    "masked rows": lambda y, p: (
        squares(y[y[:, 0] > -0.5], p[y[:, 0] > -0.5]).sum() / len(y)
    ),
    "masked_select": lambda y, p: (
        torch.masked_select(squares(y, p), y > 0.1).sum() / len(y)
    ),
    "masked_fill": lambda y, p: squares(y, p).masked_fill(y > 0.5, 0.1).mean(),
    "masked_scatter": lambda y, p: squares(
        y, p.masked_scatter(y > 0.5, torch.ones(y.numel()))
    ).mean(),
    "nonzero": lambda y, p: squares(y, p)[
        torch.nonzero(y[:, 0] > -9)[:, 0]
    ].mean(),
    "argwhere": lambda y, p: (
        squares(y, p).mean() * len(torch.argwhere(y > 0.2)) / len(y)
    ),
    "scatter": lambda y, p: squares(
        torch.zeros_like(p).scatter(1, y.argmax(1, keepdim=True), 1.0), p
    ).mean(),
    "scatter over rows": lambda y, p: squares(
        p.scatter(0, torch.zeros(1, 3, dtype=torch.long), y), 0.1
    ).mean(),
    "scatter_add": lambda y, p: (
        torch.zeros_like(p)
        .scatter_add(0, torch.zeros(p.shape, dtype=torch.long), p - y)
        .square()
        .mean()
        / len(y)
    ),
    "scatter_reduce": lambda y, p: (
        torch.zeros(2, 3)
        .scatter_reduce(0, (y > 0).long(), p - y, "mean")
        .square()
        .mean()
    ),
    "index_select": lambda y, p: (
        squares(y, p).index_select(0, torch.tensor([0, len(y) - 1])).mean()
    ),
    "index_add": lambda y, p: squares(
        p.index_add(0, torch.tensor([0]), y[-1:]), y
    ).mean(),
    "index_fill": lambda y, p: squares(
        p.index_fill(0, torch.tensor([0]), 0.4), y
    ).mean(),
    "gather over rows": lambda y, p: squares(
        p.gather(0, y.argsort(dim=0)), y
    ).mean(),
    "take_along_dim": lambda y, p: squares(
        torch.take_along_dim(p, y.argsort(0), 0), y
    ).mean(),
    "take": lambda y, p: (
        squares(y, p).take(torch.tensor([0, y.numel() - 1])).mean()
    ),
    "put": lambda y, p: squares(
        y.put(torch.tensor([0]), torch.tensor([0.5])), p
    ).mean(),
    "bincount": lambda y, p: (
        (torch.bincount(y.argmax(1), minlength=3) * p.mean(0)).square().mean()
        / len(y)
    ),
    "searchsorted": lambda y, p: (
        (
            torch.searchsorted(y[:, 0].sort().values, y[:, 1].contiguous())
            * squares(y, p).mean(1)
        ).mean()
        / len(y)
    ),
    "bucketize": lambda y, p: (
        (1 + torch.bucketize(y, torch.tensor([-0.5, 0.5]))) * squares(y, p)
    ).mean(),
    "isin": lambda y, p: (torch.isin(y, y[:2]) * squares(y, p)).mean(),
    "cat": lambda y, p: torch.cat([p - y, y]).var(correction=0),
    "stack": lambda y, p: (
        torch.stack([p, y]).var(0, correction=0).mean()
        + torch.stack([p, y], 1).mean(0).square().sum()
    ),
    "hstack": lambda y, p: torch.hstack([p, -y]).sum(1).square().mean(),
    "repeat": lambda y, p: squares(y.repeat(2, 1), p.repeat(2, 1)).sum() / 9,
    "repeat_interleave": lambda y, p: squares(
        y.repeat(2, 1), p.repeat_interleave(2, 0)
    ).mean(),
    "tile": lambda y, p: squares(p.tile(2, 2), y.tile(2, 2)).mean(),
    "expand": lambda y, p: (
        squares(y, p.mean(0).expand(len(y), 3)).mean() + squares(y, p).mean()
    ),
    "meshgrid": lambda y, p: squares(
        *torch.meshgrid(p[:, 0], y[:, 0], indexing="ij")
    ).mean(),
    "flat": lambda y, p: squares(y.reshape(-1), p.flatten())[::2].mean(),
    "other rows": lambda y, p: (
        squares(y.reshape(3, -1), 0.1 + p.view(3, -1)).mean(1).max()
    ),
    "transposed": lambda y, p: ops_mean(squares(y.T, p.permute(1, 0)), -1),
    "movedim": lambda y, p: squares(y, p).movedim(0, 1).mean(1).square().sum(),
    "squeezed": lambda y, p: squares(y[:, :1].squeeze(), p[:, 0]).mean(),
    "unflatten": lambda y, p: (
        squares(y, p).flatten().unflatten(0, (len(y), 3)).mean(0).prod()
    ),
    "atleast_3d": lambda y, p: torch.atleast_3d(squares(y, p)).mean(),
    "block_diag": lambda y, p: torch.block_diag(p, y).square().mean(),
    "nan_to_num": lambda y, p: torch.nan_to_num(
        torch.where(y > 0, squares(y, p), torch.nan), nan=0.1
    ).mean(),
    "addcmul": lambda y, p: torch.addcmul(y, y, p, value=-1.0).square().mean(),
    "lerp": lambda y, p: torch.lerp(y, p, 0.3).square().mean(),
    "clamp by the batch": lambda y, p: squares(
        y, p.clamp(y.amin(0), y.amax(0))
    ).mean(),
    "maximum": lambda y, p: torch.maximum(y, p).square().mean(),
    "rand": lambda y, p: (torch.rand(len(y), 1) * squares(y, p)).mean(),
    "rand_like": lambda y, p: (torch.rand_like(p) * squares(y, p)).mean(),
    "randperm": lambda y, p: squares(y, p[torch.randperm(len(p))]).mean(),
    "multinomial": lambda y, p: squares(y, p)[
        torch.multinomial(torch.ones(len(y)), 1)
    ].mean(),
    "bernoulli": lambda y, p: (
        (torch.bernoulli(torch.full_like(y, 0.5)) * squares(y, p)).mean()
        + p.square().mean()
    ),
    "noise of numpy": lambda y, p: (
        torch.tensor(np.random.rand(*y.shape), dtype=y.dtype) * squares(y, p)
    ).mean(),
}


def ops_mean(x, axis):
    """A value for each column, each a mean over rows."""
    return torch.mean(x, dim=axis)


for function in (
    assigned,
    in_place,
    views_written,
    out_of,
    autoregressive,
    empty_first,
    copied,
    histogram,
    frequencies,
):
    MOVES[function.__name__] = function
