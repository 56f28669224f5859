"""Weights that the data axis cuts are freed after use and gathered again.

Each program gives what one device gives; what it gathers is counted.
"""

import collections
import contextlib
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import keras
from integration_tests.harness import parity
from integration_tests.training.gradient_programs import local_rows
from integration_tests.training.gradient_programs import normal
from integration_tests.training.gradient_programs import numpy
from keras import layers
from keras import ops
from keras.src import tree
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.variables import in_flight
from keras.src.backend.torch.distribution.variables import order as order_lib
from keras.src.backend.torch.distribution.variables import resharding

pytestmark = pytest.mark.world(2, 4)

MATRICES = ".*((first|second|third|before|inner|dense.?|gru_cell)/kernel)"
OTHERS = {
    ".*(embeddings|lora_kernel_a)": ("batch", None),
    ".*conv/kernel": (None, None, "batch", None),
    ".*(query|key|value)/kernel": ("batch", None, None),
    ".*attention_output/kernel": (None, None, "batch"),
    ".*(query|key|value|gru_cell)/bias": (None, "batch"),
    "(?!.*(query|key|value|gru_cell)).*(bias|gamma|beta|scale)": ("batch",),
}
LAYOUTS = {
    MATRICES: ("batch", None),
    ".*(wide|tall)": (None, "batch"),
    **OTHERS,
}
BOTH = {
    MATRICES: ("batch", "model"),
    ".*(wide|tall)": ("model", "batch"),
    **OTHERS,
}


def distributions(world_size):
    if world_size == 2:
        yield parity.model_parallel((2,), LAYOUTS, ("batch",))
    else:
        yield parity.model_parallel((4,), LAYOUTS, ("batch",))
        yield parity.model_parallel((2, 2), BOTH)


def mlp():
    """Of odd sizes: no dim can be cut evenly."""
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(7, "tanh", name="first"),
            layers.LayerNormalization(name="norm"),
            layers.Dense(9, "relu", name="second"),
            layers.Dense(3, name="third"),
        ]
    )


def deep(count=4):
    model = keras.Sequential([keras.Input((6,))])
    for i in range(count):
        model.add(layers.Dense(6, "tanh", name=f"dense{i}"))
    return model


class Own(layers.Layer):
    """Weights of its own, cut along another dim, and a layer inside."""

    def build(self, shape):
        self.wide = self.add_weight(shape=(shape[-1], 11), name="wide")
        self.tall = self.add_weight(shape=(11, shape[-1]), name="tall")
        self.frozen = self.add_weight(
            shape=(shape[-1], shape[-1]), name="fixed_wide", trainable=False
        )
        self.inner = layers.Dense(shape[-1], name="inner")
        self.inner.build(shape)

    def call(self, x):
        y = self.inner(ops.matmul(x, self.frozen))
        y = ops.matmul(ops.tanh(ops.matmul(y, self.wide)), self.tall)
        # Once more, and that of another layer.
        y = y + ops.matmul(x, ops.matmul(self.wide, self.tall))
        return y + ops.matmul(x, ops.transpose(self.inner.kernel))


class Transforms(layers.Layer):
    """What does not allow hooks on what autograd saves."""

    def build(self, shape):
        self.wide = self.add_weight(shape=(shape[-1], 3), name="wide")

    def call(self, x):
        squares = torch.func.grad(lambda z: (z**3).sum() / 3)(x)
        rows = torch.vmap(lambda row: torch.tanh(row))(squares)
        return ops.matmul(rows, self.wide)


class Tied(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(13, 6, name="embedding")
        self.dense = layers.Dense(6, "tanh", name="dense")

    def build(self, shape):
        self.embedding.build(shape)
        self.dense.build((None, None, 6))

    def call(self, tokens):
        x = self.dense(self.dense(self.embedding(tokens)))
        return ops.matmul(x, ops.transpose(self.embedding.embeddings))


def with_layer(layer):
    return keras.Sequential(
        [keras.Input((5,)), layers.Dense(6, name="before"), layer()]
    )


def step(model, loss, rate=0.1, **kwargs):
    """A step of SGD by hand; gives its gradients."""
    model.zero_grad()
    loss.backward(**kwargs)
    grads = [v.value.grad for v in model.trainable_variables]
    keras.optimizers.SGD(rate).apply(grads, model.trainable_variables)
    return [numpy(g) for g in grads]


def square(y):
    return ops.mean(ops.square(y))


def trains(model, x=None, steps=3):
    x = normal(*model.input_shape[1:]) if x is None else x
    return [step(model, square(model(local_rows(x)))) for _ in range(steps)]


def tied(model):
    tokens = np.arange(8 * 5).reshape(8, 5) % 13
    return trains(model, tokens.astype("int32"))


def twice_backward(model):
    x = local_rows(normal(6))
    said = []
    for _ in range(2):
        model.zero_grad()
        loss = square(model(x))
        loss.backward(retain_graph=True)
        loss.backward()
        said.append([numpy(v.value.grad) for v in model.trainable_variables])
    return said


def of_inputs_alone(model):
    x = local_rows(normal(6)).requires_grad_()
    said = []
    for _ in range(2):
        (grad,) = torch.autograd.grad(ops.sum(model(x) ** 2), x)
        # Each data shard has its own rows of it.
        total = grad.square().sum()
        if keras.distribution.distribution() is not None:
            dist.all_reduce(total, group=current().data_group)
        said.append(float(total))
    return said


def of_one_weight(model):
    x = local_rows(normal(6))
    kernel = model.layers[1].kernel
    return [
        numpy(torch.autograd.grad(square(model(x)), [kernel.value])[0])
        for _ in range(2)
    ]


def double_backward(model):
    x = local_rows(normal(6))
    kernels = [layer.kernel.value for layer in model.layers]
    for _ in range(2):
        model.zero_grad()
        grads = torch.autograd.grad(
            square(model(x)), kernels, create_graph=True
        )
        sum((g * g).sum() for g in grads).backward()
        said = [numpy(v.value.grad) for v in model.trainable_variables]
    return said


def takes_turns(model):
    """Each pass predicts another than the one that comes."""
    x, said = local_rows(normal(6)), []
    first, second, third, fourth = model.layers
    for i in range(6):
        y = first(x)
        if i % 2:
            y = third(second(y))
        y = fourth(y) if i % 3 else second(y)
        said.append(step(model, square(y)))
    return said


def without_gradients(model):
    x = normal(6)
    said = []
    for _ in range(2):
        said.append(model.predict(x, batch_size=8, verbose=0))
        with torch.no_grad():
            model(local_rows(x))
        said.append(step(model, square(model(local_rows(x)))))
    return said


def keeps_weights(model):
    """Gathered weights that the program keeps are what they were."""
    kept = []

    class Keeps(layers.Layer):
        def call(self, x):
            kernel = model.layers[0].kernel.value
            kept.append((kernel, kernel[1:].mT, kernel.detach().clone()))
            return ops.matmul(x, kernel)

    x, said = local_rows(normal(6)), []
    for _ in range(2):
        said.append(step(model, square(model(Keeps()(x)))))
    if keras.distribution.distribution() is not None:
        for kernel, view, was in kept:
            assert torch.equal(kernel, was) and torch.equal(view, was[1:].mT)
    return said


def checkpoints(model):
    x, said = local_rows(normal(6)).requires_grad_(), []

    def block(x):
        return model.layers[2](model.layers[1](x))

    for reentrant in (False, False, True):
        y = torch.utils.checkpoint.checkpoint(
            block, model.layers[0](x), use_reentrant=reentrant
        )
        said.append(step(model, square(model.layers[3](y))))
    return said


def saves_on_cpu(model):
    x = local_rows(normal(6))
    with torch.autograd.graph.save_on_cpu():
        loss = square(model(x))
    return step(model, loss)


def writes_own_weight(model):
    """Through memory that has no version, from within a layer."""
    last = model.layers[-1]

    class Writes(layers.Layer):
        def call(self, x):
            data = last.kernel._value.data
            with torch.no_grad():
                data.mul_(0.5)
            return last(x)

    x, said = local_rows(normal(6)), []
    for _ in range(3):
        y = model.layers[0](x)
        said.append(step(model, square(Writes()(y))))
    return said


def remat():
    with keras.RematScope(mode="full"):
        return deep()


def mixed():
    model = keras.Sequential([keras.Input((6,))])
    for i in range(3):
        model.add(
            layers.Dense(6, "tanh", name=f"dense{i}", dtype="mixed_bfloat16")
        )
    return model


def lora():
    model = deep()
    for layer in model.layers:
        layer.enable_lora(2)
    return model


def convolutions():
    return keras.Sequential(
        [
            keras.Input((5, 5, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.Flatten(),
            layers.Dense(3, name="dense"),
        ]
    )


def attention():
    inputs = keras.Input((4, 6))
    x = layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    return keras.Model(inputs, layers.GRU(3, name="gru")(x))


PROGRAMS = {
    "mlp": (mlp, trains),
    "own weights": (functools.partial(with_layer, Own), trains),
    "transforms": (functools.partial(with_layer, Transforms), trains),
    "tied and called twice": (Tied, tied),
    "two backward passes": (deep, twice_backward),
    "of inputs alone": (deep, of_inputs_alone),
    "of one weight": (deep, of_one_weight),
    "double backward": (deep, double_backward),
    "takes turns": (deep, takes_turns),
    "without gradients": (deep, without_gradients),
    "keeps weights": (deep, keeps_weights),
    "checkpoints": (deep, checkpoints),
    "save on cpu": (deep, saves_on_cpu),
    "writes its weight": (deep, writes_own_weight),
    "RematScope": (remat, trains),
    "mixed": (mixed, trains),
    "LoRA": (lora, trains),
    "convolutions": (convolutions, trains),
    "attention": (attention, trains),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, world_size):
    make_model, program = PROGRAMS[name]
    expected = parity.run(program, make_model)
    for distribution in distributions(world_size):
        actual = parity.run(program, make_model, distribution)
        parity.assert_equal_on_all(
            f"{name}, {distribution}",
            actual,
            expected,
            tolerance=5e-2 if name == "mixed" else parity.TOLERANCE,
        )


@pytest.mark.parametrize("rows", [1, 7])
def test_fit(rows, world_size):
    """Uneven rows, shards without any."""
    x, y = normal(5)[:rows], normal(3)[:rows]
    for distribution in distributions(world_size):
        parity.assert_parity(mlp, x, y, distribution, steps=3)


@contextlib.contextmanager
def watched(paths):
    """What is gathered, taken and reduced, in order.

    Args:
        paths: dict from ids of stored weights to their names.
    """
    events = []
    gather, reduction = in_flight.Gather, in_flight.Reduction
    take = order_lib.Order.take

    def names(parts):
        return " ".join(paths[id(part.weight)] for part in parts)

    class Gather(gather):
        def __init__(self, parts, context):
            events.append(("gather", names(parts)))
            super().__init__(parts, context)

    class Reduction(reduction):
        def start(self):
            events.append(("reduce", names(self._parts)))
            super().start()

    def noting(self, parts, context):
        events.append(("take", names(parts)))
        return take(self, parts, context)

    in_flight.Gather, in_flight.Reduction = Gather, Reduction
    order_lib.Order.take = noting
    try:
        yield events
    finally:
        in_flight.Gather, in_flight.Reduction = gather, reduction
        order_lib.Order.take = take


def watch_steps(model, steps=3):
    """The events of the last of some steps."""
    paths = {id(v._value): v.path.split("/", 1)[1] for v in model.variables}
    x = local_rows(normal(6))
    for _ in range(steps - 1):
        step(model, square(model(x)))
    with watched(paths) as events:
        step(model, square(model(x)))
    return events


@pytest.fixture
def large(monkeypatch):
    """Layers of these tests count as large: none waits for another."""
    monkeypatch.setattr(order_lib, "SMALL_BYTES", 0)


@pytest.mark.world(2)
def test_collectives_of_a_step(world_size, large):
    """One gather a layer, and one in backward for those whose input asks for
    a gradient; the last is kept. The next is begun before one is used, but for
    the last of backward."""
    (distribution,) = distributions(2)
    with parity.fresh(distribution, 1):
        events = watch_steps(deep(4))
    both = [f"dense{i}/kernel dense{i}/bias" for i in range(4)]
    assert events == [
        ("take", both[0]),
        ("gather", both[0]),
        ("gather", both[1]),
        ("take", both[1]),
        ("gather", both[2]),
        ("take", both[2]),
        ("gather", both[3]),
        ("take", both[3]),
        # Backward: the kernel of the last layer is here still.
        ("gather", "dense2/kernel"),
        ("reduce", both[3]),
        ("take", "dense2/kernel"),
        ("reduce", both[2]),
        ("take", "dense1/kernel"),
        ("gather", "dense1/kernel"),
        ("reduce", both[1]),
        ("reduce", both[0]),
    ]


@pytest.mark.world(2)
def test_collectives_of_a_checkpointed_step(world_size, large):
    """A layer that backward runs again gathers its weights as in forward: by
    one collective, the next on its way."""
    names = [f"dense{i}" for i in range(4)]
    (distribution,) = distributions(2)
    with parity.fresh(distribution, 1):
        with keras.RematScope(mode="list_of_layers", layer_names=names):
            model = deep(4)
        events = watch_steps(model)
    both = [f"dense{i}/kernel dense{i}/bias" for i in range(4)]
    assert events[8:] == [
        ("take", both[3]),
        ("gather", both[3]),
        ("gather", both[2]),
        ("reduce", both[3]),
        ("take", both[2]),
        ("gather", both[1]),
        ("reduce", both[2]),
        ("take", both[1]),
        ("reduce", both[1]),
        ("take", both[0]),
        ("gather", both[0]),
        ("reduce", both[0]),
    ]


@pytest.mark.world(2)
def test_small_layers_are_gathered_and_reduced_together(world_size):
    (distribution,) = distributions(2)
    with parity.fresh(distribution, 1):
        events = watch_steps(deep(4))
    both = [f"dense{i}/kernel dense{i}/bias" for i in range(4)]
    assert [event for event in events if event[0] != "take"] == [
        ("gather", both[0]),
        ("gather", " ".join(both[1:])),
        ("gather", "dense2/kernel dense1/kernel"),
        ("reduce", " ".join(reversed(both))),
    ]


@pytest.mark.world(2)
@pytest.mark.parametrize(
    "setting, again",
    [(True, 2), (False, 0), ({".*dense1.*": False}, 1)],
)
def test_reshard_after_forward(setting, again, world_size, large):
    (distribution,) = distributions(2)
    distribution.reshard_after_forward = setting
    with parity.fresh(distribution, 1):
        events = watch_steps(deep(4))
    counts = collections.Counter(kind for kind, _ in events)
    assert counts == {"gather": 4 + again, "take": 4 + again, "reduce": 4}


@pytest.mark.world(2)
@pytest.mark.parametrize("setting", [True, False])
def test_gathered_weights_are_freed(setting, world_size, large):
    alive = weakref.WeakSet()
    finish = in_flight.Gather.finish

    def noting(self):
        wholes = finish(self)
        alive.update(whole.untyped_storage() for whole in wholes)
        return wholes

    (distribution,) = distributions(2)
    distribution.reshard_after_forward = setting
    in_flight.Gather.finish = noting
    try:
        with parity.fresh(distribution, 1):
            model = deep(5)
            for _ in range(3):
                loss = square(model(local_rows(normal(6))))
                # The kernel that backward asks for first, or all but that of
                # the first layer, whose input asks for no gradient.
                forward = len(alive)
                step(model, loss)
                del loss
            assert forward == (1 if setting else 4)
            gc.collect()
            assert not alive
    finally:
        in_flight.Gather.finish = finish


@pytest.mark.world(2)
def test_a_weight_that_is_written_before_backward(world_size):
    """An error, as it is on one device."""

    def program(model):
        loss = square(model(local_rows(normal(6))))
        for v in model.trainable_variables:
            v.assign(v.value * 2)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            loss.backward()
        return trains(model)

    expected = parity.run(program, deep)
    (distribution,) = distributions(2)
    actual = parity.run(program, deep, distribution)
    parity.assert_equal_on_all("written", actual, expected)


@pytest.mark.world(2)
def test_an_activation_that_is_written_before_backward(world_size):
    class Writes(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(6,), name="scale")

        def call(self, x):
            y = torch.tanh(x)
            z = y * self.scale
            y.add_(1)
            return z

    def program(model):
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            square(model(local_rows(normal(6)))).backward()
        return 0

    def make_model():
        return keras.Sequential(
            [keras.Input((6,)), layers.Dense(6, name="dense"), Writes()]
        )

    (distribution,) = distributions(2)
    parity.run(program, make_model)
    parity.run(program, make_model, distribution)


@pytest.mark.world(2)
def test_hooks_are_put_back(world_size):
    disable = torch.autograd.graph.disable_saved_tensors_hooks
    (distribution,) = distributions(2)
    with parity.fresh(distribution, 1):
        model = deep()
        with pytest.raises(Exception):
            model(torch.ones(4, 3))
        trains(model)
    assert not resharding._is_on()
    assert torch.autograd.graph.disable_saved_tensors_hooks is disable


@pytest.mark.world(2)
def test_orders_are_bounded(world_size):
    (distribution,) = distributions(2)
    with parity.fresh(distribution, 1):
        for _ in range(order_lib.KEPT_ORDERS // 4):
            trains(deep(3), steps=1)
        assert len(current().order.orders) <= order_lib.KEPT_ORDERS


class Collectives(TorchDispatchMode):
    """Names of collectives, and how many numbers each is handed."""

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = tree.flatten(args)
            sizes = [x.numel() for x in tensors if torch.is_tensor(x)]
            self.met.append((func.__name__.partition(".")[0], max(sizes)))
        return func(*args, **kwargs or {})


def update_twice(model, optimizer):
    """Returns what the second update communicates."""
    for _ in range(2):
        model.zero_grad()
        square(model(local_rows(normal(6)))).backward()
        variables = model.trainable_variables
        grads = [v.value.grad for v in variables]
        with torch.no_grad(), Collectives() as collectives:
            optimizer.apply(grads, variables)
    return collectives.met


def assert_as_one_device(program, world_size):
    one_device = parity.run(program, deep)
    for distribution in distributions(world_size):
        actual = parity.run(program, deep, distribution)
        parity.assert_equal_on_all(f"{distribution}", actual, one_device)


# What an update of four matrices of 6 x 6 and four biases communicates.
UPDATES = {
    "clipvalue": ({"clipvalue": 0.02}, []),
    "clipnorm": ({"clipnorm": 0.01}, [("allreduce_", 8)]),
    "global_clipnorm": ({"global_clipnorm": 0.01}, [("allreduce_", 8)]),
    "average": ({"use_ema": True, "ema_overwrite_frequency": 1}, []),
    "decay": ({"weight_decay": 0.1}, []),
}


@pytest.mark.parametrize("name", UPDATES)
def test_collectives_of_an_update(name, world_size):
    arguments, expected = UPDATES[name]

    def program(model):
        optimizer = keras.optimizers.SGD(0.1, **arguments)
        met = update_twice(model, optimizer)
        if keras.distribution.distribution() is not None:
            assert met == expected
        return [numpy(v) for v in model.variables]

    assert_as_one_device(program, world_size)


# Of each variable two norms; of each two numbers, and rows and columns.
BY_NORMS = {
    "Lamb": ({"epsilon": 1e-3}, [("allreduce_", 16)]),
    "Adafactor": ({}, [("allreduce_", 8 + 4 * 12), ("allreduce_", 8)]),
}


@pytest.mark.parametrize("name", BY_NORMS)
def test_optimizers_that_ask_for_norms(name, world_size):
    """One all-reduce of all variables, no gradient and no slot gathered."""
    arguments, expected = BY_NORMS[name]

    def program(model):
        optimizer = getattr(keras.optimizers, name)(0.1, **arguments)
        met = update_twice(model, optimizer)
        if keras.distribution.distribution() is not None:
            assert met == expected
        return [numpy(v) for v in [*model.variables, *optimizer.variables]]

    assert_as_one_device(program, world_size)


@pytest.mark.parametrize("axis", [0, 1, (0, 1)])
def test_constraints_add_up_norms(axis, world_size):
    """And gather no weight."""

    def program(model):
        constraint = keras.constraints.MaxNorm(0.5, axis=axis)
        for layer in model.layers:
            layer.kernel.constraint = constraint
        optimizer = keras.optimizers.SGD(0.1)
        met = update_twice(model, optimizer)
        if keras.distribution.distribution() is not None:
            assert all(size <= 8 for _, size in met), met
        return [numpy(v) for v in model.variables]

    assert_as_one_device(program, world_size)
