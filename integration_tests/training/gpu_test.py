"""On a GPU, the numbers are those of one process on the same GPU.

NCCL takes one process for each GPU. Two processes share one by gloo, which
takes tensors of a GPU too; so one GPU is enough for all of these tests.
"""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist

import keras
from integration_tests.harness import parity
from keras import layers
from keras import ops
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.training import feeding

pytestmark = [pytest.mark.gpu, pytest.mark.limit(120)]

ROWS, BATCH, LENGTH, WORDS, WIDTH = 11, 4, 6, 10, 8
LAYOUTS = {
    ".*embeddings": ("model", None),
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*down/kernel": ("model", None),
    ".*(query|key|value)/kernel": (None, "model", None),
    ".*attention_output/kernel": ("model", None, None),
}
DISTRIBUTIONS = {
    "data": lambda: keras.distribution.DataParallel(),
    "model": lambda: parity.model_parallel((1, 2), LAYOUTS),
    "fsdp": lambda: parity.model_parallel(
        (2, 1), {".*(up|down)/kernel": ("batch", None)}
    ),
}
# A GPU adds up in another order for another shape.
TOLERANCE = 1e-4


def data():
    rng = np.random.default_rng(1)
    x = rng.integers(0, WORDS, (ROWS, LENGTH)).astype("int32")
    return x, rng.integers(0, 3, ROWS).astype("int32")


def make_model():
    # Biases of keys and before a batch norm have no gradient but rounding:
    # beside numbers it does not count.
    biases = {"bias_initializer": "normal"}
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(WORDS, WIDTH, name="words")(inputs)
    x = x + layers.MultiHeadAttention(2, 4, name="attention", **biases)(x, x)
    x = layers.Dense(2 * WIDTH, "gelu", name="up")(x)
    x = layers.LayerNormalization()(x)
    x = layers.Dense(WIDTH, name="down", **biases)(x)
    x = layers.BatchNormalization()(layers.GlobalAveragePooling1D()(x))
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def program(model):
    x, y = data()
    assert all(v.value.device.type == "cuda" for v in model.variables)
    history = model.fit(
        x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0
    )
    return (
        history.history,
        model.evaluate(x, y, batch_size=BATCH, verbose=0),
        model.predict(x, batch_size=BATCH, verbose=0),
    )


@pytest.mark.world(2)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_training(name):
    expected = parity.run(program, make_model)
    actual = parity.run(program, make_model, DISTRIBUTIONS[name]())
    parity.assert_equal_on_all(name, actual, expected, TOLERANCE)


@pytest.mark.world(2)
@pytest.mark.parametrize("layer", ["up", "down", "words", "norm"])
def test_inputs_on_the_host(layer):
    """What a program hands a layer is taken to its device, as Keras does."""
    make = {
        "up": lambda: layers.Dense(8, name="up"),
        "down": lambda: layers.Dense(4, name="down"),
        "words": lambda: layers.Embedding(10, 4, name="words"),
        "norm": lambda: layers.LayerNormalization(name="norm"),
    }[layer]
    x = torch.arange(24).reshape(4, 6)
    x = x % 10 if layer == "words" else x / 10

    def run():
        keras.utils.set_random_seed(3)
        return ops.convert_to_numpy(make()(x))

    expected = parity.on_one_device(run)
    rules = {**LAYOUTS, ".*norm/gamma": ("model",)}
    with parity.model_parallel((1, 2), rules).scope():
        parity.assert_same(run(), expected)


@pytest.mark.world(2)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_files(name, tmp_path):
    x, y = data()
    with DISTRIBUTIONS[name]().scope():
        model = make_model()
        model.fit(x, y, batch_size=BATCH, verbose=0)
        expected = model.predict(x, verbose=0)
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        other = make_model()
        other.load_weights(tmp_path / "model.weights.h5")
        again = keras.models.load_model(tmp_path / "model.keras")
        for each in (other, again):
            parity.assert_same(each.predict(x, verbose=0), expected)


@pytest.mark.world(2)
@pytest.mark.parametrize("auto_shard", [True, False])
def test_feeding(auto_shard, monkeypatch):
    pinned = []
    pin_memory = torch.Tensor.pin_memory
    monkeypatch.setattr(
        torch.Tensor,
        "pin_memory",
        lambda x: pinned.append(tuple(x.shape)) or pin_memory(x),
    )
    x, y = data()
    distribution = keras.distribution.DataParallel(
        auto_shard_dataset=auto_shard
    )
    with distribution.scope():
        adapter = feeding.data_adapter(current(), x=x, y=y, batch_size=BATCH)
        batches = [batch[0] for batch in adapter.get_torch_dataloader()]
    index = current_rows(auto_shard)
    for (ours, targets), part in zip(batches, index, strict=True):
        assert ours.is_cuda and targets.is_cuda
        np.testing.assert_array_equal(ours.cpu(), x[part])
        np.testing.assert_array_equal(targets.cpu(), y[part])
    assert len(pinned) == 2 * len(batches)


def current_rows(auto_shard):
    """The rows of this process in batches of 4, 4 and 3."""
    if not auto_shard:
        return [slice(0, 4), slice(4, 8), slice(8, 11)]
    if dist.get_rank() == 0:
        return [slice(0, 2), slice(4, 6), slice(8, 10)]
    return [slice(2, 4), slice(6, 8), slice(10, 11)]


@pytest.mark.world(2)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_step_waits_for_the_gpu(name):
    """But for what Keras itself waits for on one device."""
    x, y = data()

    def waits(model):
        model.fit(x, y, batch_size=BATCH, verbose=0)  # What is made once.
        data_on_gpu = ops.convert_to_tensor(x[:4]), ops.convert_to_tensor(y[:4])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.train_function([data_on_gpu])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return len([w for w in caught if "synchroniz" in str(w.message)])

    allowed = parity.run(waits, make_model)["said"]
    assert parity.run(waits, make_model, DISTRIBUTIONS[name]())["said"] <= (
        allowed
    )


@pytest.mark.world(1)
@pytest.mark.skipif(
    not dist.is_nccl_available(), reason="this build of torch has no NCCL"
)
def test_nccl():
    """Of one process: the groups, and our collectives on tensors of a GPU."""
    keras.distribution.initialize()
    config = str(dist.get_backend_config(dist.group.WORLD))
    assert "cuda:nccl" in config and "cpu:gloo" in config
    group = dist.group.WORLD
    for device in ("cuda", "cpu"):
        x = torch.arange(6.0, device=device).view(2, 3)
        total = x.clone()
        dist.all_reduce(total)
        assert torch.equal(total, x)
        for dim in (0, 1):
            gathered = collectives.all_gather(x, dim, x.shape[dim], group)
            assert torch.equal(gathered, x)
        if device == "cuda":
            scattered = collectives.reduce_scatter(x, 1, group)
            assert torch.equal(scattered, x)
    # A backward pass through them, by NCCL's own threads.
    x = torch.ones(3, device="cuda", requires_grad=True)
    y = collectives.AllReduce.apply(x * 2.0, group)
    collectives.SumOverData.apply(y, 1.0, group).sum().backward()
    assert x.grad.tolist() == [2.0] * 3


@pytest.mark.world(1)
def test_one_process_is_one_device():
    expected = parity.run(program, make_model)
    for distribution in (
        keras.distribution.DataParallel(),
        parity.model_parallel((1, 1), LAYOUTS),
    ):
        actual = parity.run(program, make_model, distribution)
        parity.assert_same(actual, expected, TOLERANCE)
