"""Steps of one's own: functions `step(model, x, y)` that give logs."""

import numpy as np
import torch

import keras
from integration_tests.user_code.losses_of_steps import LOSSES
from integration_tests.user_code.running import LEARNING_RATE
from integration_tests.user_code.running import descend
from integration_tests.user_code.running import note
from integration_tests.user_code.running import squares
from keras import ops


def fitted(model, x, y, loss):
    """Descends a loss, and updates the compiled metrics."""
    descend(model, loss)
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(loss.detach())
        else:
            metric.update_state(y, model(x, training=False))
    return {m.name: m.result() for m in model.metrics}


def plain(model, x, y):
    """As the guide has it."""
    return fitted(model, x, y, model.compute_loss(y=y, y_pred=model(x)))


def with_logs(make_log):
    """A plain step that gives a log of its own as well."""

    def step(model, x, y):
        p = model(x, training=True)
        loss = squares(y, p).mean()
        descend(model, loss)
        return {"own": make_log(model, x, y, p.detach(), loss.detach())}

    return step


LOGS = {
    "a number of Python": lambda model, x, y, p, loss: loss.item(),
    "a number of numpy": lambda model, x, y, p, loss: np.max(
        ops.convert_to_numpy(p)
    ),
    "an array of numpy": lambda model, x, y, p, loss: loss.cpu().numpy(),
    "a tensor": lambda model, x, y, p, loss: loss,
    "a size": lambda model, x, y, p, loss: len(x),
    "a count": lambda model, x, y, p, loss: (p > 0.0123).sum(),
    "a reduced row": lambda model, x, y, p, loss: p.abs().sum(0)[0],
    "a mean of numpy": lambda model, x, y, p, loss: p.cpu().numpy().mean(),
    "a norm of the gradient": lambda model, x, y, p, loss: ops.norm(
        ops.concatenate(
            [v.value.grad.flatten() for v in model.trainable_variables]
        )
    ),
    "a norm of the weights": lambda model, x, y, p, loss: sum(
        float(ops.norm(v)) for v in model.trainable_variables
    ),
    "a largest weight": lambda model, x, y, p, loss: max(
        float(v.value.max()) for v in model.trainable_variables
    ),
    "a mean of a weight": lambda model, x, y, p, loss: np.mean(
        np.asarray(model.trainable_variables[0])
    ),
    "a row": lambda model, x, y, p, loss: float(p[-1, 0]),
    "a quantile": lambda model, x, y, p, loss: torch.quantile(p, 0.3),
    "a counter": lambda model, x, y, p, loss: (
        model.kept.setdefault("n", []).append(len(x)) or sum(model.kept["n"])
    ),
}


def by_hand(model, x, y):
    """SGD on the trainable weights."""
    model.zero_grad()
    squares(y, model(x)).mean().backward()
    for v in model.trainable_weights:
        v.assign(v - LEARNING_RATE * v.value.grad)
    return {}


def in_place(model, x, y):
    squares(y, model(x)).mean().backward()
    with torch.no_grad():
        for w in model.parameters():
            if w.grad is not None:
                w -= LEARNING_RATE * w.grad
                w.grad = None
    return {}


def of_torch(model, x, y):
    """torch's optimizer."""
    if "optimizer" not in model.kept:
        model.kept["optimizer"] = torch.optim.SGD(model.parameters(), 0.1)
    model.kept["optimizer"].zero_grad()
    loss = squares(y, model(x)).mean()
    loss.backward()
    model.kept["optimizer"].step()
    return {"own": loss.item()}


def by_autograd_grad(model, x, y):
    weights = model.trainable_variables
    loss = squares(y, model(x)).sum() / len(x)
    gradients = torch.autograd.grad(loss, [v.value for v in weights])
    with torch.no_grad():
        model.optimizer.apply(gradients, weights)
    return {"own": loss.detach()}


def twice_differentiated(model, x, y):
    """The loss and the square of its gradient with respect to weights."""
    values = [v.value for v in model.trainable_variables]
    loss = squares(y, model(x)).mean()
    gradients = torch.autograd.grad(loss, values, create_graph=True)
    return fitted(model, x, y, loss + sum(g.square().sum() for g in gradients))


def look_ahead(model, x, y):
    """MAML's inner step, on the first half."""
    n = (len(x) + 1) // 2
    up, out = model.get_layer("up"), model.get_layer("out")
    h = up(x)
    inner = squares(y[:n], out(h[:n])).mean()
    (g,) = torch.autograd.grad(inner, out.kernel.value, create_graph=True)
    p = h @ (out.kernel.value - 0.5 * g) + out.bias.value
    return fitted(model, x, y, squares(y, p).mean())


def clipped(model, x, y):
    model.zero_grad()
    loss = squares(y, model(x)).sum()
    loss.backward()
    note(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    weights = model.trainable_variables
    with torch.no_grad():
        model.optimizer.apply([v.value.grad for v in weights], weights)
    return {"own": loss.detach()}


def clipped_by_hand(model, x, y):
    model.zero_grad()
    squares(y, model(x)).sum().backward()
    weights = model.trainable_variables
    gradients = [v.value.grad for v in weights]
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    gradients = [g / norm.clamp(min=1.0) for g in gradients]
    with torch.no_grad():
        model.optimizer.apply(gradients, weights)
    return {"own": norm}


def accumulated(model, x, y):
    """Descends on every second call."""
    loss = squares(y, model(x)).mean()
    (loss / 2).backward()
    model.kept["n"] = model.kept.get("n", 0) + 1
    if model.kept["n"] % 2 == 0:
        weights = model.trainable_variables
        with torch.no_grad():
            model.optimizer.apply([v.value.grad for v in weights], weights)
        model.zero_grad()
    return {"own": loss.detach()}


def accumulated_by_hand(model, x, y):
    model.zero_grad()
    squares(y, model(x)).mean().backward()
    weights = model.trainable_variables
    new = [v.value.grad.clone() for v in weights]
    old = model.kept.get("gradients", new)
    model.kept["gradients"] = [0.9 * a + 0.1 * b for a, b in zip(old, new)]
    with torch.no_grad():
        model.optimizer.apply(model.kept["gradients"], weights)
    return {}


def backward_twice(model, x, y):
    model.zero_grad()
    p = model(x)
    squares(y, p).mean().backward(retain_graph=True)
    (0.1 * p.std(correction=0)).backward()
    weights = model.trainable_variables
    with torch.no_grad():
        model.optimizer.apply([v.value.grad for v in weights], weights)
    return {}


def descended_twice(model, x, y):
    for _ in range(2):
        loss = squares(y, model(x)).mean()
        descend(model, loss)
    return {"own": loss.detach()}


def averaged(model, x, y):
    """An average of weights, that the logs compare."""
    logs = plain(model, x, y)
    now = [ops.copy(v.value.detach()) for v in model.trainable_variables]
    old = model.kept.setdefault("average", now)
    model.kept["average"] = [0.9 * a + 0.1 * b for a, b in zip(old, now)]
    far = sum(float(ops.norm(a - b)) for a, b in zip(old, now))
    return {**logs, "far": far}


def momentum_teacher(model, x, y):
    if "teacher" not in model.kept:
        model.kept["teacher"] = keras.models.clone_model(model)
        model.kept["teacher"].set_weights(model.get_weights())
    teacher = model.kept["teacher"]
    with torch.no_grad():
        target = teacher(x)
    target = target - target.mean(0)
    logs = fitted(model, x, y, squares(target + y, model(x)).mean())
    for a, b in zip(teacher.weights, model.weights):
        a.assign(0.9 * a + 0.1 * b)
    return logs


def noisy_gradients(model, x, y):
    model.zero_grad()
    squares(y, model(x)).mean().backward()
    weights = model.trainable_variables
    with torch.no_grad():
        noisy = [v.value.grad + 0.1 * torch.randn(v.shape) for v in weights]
        model.optimizer.apply(noisy, weights)
    return {}


def of_each_row(model, x, y):
    """Gradients of each row, clipped by its norm: differential privacy."""
    weights = model.trainable_variables
    total = [torch.zeros(v.shape) for v in weights]
    for i in range(len(x)):
        loss = squares(y[i], model(x[i : i + 1])[0]).mean()
        gradients = torch.autograd.grad(loss, [v.value for v in weights])
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        for t, g in zip(total, gradients):
            t += g / max(1.0, 2 * float(norm)) / len(x)
    with torch.no_grad():
        model.optimizer.apply(total, weights)
    return {}


def other_gradients(model, x, y):
    """Only what is positive, and by the sign of the mean of a batch."""
    model.zero_grad()
    squares(y, model(x)).mean().backward()
    with torch.no_grad():
        for w in model.parameters():
            if w.grad is not None:
                w.grad.copy_(torch.nn.functional.relu(w.grad) * (1 + x.mean()))
        weights = model.trainable_variables
        model.optimizer.apply([v.value.grad for v in weights], weights)
    return {}


def hooked(model, x, y):
    kernel = model.get_layer("up").kernel.value
    handle = kernel.register_hook(lambda g: g / (1 + g.norm()))
    descend(model, squares(y, model(x)).sum())
    handle.remove()
    return {}


def stops(model, x, y):
    logs = plain(model, x, y)
    if float(y.mean()) > 0.1:
        model.stop_training = True
    return logs


def adapts(model, x, y):
    """A learning rate by the loss."""
    loss = squares(y, model(x)).mean()
    rate = min(0.2, 0.05 * (1 + float(loss)))
    model.optimizer.learning_rate = rate
    descend(model, loss)
    return {"own": rate}


def tells_rows(model, x, y):
    note(x.shape[0])
    note(x)
    note(model(x).detach())
    return plain(model, x, y)


def of_loss(make_loss):
    """A step that descends a loss of its own."""

    def step(model, x, y):
        return fitted(model, x, y, make_loss(model, x, y))

    return step


STEPS = {
    f.__name__: f
    for f in (
        plain,
        by_hand,
        in_place,
        of_torch,
        by_autograd_grad,
        twice_differentiated,
        look_ahead,
        clipped,
        clipped_by_hand,
        accumulated,
        accumulated_by_hand,
        backward_twice,
        descended_twice,
        averaged,
        momentum_teacher,
        noisy_gradients,
        of_each_row,
        other_gradients,
        hooked,
        stops,
        adapts,
        tells_rows,
    )
}
OF_LOSSES = {name: of_loss(f) for name, f in LOSSES.items()}
OF_LOGS = {name: with_logs(f) for name, f in LOGS.items()}
