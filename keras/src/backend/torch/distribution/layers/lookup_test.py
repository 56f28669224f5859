import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard

from keras.src import layers
from keras.src.backend.torch.distribution.layers import lookup
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.distribution.distribution_lib import DeviceMesh
from keras.src.distribution.distribution_lib import LayoutMap
from keras.src.distribution.distribution_lib import ModelParallel

WORLD = 2
INDICES = torch.tensor([[0, 3, 4], [-1, 3, -5]])


def build(axes, vocabulary=5, width=4):
    mesh = DeviceMesh(
        (1, WORLD), ["batch", "model"], [f"cpu:{i}" for i in range(WORLD)]
    )
    layout_map = LayoutMap(mesh)
    layout_map[".*embeddings"] = axes
    with ModelParallel(layout_map=layout_map).scope():
        layer = layers.Embedding(vocabulary, width)
        layer.build()
        context = context_lib.current()
    table = np.arange(vocabulary * width).reshape(vocabulary, width) + 1.0
    layer.embeddings.assign(table.astype("float32"))
    return layer, context, torch.tensor(table, dtype=torch.float32)


def test_each_process_gives_its_part_of_the_vectors(fake_world):
    pieces = []
    for rank in range(WORLD):
        fake_world(WORLD, rank)
        layer, context, table = build((None, "model"))
        y = lookup.look_up(layer, INDICES, context)
        assert y.placements == (Shard(2),)
        assert y.shape == (2, 3, 4)
        pieces.append(sharded.local_of(y))
    expected = table[INDICES]
    torch.testing.assert_close(torch.cat(pieces, 2), expected)


@pytest.mark.parametrize("vocabulary", [5, 6, 1])
def test_each_process_gives_its_part_of_the_vocabulary(fake_world, vocabulary):
    indices = INDICES % vocabulary
    parts = []
    for rank in range(WORLD):
        fake_world(WORLD, rank)
        layer, context, table = build(("model", None), vocabulary)
        y = lookup.look_up(layer, indices, context)
        assert not isinstance(y, DTensor)
        parts.append(y)
    # The sum over processes does nothing here.
    torch.testing.assert_close(sum(parts), table[indices])
    found = torch.stack([(y != 0).all(-1) for y in parts]).sum(0)
    assert torch.equal(found, torch.ones_like(indices))


@pytest.mark.parametrize("axes", [("model", None), (None, "model")])
@pytest.mark.parametrize("index", [5, -6, 8])
def test_index_outside_of_the_vocabulary(fake_world, axes, index):
    for rank in range(WORLD):
        fake_world(WORLD, rank)
        layer, context, _ = build(axes)
        with pytest.raises(IndexError):
            lookup.look_up(layer, torch.tensor([0, index]), context)


def test_style_applies_to_plain_indices_only(fake_world):
    fake_world(WORLD)
    layer, context, _ = build(("model", None))
    style = lookup.LookupStyle()
    assert style.applies(layer, [INDICES])
    assert not style.applies(layer, [INDICES, None])
    carried = sharded.wrap(INDICES, context.model_mesh, [Shard(0)], (4, 3))
    assert not style.applies(layer, [carried])
    layer.enable_lora(2)
    assert not style.applies(layer, [INDICES])
