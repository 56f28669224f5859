"""What tests of gradients share: models, passes, and what they give."""

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint

import keras
from integration_tests.harness import parity
from keras import layers
from keras import ops
from keras.src.backend.torch.distribution.mesh.context import current

# Cut by hand into equal shards. Where Keras cuts, batches are uneven.
ROWS = 8
# Rules for all models of this file: the names say how a layer is sharded.
LAYOUTS = {
    ".*column.*/kernel": (None, "model"),
    ".*column.*/bias": ("model",),
    ".*row.*/kernel": ("model", None),
    ".*table.*/embeddings": ("model", None),
    ".*spread.*/kernel": ("batch", None),
    ".*norm.*/gamma": ("model",),
    ".*own_weight": ("model", None),
}


def distributions(world_size):
    """Data shards only, model axes only, and both."""
    if world_size == 2:
        yield keras.distribution.DataParallel()
        yield parity.model_parallel((1, 2), LAYOUTS)
    yield parity.model_parallel((2, world_size // 2), LAYOUTS)


def run(program, distribution=None):
    """What a program returns, from the same state each time."""
    with parity.fresh(distribution, 5):
        return program()


def check(program, world_size):
    """Compares the nested arrays that a program returns."""
    expected = parity.on_one_device(lambda: run(program))
    for distribution in distributions(world_size):
        try:
            parity.assert_same(run(program, distribution), expected)
        except Exception as error:
            error.add_note(f"Under {distribution}.")
            raise


def normal(*shape):
    rng = np.random.default_rng(sum(shape))
    return rng.standard_normal((ROWS, *shape)).astype("float32")


def numpy(x):
    return None if x is None else ops.convert_to_numpy(x)


def gradients(model):
    return {v.path: numpy(v.value.grad) for v in model.trainable_variables}


def weights(model):
    return {v.path: numpy(v) for v in model.variables}


def local_rows(x):
    """What a hand-written step takes of a batch: the rows of its shard."""
    distribution = keras.distribution.distribution()
    if distribution is not None:
        mesh = distribution.device_mesh
        shards = mesh.shape[mesh.axis_names.index("batch")]
        x = np.split(x, shards)[distribution.data_shard_id]
    return ops.convert_to_tensor(x)


def all_rows(x):
    """What `local_rows` has cut, together again."""
    context = current()
    if context is None or context.data_size == 1:
        return x
    pieces = [torch.empty_like(x) for _ in range(context.data_size)]
    dist.all_gather(pieces, x, group=context.data_group)
    return torch.cat(pieces)


def backward(model, x):
    """One backward pass over a batch, without zeroing gradients."""
    ops.mean(model(local_rows(x), training=True) ** 2).backward()


def mlp(norm="norm", **kwargs):
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, "tanh", name="column", **kwargs),
            layers.Dense(6, name="row", **kwargs),
            layers.LayerNormalization(name=norm),
            layers.Dense(4, "tanh", name="spread", **kwargs),
            layers.Dense(2, name="whole", **kwargs),
        ]
    )
