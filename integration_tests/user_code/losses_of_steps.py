"""Losses that a step of one's own descends: of a model and a batch."""

import numpy as np
import torch
import torch.nn.functional as F

from integration_tests.user_code.losses_of_pairs import in_batch_softmax
from integration_tests.user_code.running import note
from integration_tests.user_code.running import squares
from keras import ops

DRAWN = np.random.default_rng(0).permutation(22)


def gradient_penalty(model, x, y):
    x = x.detach().requires_grad_(True)
    p = model(x)
    (gradient,) = torch.autograd.grad(p.sum(), x, create_graph=True)
    norms = gradient.square().sum(1).add(0.1).sqrt()
    return squares(y, p).mean() + (norms - 1).square().mean()


def penalty_between(model, x, y):
    """WGAN-GP's."""
    between = (0.3 * x + 0.7 * x.flip(0)).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(
        model(between).mean(), between, create_graph=True
    )
    return squares(y, model(x)).mean() + (gradient.norm() - 1) ** 2


def adversarial(model, x, y):
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(squares(y, model(x)).mean(), x)
    note(gradient.norm())
    return squares(y, model(x.detach() + 0.5 * gradient.sign())).mean()


def of_inputs_gradient(model, x, y):
    x = x.detach().clone().requires_grad_(True)
    squares(y, model(x)).sum().backward()
    note(x.grad.abs().mean())
    model.zero_grad()
    return squares(y, model(x.detach() - 0.1 * x.grad)).mean()


def laplacian(model, x, y):
    """Second derivatives, as PINNs have them."""
    x = x.detach().requires_grad_(True)
    p = model(x)
    (first,) = torch.autograd.grad(p[:, 0].sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return squares(y, p).mean() + second[:, 0].square().mean()


def mixup(model, x, y):
    order = torch.randperm(len(x))
    x, y = 0.6 * x + 0.4 * x[order], 0.6 * y + 0.4 * y[order]
    return squares(y, model(x)).mean()


def mixup_of_halves(model, x, y):
    n = (len(x) + 1) // 2
    return squares(y[:n], model(0.5 * (x[:n] + x[-n:]))).mean()


def cutmix(model, x, y):
    mask = torch.rand(len(x), 1) < 0.5
    return squares(y, model(torch.where(mask, x, x.roll(1, 0)))).mean()


def views(model, x, y):
    """SimCLR's: twice as many rows, each against all."""
    a = model(x + 0.1 * torch.randn(x.shape))
    b = model(x - 0.1 * torch.randn_like(x))
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = z @ z.T - 1e3 * torch.eye(len(z))
    target = torch.arange(len(z)).roll(len(x))
    return F.cross_entropy(logits, target)


def adversary(model, x, y):
    """A discriminator's: real rows and made ones in one batch."""
    fake = torch.randn(len(x), x.shape[1])
    logits = model(torch.cat([x, fake]))[:, 0]
    labels = torch.cat([torch.ones(len(x)), torch.zeros(len(x))])
    labels = labels + 0.05 * torch.rand(labels.shape)
    return F.binary_cross_entropy_with_logits(logits, labels)


def penalised(model, x, y):
    penalty = sum((v.value**2).sum() for v in model.trainable_variables)
    return squares(y, model(x)).mean() + 0.01 * penalty


def penalised_by_norms(model, x, y):
    penalty = sum(torch.linalg.norm(w) for w in model.parameters())
    return squares(y, model(x)).mean() + 0.01 * penalty


def orthogonal(model, x, y):
    kernel = ops.convert_to_tensor(model.get_layer("up").kernel)
    gram = ops.matmul(kernel, ops.transpose(kernel))
    return squares(y, model(x)).mean() + 0.1 * squares(gram, ops.eye(4)).mean()


def of_parts(model, x, y):
    n = len(x) // 2
    return (
        squares(y[:1], model(x[:1])).sum() + squares(y[n:], model(x[n:])).mean()
    )


def of_noise(model, x, y):
    return model(torch.randn(5, x.shape[1])).square().mean()


def of_constant(model, x, y):
    return model(torch.ones(2, x.shape[1])).square().mean() + (
        squares(y, model(x)).mean()
    )


def of_permuted(model, x, y):
    order = torch.as_tensor(DRAWN[DRAWN < len(x)])
    p = model(x[order])
    return squares(y[order], p).mean() + (p[1:] - p[:-1]).square().sum() / 9


def of_rows(model, x, y):
    outputs = [model(x[i : i + 1]) for i in range(len(x))]
    return squares(y, torch.cat(outputs)).mean()


def of_micro_batches(model, x, y):
    losses = [
        squares(b, model(a)).mean() for a, b in zip(x.split(3), y.split(3))
    ]
    return sum(losses) / len(losses)


def of_two_rates(model, x, y):
    with torch.no_grad():
        target = model(x).mean(0)
    return squares(model(x), target).mean() + squares(y, model(x)).mean()


def of_layers(model, x, y):
    h = model.get_layer("up")(x)
    h = h - h.mean(0)
    return squares(y, model.get_layer("out")(h)).mean()


def consistent(model, x, y):
    a, b = model(x), model(x + 0.1 * torch.randn(len(x), 1))
    return F.kl_div(
        a.log_softmax(1), b.softmax(1), reduction="batchmean"
    ) + F.mse_loss(a, y)


LOSSES = {
    f.__name__: f
    for f in (
        gradient_penalty,
        penalty_between,
        adversarial,
        of_inputs_gradient,
        laplacian,
        mixup,
        mixup_of_halves,
        cutmix,
        views,
        adversary,
        penalised,
        penalised_by_norms,
        orthogonal,
        of_parts,
        of_noise,
        of_constant,
        of_permuted,
        of_rows,
        of_micro_batches,
        of_two_rates,
        of_layers,
        consistent,
    )
} | {
    "compute_loss": lambda model, x, y: model.compute_loss(x, y, model(x)),
    "contrast": lambda model, x, y: in_batch_softmax(y, model(x)).mean(),
    "sum": lambda model, x, y: squares(y, model(x)).sum() / 20,
    "by a size": lambda model, x, y: squares(y, model(x)).sum() / len(x),
    "centred inputs": lambda model, x, y: squares(
        y, model(x - x.mean(0))
    ).mean(),
    "hard rows": lambda model, x, y: (
        squares(y, model(x)).mean(1).topk((len(x) + 1) // 2).values.mean()
    ),
    "of evaluation": lambda model, x, y: squares(
        y, model(x, training=False)
    ).mean(),
}
