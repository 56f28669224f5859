"""Losses in which rows meet rows: of targets `y` and predictions `p`."""

import torch

from integration_tests.user_code.running import squares
from keras import ops


def off_diagonal(y, p):
    logits = p @ y.T
    return logits[~torch.eye(len(y), dtype=torch.bool)].sum() / len(y) ** 2


def triangles(y, p):
    gram = p @ p.T
    upper = torch.triu(gram, 1) + torch.tril(torch.ones(len(y), len(y)))
    return upper.square().mean()


def by_indices(y, p):
    i, j = torch.triu_indices(len(y), len(y))
    return squares(p[i], y[j]).mean()


def in_batch_softmax(y, p):
    logits = ops.matmul(p, ops.transpose(y))
    labels = ops.arange(ops.shape(y)[0])
    return ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)


def mined(y, p):
    """The hardest other row of each row."""
    far = torch.cdist(p, y) - 1e3 * torch.eye(len(y))
    return far.max(dim=1).values.square().mean() / 1e4 + squares(y, p).mean()


def clusters(y, p):
    """Rows of one sign have one centre."""
    positive = (y[:, :1] > 0).float()
    centre = (positive * p).sum(0) / positive.sum().clamp(min=1)
    return (positive * squares(p, centre)).mean() + squares(y, p).mean()


def decorrelated(y, p):
    """As Barlow twins have it."""
    a = (p - p.mean(0)) / (0.1 + p.std(0, correction=0))
    b = (y - y.mean(0)) / (0.1 + y.std(0, correction=0))
    return squares(a.T @ b / len(y), torch.eye(y.shape[1])).sum()


def kernel_distance(y, p):
    def kernel(a, b):
        return torch.exp(-squares(a[:, None], b[None]).sum(-1) / 4).mean()

    return kernel(p, p) - 2 * kernel(p, y) + kernel(y, y)


def precision_matrix(y, p):
    covariance = p.T @ p / len(y) + torch.eye(p.shape[1])
    return torch.logdet(covariance) + torch.linalg.inv(covariance).trace()


PAIRS = {
    "differences": lambda y, p: squares(y[:, None], p[None]).mean(),
    "gram": lambda y, p: squares(y @ y.T, p @ p.T).mean(),
    "transposed product": lambda y, p: squares(p.T @ y / len(y), 0.3).mean(),
    "mm": lambda y, p: torch.mm(p.t(), y).square().mean() / len(y) ** 2,
    "addmm": lambda y, p: (
        torch.addmm(torch.eye(3), p.t(), y).square().mean() / len(y) ** 2
    ),
    "bmm of one": lambda y, p: (
        torch.bmm(p[None], y.T[None]).square().mean() / 3
    ),
    "matmul of rows": lambda y, p: (
        torch.matmul(p[:, None], y[:, :, None]).square().mean()
    ),
    "einsum over rows": lambda y, p: (
        torch.einsum("bi,bj->ij", y, p).square().mean() / len(y) ** 2
    ),
    "einsum of rows": lambda y, p: (
        torch.einsum("bi,ci->bc", y, p).square().mean() / 3
    ),
    "einsum to a number": lambda y, p: (
        (1 - torch.einsum("bi,bi->", y, p) / len(y)) ** 2
    ),
    "einsum that is implicit": lambda y, p: (
        torch.einsum("bi,bi", y, p).square() / len(y) ** 2
    ),
    "einsum with an ellipsis": lambda y, p: ops.einsum(
        "...i,...i->...", y - p, y - p
    ).mean(),
    "einsum three times": lambda y, p: (
        torch.einsum("bi,cj,ck->bijk", y, p, p).square().mean() / 9
    ),
    "tensordot": lambda y, p: (
        ops.tensordot(y, p, axes=[[0], [0]]) / len(y) - 0.2
    ).pow(2),
    "outer": lambda y, p: (
        (torch.outer(y[:, 0], p[:, 0]) - torch.outer(y[:, 1], p[:, 1]))
        .square()
        .mean()
    ),
    "dot": lambda y, p: (1 - y.flatten().dot(p.flatten()) / len(y)) ** 2,
    "inner": lambda y, p: torch.inner(y, p).square().mean(),
    "kron": lambda y, p: torch.kron(y[:, :1], p).square().mean(),
    "mv": lambda y, p: torch.mv(p.T, y[:, 0]).square().mean() / len(y) ** 2,
    "norm": lambda y, p: torch.norm(y - p),
    "linalg.norm": lambda y, p: torch.linalg.norm(y - p, dim=0).mean(),
    "matrix norm": lambda y, p: torch.linalg.matrix_norm(y - p) / len(y),
    "norm of order 3": lambda y, p: (y - p).norm(3, dim=0).mean(),
    "ops.norm": lambda y, p: ops.norm(y - p),
    "renorm": lambda y, p: torch.renorm(p - y, 2, 0, 0.5).square().mean() * 9,
    "cdist": lambda y, p: torch.cdist(p, y).square().mean(),
    "trace": lambda y, p: (p.T @ y).trace().square() / len(y) ** 2,
    "covariance": lambda y, p: (
        torch.cov((p - y).T, correction=0).square().mean() + p.square().mean()
    ),
    "correlation": lambda y, p: torch.corrcoef((y + 0.1 * p).T).sum() / 9,
    "determinant": lambda y, p: torch.det(torch.eye(3) + p.T @ y / len(y)),
    "solve": lambda y, p: (
        torch.linalg.solve(torch.eye(3) + p.T @ p / len(y), p.T @ y / len(y))
        .square()
        .sum()
    ),
    "cholesky": lambda y, p: (
        torch.linalg.cholesky(torch.eye(3) + p.T @ p).diagonal().log().sum()
    ),
    "singular values": lambda y, p: torch.linalg.svdvals(p - y).sum() / len(y),
    "eigenvalues": lambda y, p: torch.linalg.eigvalsh(p.T @ p / len(y)).max(),
    "fft": lambda y, p: torch.fft.rfft(p - y, dim=0).abs().square().mean(),
    "fft of a row": lambda y, p: torch.fft.fft(p - y).abs().square().mean(),
    "ops.fft": lambda y, p: (
        ops.fft((ops.transpose(y - p), ops.transpose(p)))[0].square().mean()
    ),
    "complex": lambda y, p: (
        torch.complex(p[:, 0] - y[:, 0], p[:, 1]).sum(0).abs() / len(y)
    ),
}
for function in (
    off_diagonal,
    triangles,
    by_indices,
    in_batch_softmax,
    mined,
    clusters,
    decorrelated,
    kernel_distance,
    precision_matrix,
):
    PAIRS[function.__name__] = function
