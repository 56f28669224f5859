"""A weight in user code: it shows its whole shape, and what is computed from it
is what one device computes, in layers and outside of them.

In hand-written loops every process feeds the same whole batch.
"""

import copy
import io
import threading

import numpy as np
import pytest
import torch
from torch.nn import utils

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops
from keras.src.backend.torch.distribution.variables.weights import ShardedTensor

pytestmark = pytest.mark.world(2, 4)

ROWS = 7
# Uneven shards, and with four processes an empty one of the second bias.
LAYOUTS = {
    "fsdp": {
        ".*/kernel": ("batch", None),
        ".*second/bias": ("batch",),
    },
    "model": {
        ".*first/kernel": (None, "model"),
        ".*first/bias": ("model",),
        ".*second/kernel": ("model", None),
    },
    "both": {
        ".*first/kernel": ("batch", "model"),
        ".*first/bias": ("model",),
        ".*second/kernel": ("model", "batch"),
    },
    "one dim over both": {
        ".*first/kernel": (None, ("model", "batch")),
        ".*second/kernel": (("batch", "model"), None),
    },
}


def distributions(world_size):
    yield keras.distribution.DataParallel()
    yield parity.model_parallel((world_size,), LAYOUTS["fsdp"], axes=("batch",))
    if world_size == 2:
        yield parity.model_parallel((1, 2), LAYOUTS["model"])
        yield parity.model_parallel((2, 1), LAYOUTS["both"])
    else:
        for name in ("model", "both", "one dim over both"):
            yield parity.model_parallel((2, 2), LAYOUTS[name])


def data():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((ROWS, 5)).astype("float32")
    return x, rng.standard_normal((ROWS, 3)).astype("float32")


def make_model(between=None, cls=keras.Sequential, units=7, **kwargs):
    model = cls(
        [
            keras.Input((5,)),
            layers.Dense(
                units, "tanh", name="first", bias_initializer="uniform"
            ),
            *([] if between is None else [between()]),
            layers.Dense(3, name="second"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1, **kwargs), "mse")
    return model


def check(program, world_size, make_model=make_model, tolerance=1e-5):
    """A program says, and leaves, under each distribution what it does on one
    device; on all processes the same."""
    expected = parity.run(program, make_model)
    for distribution in distributions(world_size):
        actual = parity.run(program, make_model, distribution)
        parity.assert_equal_on_all(distribution, actual, expected, tolerance)


def array(x):
    return np.array(ops.convert_to_numpy(x))


def loss_of(model):
    x, y = map(ops.convert_to_tensor, data())
    return ops.mean((model(x) - y) ** 2)


def backward(model, more=0.0):
    model.zero_grad()
    loss = loss_of(model) + more
    loss.backward()
    return float(loss.detach())


def gradients(model):
    return [array(v.value.grad) for v in model.trainable_variables]


READS = {
    "norm": lambda w: float(ops.norm(w)),
    "sum": lambda w: float(ops.sum(w)),
    "mean": lambda w: ops.mean(w).item(),
    "maximum": lambda w: float(ops.max(w)),
    "minimum": lambda w: float(torch.amin(ops.convert_to_tensor(w))),
    "count": lambda w: int(ops.count_nonzero(ops.abs(w) > 0.2)),
    "share": lambda w: float(ops.mean(ops.cast(ops.abs(w) < 0.1, "float32"))),
    "std": lambda w: float(ops.std(w)),
    "infinite norm": lambda w: float(
        torch.linalg.vector_norm(w.value.detach(), float("inf"))
    ),
    "norms": lambda w: [
        float(torch.linalg.vector_norm(w.value.detach(), p)) for p in (1, 2, 3)
    ],
    "spectral norm": lambda w: float(ops.norm(w, ord=2)),
    "nuclear norm": lambda w: float(torch.linalg.matrix_norm(w.value, "nuc")),
    "of columns": lambda w: array(ops.mean(w, axis=0)),
    "of rows": lambda w: array(ops.sum(w**2, axis=-1)),
    "an entry": lambda w: w.value[1, 2].item(),
    "a row": lambda w: w.value[-1].tolist(),
    "printed entry": lambda w: float(f"{w.value[1, 2]:.5f}"),
    "list": lambda w: w.value.tolist(),
    "numpy": lambda w: w.value.detach().numpy(),
    "asarray": lambda w: np.asarray(w),
    "array of a value": lambda w: np.asarray(w.value.detach()),
    "iterate": lambda w: [float(row.sum()) for row in w.value],
    "product": lambda w: array(w @ ops.transpose(w)),
    "with plain": lambda w: array(ops.ones((5,)) @ w + ops.arange(7)),
    "plain entry by entry": lambda w: array(
        ops.maximum(w * 2, ops.ones((5, 7)) / 9) - ops.arange(7)
    ),
    "where": lambda w: array(ops.where(w > 0, w, -1.0)),
    "comparison": lambda w: int(ops.all(w == w)),
    "svd": lambda w: array(ops.svd(w, compute_uv=False)),
    "sorted": lambda w: array(ops.sort(w, axis=0)),
    "histogram": lambda w: torch.histc(w.value.detach(), 5).tolist(),
    "concatenated": lambda w: array(ops.concatenate([w, ops.ones((1, 7))])),
    "half": lambda w: array(ops.cast(ops.cast(w, "float16"), "float32")),
    "size": lambda w: [w.value.numel(), len(w.value), *w.value.shape],
    "transposed": lambda w: w.value.T.tolist(),
    "as a function": lambda w: float(torch.sum(w.value.square().sqrt())),
    "foreach": lambda w: [
        float(x) for x in torch._foreach_norm([w.value.detach(), w.value.data])
    ],
    "own": lambda w: float(Square.apply(w.value).sum()),
    "vmap": lambda w: torch.vmap(lambda row: row * row.sum())(w.value).tolist(),
    "vmap over a closure": lambda w: torch.vmap(lambda i: w.value[i].sum())(
        torch.arange(5)
    ).tolist(),
}


@pytest.mark.parametrize("name", READS)
def test_reading(name, world_size):
    def program(model):
        kernel = model.get_layer("first").kernel
        return np.asarray(READS[name](kernel))

    check(program, world_size)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


PENALTIES = {
    "l1": lambda w: ops.mean(ops.abs(w)),
    "l2": lambda w: 0.1 * ops.sum(ops.square(w)),
    "norm": lambda w: ops.norm(w),
    "power": lambda w: torch.linalg.vector_norm(w.value) ** 2,
    "largest": lambda w: ops.max(ops.abs(w)),
    "std": lambda w: ops.std(w),
    "orthogonal": lambda w: ops.sum(
        (ops.transpose(w) @ w - ops.eye(w.shape[1])) ** 2
    ),
    "of columns": lambda w: ops.sum(ops.sqrt(ops.sum(w**2, axis=0))),
    "spectral": lambda w: torch.linalg.matrix_norm(w.value, 2),
    "with plain": lambda w: ops.sum((w - ops.ones(w.shape)) ** 2),
    "slices": lambda w: ops.sum((w[1:] - w[:-1]) ** 2),
    "own": lambda w: Square.apply(w.value).sum() + ops.sum(w),
    "vmap": lambda w: torch.vmap(lambda r: r.square().sum())(w.value).sum(),
}


class Penalized(keras.Sequential):
    penalty = None

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        kernels = [layer.kernel for layer in self.layers]
        penalty = sum(self.penalty(kernel) for kernel in kernels)
        loss = ops.mean(ops.square(self(x, training=True) - y)) + penalty
        loss.backward()
        variables = self.trainable_variables
        self.optimizer.apply([v.value.grad for v in variables], variables)
        with torch.no_grad():
            norms = [float(ops.norm(k)) for k in kernels]
        return {"penalty": penalty, "norm": norms[0] + norms[1]}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalty_in_a_train_step(name, world_size):
    def program(model):
        model.penalty = PENALTIES[name]
        # Its mean is over local rows: of as many on each data shard.
        x, y = (np.concatenate([a, a[:1]]) for a in data())
        history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history
        return history, gradients(model)

    check(program, world_size, lambda: make_model(cls=Penalized))


class OfRows(keras.Sequential):
    """Numbers of rows meet weights by hand."""

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        kernel = self.layers[0].kernel
        mean = ops.mean(x, axis=0)
        loss = ops.mean(ops.square(self(x, training=True) - y))
        loss = loss + ops.sum(kernel * ops.expand_dims(mean, 1))
        loss = loss + ops.sum(ops.square(kernel)) * ops.mean(mean)
        loss = loss + ops.mean((x @ Square.apply(kernel.value)) ** 2)
        loss = loss + SumOfSquares.apply(kernel.value) * ops.mean(y)
        loss.backward()
        variables = self.trainable_variables
        self.optimizer.apply([v.value.grad for v in variables], variables)
        return {}


class SumOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x * x).sum()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_numbers_of_our_rows_in_a_train_step(world_size):
    """A mean over rows, whichever of them a data shard has."""

    def program(model):
        x, y = (np.concatenate([a, a[:1]]) for a in data())
        model.fit(x, y, batch_size=8, epochs=2, verbose=0)
        return gradients(model)

    check(program, world_size, lambda: make_model(cls=OfRows))


@pytest.mark.parametrize("name", PENALTIES)
def test_penalty_in_a_loop(name, world_size):
    def program(model):
        kernel = model.get_layer("first").kernel
        loss = backward(model, PENALTIES[name](kernel))
        first = gradients(model)
        # Into what is there already.
        PENALTIES[name](kernel).backward()
        second = gradients(model)
        (third,) = torch.autograd.grad(PENALTIES[name](kernel), [kernel.value])
        return loss, first, second, array(third)

    check(program, world_size)


@pytest.mark.parametrize("name", ["l2", "power", "orthogonal", "of columns"])
def test_gradient_of_a_gradient(name, world_size):
    def program(model):
        kernel = model.get_layer("first").kernel.value
        penalty = PENALTIES[name](model.get_layer("first").kernel)
        (grad,) = torch.autograd.grad(
            loss_of(model) + penalty, kernel, create_graph=True
        )
        backward(model, ops.sum(grad**2) + torch.mean(grad * kernel))
        return array(grad), gradients(model)

    check(program, world_size, tolerance=3e-5)


class Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        kernel = self.model.get_layer("first").kernel
        self.seen.append(float(ops.norm(kernel)))
        self.seen.append(kernel.value.max().item())

    def on_epoch_end(self, epoch, logs=None):
        for variable in self.model.trainable_variables:
            self.seen.append(float(ops.mean(variable)))
            self.seen.append(float(torch.linalg.norm(variable.value.grad)))
        kernel = self.model.get_layer("first").kernel
        kernel.assign(ops.clip(kernel, -0.3, 0.3))
        logs["norm"] = np.linalg.norm(kernel.numpy())


def test_callbacks(world_size):
    def program(model):
        watch = Watch()
        history = model.fit(
            *data(), batch_size=4, epochs=2, verbose=0, callbacks=[watch]
        ).history
        return watch.seen, history

    check(program, world_size)


def clip_norm(model):
    norm = utils.clip_grad_norm_(model.parameters(), 0.1)
    return float(norm), float(
        utils.get_total_norm([p.grad for p in model.parameters()])
    )


def clip_norm_in_lists(model):
    return float(utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True))


def clip_infinite_norm(model):
    parameters = list(model.parameters())
    return float(utils.clip_grad_norm_(parameters, 0.05, float("inf")))


def clip_value(model):
    utils.clip_grad_value_(model.parameters(), 0.02)


def clip_by_hand(model):
    grads = [v.value.grad for v in model.trainable_variables]
    norm = ops.sqrt(sum(ops.sum(ops.square(g)) for g in grads))
    for grad in grads:
        grad.mul_(torch.minimum(0.1 / norm, torch.tensor(1.0)))
    return float(norm)


def sharpness_aware(model):
    with torch.no_grad():
        norm = torch.norm(
            torch.stack([p.grad.norm(p=2) for p in model.parameters()])
        )
        steps = {}
        for p in model.parameters():
            steps[p] = p.grad * (0.05 / (norm + 1e-12))
            p.add_(steps[p])
    backward(model)
    with torch.no_grad():
        for p, step in steps.items():
            p.sub_(step)
    return float(norm)


def by_flat_vectors(model):
    flat = torch.cat([p.grad.view(-1) for p in model.parameters()])
    vector = utils.parameters_to_vector(model.parameters())
    vector = vector.detach() - 0.01 * flat / flat.norm()
    utils.vector_to_parameters(vector, model.parameters())
    for p in model.parameters():
        p.grad = torch.ones(p.shape) * p.grad.sum()
    return vector.tolist()


def of_whole_gradients(model):
    for p in model.parameters():
        whole = torch.from_numpy(array(p.grad)).flip(0)
        p.grad.copy_(whole)


CHANGES = [
    clip_norm,
    clip_norm_in_lists,
    clip_infinite_norm,
    clip_value,
    clip_by_hand,
    sharpness_aware,
    by_flat_vectors,
    of_whole_gradients,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changing_gradients(change, world_size):
    def program(model):
        said = []
        for _ in range(2):
            said.append(backward(model))
            said.append(change(model) or 0.0)
            said.append(gradients(model))
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(p.grad, alpha=-0.1)
        return said

    check(program, world_size)


def sgd_of_data(model):
    for p in model.parameters():
        p.data -= 0.1 * p.grad.data


def sgd_of_copies(model):
    for p in model.parameters():
        p.data = p.data - 0.1 * p.grad


def sgd_of_variables(model):
    for v in model.trainable_variables:
        v.assign(v - 0.1 * v.value.grad)


def sgd_in_place_of_variables(model):
    for v in model.trainable_variables:
        v.assign_sub(0.1 * v.value.grad)


def sgd_in_lists(model):
    with torch.no_grad():
        parameters = list(model.parameters())
        grads = [p.grad for p in parameters]
        torch._foreach_mul_(parameters, 0.99)
        torch._foreach_add_(parameters, grads, alpha=-0.1)
        plain = [torch.full(p.shape, 0.01) for p in parameters]
        torch._foreach_sub_(parameters, torch._foreach_mul(plain, 2.0))


def by_parts(model):
    """Through views, which one device has of the weight itself."""
    with torch.no_grad():
        for p in model.parameters():
            p[0] -= p.grad[0]
            p[1:].sub_(p.grad[1:] * 0.1)
            flat = p.view(-1)
            p.mul_(1.1)
            flat[-1] = flat[0] + 1
            flat.add_(0.01)
        model.get_layer("first").kernel.value.T[2].zero_()


def drawn(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.1, 0.2)
    for layer in model.layers:
        torch.nn.init.xavier_uniform_(layer.kernel.value)
    torch.nn.init.orthogonal_(model.get_layer("second").kernel.value)


def moving_averages(model):
    with torch.no_grad():
        averages = [p.detach().clone() for p in model.parameters()]
        copies = [copy.deepcopy(p) for p in model.parameters()]
        for average, p in zip(averages, model.parameters()):
            p.sub_(0.1 * p.grad)
            average.mul_(0.9).add_(p, alpha=0.1)
            average.lerp_(p, 0.2)
        for p, average, other in zip(model.parameters(), averages, copies):
            p.copy_(0.5 * (average + other))


def from_a_file(model):
    state = model.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    # What one device writes, and reads.
    assert all(not isinstance(x, ShardedTensor) for x in loaded.values())
    for p in model.parameters():
        p.data.mul_(3.0)
    model.load_state_dict({k: x + 0.25 for k, x in loaded.items()})


@pytest.mark.parametrize(
    "update",
    [
        sgd_of_data,
        sgd_of_copies,
        sgd_of_variables,
        sgd_in_place_of_variables,
        sgd_in_lists,
        by_parts,
        drawn,
        moving_averages,
        from_a_file,
    ],
)
def test_writing(update, world_size):
    def program(model):
        said = [backward(model)]
        torch.manual_seed(4)
        update(model)
        said.append(backward(model))
        said.append(gradients(model))
        update(model)
        # Keras's own goes on from there.
        said.append(model.train_on_batch(*data()))
        return said

    check(program, world_size)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "sgd in lists": lambda p: torch.optim.SGD(
        p, 0.1, momentum=0.9, foreach=True
    ),
    "adam": lambda p: torch.optim.Adam(p, 0.05, eps=0.1),
    "adamw in lists": lambda p: torch.optim.AdamW(
        p, 0.05, eps=0.1, foreach=True
    ),
    "adam, fused": lambda p: torch.optim.Adam(p, 0.05, eps=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, eps=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01, eps=(1e-3, 1e-3)),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.2, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_of_torch(name, world_size):
    def program(model):
        optimizer = OPTIMIZERS[name](model.parameters())

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        said = []
        for _ in range(3):
            said.append(float(closure().detach()))
            optimizer.step(closure if name == "lbfgs" else None)
        state = optimizer.state_dict()["state"]
        numbers = [
            array(x)
            for each in state.values()
            for x in each.values()
            if isinstance(x, torch.Tensor) and x.ndim
        ]
        optimizer.load_state_dict(optimizer.state_dict())
        return said, numbers if name != "lbfgs" else []

    check(program, world_size, tolerance=3e-5)


def test_hooks(world_size):
    def program(model):
        kernel = model.get_layer("second").kernel.value
        seen = []
        handle = kernel.register_hook(lambda grad: grad * 2)
        kernel.register_post_accumulate_grad_hook(
            lambda p: seen.append(float(p.grad.norm()))
        )
        backward(model)
        handle.remove()
        # A plain tensor in place of the gradient.
        kernel.register_hook(lambda grad: torch.cumsum(grad, 0))
        said = [gradients(model)]
        loss_of(model).backward()
        if isinstance(kernel, ShardedTensor):
            assert isinstance(kernel.grad, ShardedTensor)
        return said, gradients(model)

    # A hook sees the gradient of a data shard's rows, here of the batch.
    check(program, world_size)


class PerRow(layers.Layer):
    def build(self, shape):
        shape = (shape[-1], shape[-1])
        self.kernel = self.add_weight(shape=shape, name="kernel")

    def call(self, x):
        def of_row(row):
            return ops.tanh(ops.matmul(row, self.kernel))

        return ops.vectorized_map(of_row, x)


class PerWeight(PerRow):
    def call(self, x):
        kernel = ops.convert_to_tensor(self.kernel)
        norms = ops.vectorized_map(lambda row: ops.sum(row**2), kernel)
        return x * norms


class Center(layers.Layer):
    def call(self, x):
        return x - ops.mean(x, axis=-1, keepdims=True)


class Regularized(layers.Layer):
    def call(self, x):
        self.add_loss(1e-2 * ops.mean(ops.square(x)))
        return x


class Sum(layers.Layer):
    def build(self, shape):
        self.total = self.add_weight(
            shape=(shape[-1],), initializer="zeros", trainable=False
        )

    def call(self, x):
        self.total.assign_add(ops.sum(x, axis=0) + ops.max(x, axis=0))
        return x


@pytest.mark.parametrize("layer", [PerRow, PerWeight, Center, Regularized, Sum])
def test_layer(layer, world_size):
    keyed = {"first": LAYOUTS["model"], "both": LAYOUTS["both"]}

    def program(model):
        logs = [model.train_on_batch(*data()) for _ in range(2)]
        return logs, gradients(model), model.predict(data()[0], verbose=0)

    def make():
        # Shards of one size: others are gathered between layers.
        return make_model(lambda: layer(name="between"), units=8)

    expected = parity.run(program, make)
    for layouts in keyed.values():
        layouts = {**layouts, ".*between/kernel": (None, "model")}
        distribution = parity.model_parallel((world_size // 2, 2), layouts)
        actual = parity.run(program, make, distribution)
        parity.assert_equal_on_all(layouts, actual, expected)


def of_weights(w):
    """Transforms with respect to a weight itself."""

    def cubes(w):
        return (w**3).sum()

    with torch.no_grad():
        detached = w.detach()
    return [
        array(torch.func.grad(cubes)(w)),
        array(torch.func.hessian(cubes)(detached)),
        array(torch.func.jvp(cubes, (detached,), (detached,))[1]),
        array(torch.autograd.functional.jacobian(cubes, w)),
    ]


def test_functional_transforms(world_size):
    def program(model):
        first = model.get_layer("first")
        x = ops.convert_to_tensor(data()[0])

        def loss(scale, x):
            return torch.mean((x @ first.kernel.value * scale) ** 2)

        scale = torch.tensor(2.0)
        return [
            array(torch.func.grad(loss)(scale, x)),
            array(torch.vmap(torch.func.grad(loss), (None, 0))(scale, x)),
            array(torch.func.jacrev(loss, 1)(scale, x)),
            *of_weights(first.kernel.value),
        ]

    check(program, world_size)


@pytest.mark.parametrize("end", ["clear", "none"])
def test_model_that_outlives_its_distribution(end, world_size):
    def program(model):
        said = [model.train_on_batch(*data())]
        if end == "clear":
            keras.utils.clear_session(free_memory=False)
        else:
            keras.distribution.set_distribution(None)
        said.append(model.predict(data()[0], verbose=0))
        said.append(model.evaluate(*data(), verbose=0))
        # Every process on all rows.
        said.append(model.fit(*data(), epochs=2, verbose=0).history)
        said.append([array(w) for w in model.weights])
        return said

    check(program, world_size)


def test_in_a_thread(world_size):
    def program(model):
        said = []

        def play():
            said.append(model.predict(data()[0], verbose=0))
            said.append(float(ops.norm(model.get_layer("first").kernel)))

        thread = threading.Thread(target=play)
        thread.start()
        thread.join()
        return said

    check(program, world_size)


def test_accumulators_between_steps(world_size):
    def program(model):
        said = []
        for _ in range(3):
            model.train_on_batch(*data())
            accumulators = model.optimizer._accumulated_gradients
            said.append([float(ops.norm(a)) for a in accumulators])
            said.append([float(a.value.sum()) for a in accumulators])
        return said

    def make():
        return make_model(gradient_accumulation_steps=2)

    check(program, world_size, make)


def test_sizes(world_size):
    def program(model):
        lines = []
        model.summary(print_fn=lines.append)
        sizes = [list(p.shape) for p in model.parameters()]
        count = sum(p.numel() for p in model.parameters())
        kernel = model.get_layer("first").kernel
        assert kernel.value.T.shape == (7, 5)
        assert isinstance(kernel.value, torch.nn.Parameter)
        # Under a distribution there is one line more.
        own = [line for line in lines if "Stored by a process" in line]
        return model.count_params(), sizes, count, len(lines) - len(own)

    check(program, world_size)


def test_distributed_tensor(world_size):
    """What a script distributes shows its whole shape too."""
    x = np.random.default_rng(6).standard_normal((5, 6)).astype("float32")
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((world_size,), ("axis",), devices)
    for axes in (("axis", None), (None, "axis")):
        layout = keras.distribution.TensorLayout(axes, mesh)
        tensor = keras.distribution.distribute_tensor(x, layout)
        again = keras.distribution.distribute_tensor(tensor, layout)
        assert again is tensor
        said = [
            float(ops.norm(tensor)),
            float(ops.sum(tensor)),
            array(tensor + ops.ones((5, 6))),
            array(ops.max(tensor, axis=0)),
        ]
        expected = [np.linalg.norm(x), x.sum(), x + 1, x.max(0)]
        parity.assert_equal_on_all(axes, said, expected)


def test_printing_does_not_communicate(world_size, rank):
    for distribution in distributions(world_size):
        with distribution.scope():
            model = make_model()
        backward(model)
        if not rank:
            for v in model.variables:
                for x in (v, v.value, v.value.grad):
                    assert str(tuple(v.shape)) in f"{x} {x!r}" or (
                        not isinstance(v.value, ShardedTensor)
                    )


def test_writing_into_a_leaf_is_an_error(world_size):
    distribution = list(distributions(world_size))[1]
    with distribution.scope():
        model = make_model()
    kernel = model.get_layer("first").kernel.value
    for write in (
        lambda: kernel.add_(1.0),
        lambda: kernel.cumsum_(0),
        lambda: kernel[0].zero_(),
        lambda: torch._foreach_mul_([kernel], 2.0),
    ):
        outcomes = everyone.outcomes(write)
        assert all("in-place operation" in x for x in outcomes), outcomes
