import types

import pytest
import torch
from torch.distributed.tensor import Shard

from keras.src import layers
from keras.src import random
from keras.src.backend.common import global_state
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import modes as modes_lib
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import drawing
from keras.src.utils import rng_utils


@pytest.fixture
def in_a_layer(no_world):
    """A function that draws what a layer of a data shard would."""

    def draw(function, index, shards=2):
        context = types.SimpleNamespace(
            has_layouts=False,
            data_size=shards,
            data_index=index,
            model_mesh=None,
        )
        global_state.set_global_attribute(
            "distribution",
            types.SimpleNamespace(
                **{marks.CONTEXT: context},
                get_tensor_layout=lambda path: None,
                draw_global_batch=False,
            ),
        )
        modes.calls += 1
        try:
            return function()
        finally:
            modes.calls -= 1
            global_state.set_global_attribute("distribution", None)

    return draw


def normal(seed=3):
    return random.normal((4, 5), seed=seed)


def test_without_a_distribution(no_world):
    torch.testing.assert_close(normal(), normal())
    generator = torch.Generator().manual_seed(3 + 0)
    x = random.uniform((3,), seed=3)
    torch.testing.assert_close(x, torch.rand(3, generator=generator))


def test_differs_between_data_shards(in_a_layer):
    draws = [in_a_layer(normal, index, 3) for index in range(3)]
    assert torch.equal(draws[0], normal())
    assert not torch.equal(draws[1], draws[0])
    assert not torch.equal(draws[1], draws[2])
    # Equal on the processes of one, and when it is repeated.
    assert torch.equal(draws[1], in_a_layer(normal, 1, 3))


def test_shards_do_not_meet_in_later_seeds(in_a_layer):
    # Keras adds a counter to its seeds.
    ours = [normal(seed) for seed in range(20)]
    others = [in_a_layer(lambda: normal(seed), 1) for seed in range(20)]
    assert not any(torch.equal(a, b) for a in ours for b in others)


def test_initial_values_are_equal_on_all_shards(in_a_layer):
    def draw():
        with modes_lib.drawing_initial_values():
            return normal()

    assert torch.equal(in_a_layer(draw, 1), normal())


def test_values_outside_of_layers_are_equal_on_all_shards(in_a_layer):
    def draw():
        modes.calls -= 1
        try:
            return normal()
        finally:
            modes.calls += 1

    assert torch.equal(in_a_layer(draw, 1), normal())


def test_dropout_without_a_distribution(no_world):
    x = torch.ones(1000)
    y = random.dropout(x, 0.25, seed=1)
    torch.testing.assert_close(y, random.dropout(x, 0.25, seed=1))
    kept = (y != 0).float().mean()
    assert 0.6 < kept < 0.9
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 4 / 3))


def test_dropout_differs_between_data_shards(in_a_layer):
    x = torch.ones(100)

    def mask(index, seed):
        return in_a_layer(lambda: random.dropout(x, 0.5, seed=seed), index)

    assert not torch.equal(mask(0, 1), mask(1, 1))
    assert torch.equal(mask(1, 1), mask(1, 1))


@pytest.mark.parametrize("make", [layers.Dropout, layers.GaussianNoise])
def test_state_stays_equal_with_different_numbers_of_rows(in_a_layer, make):
    following = []
    for index, rows in enumerate((3, 2)):
        rng_utils.set_random_seed(5)
        layer = make(0.5)
        in_a_layer(lambda: layer(torch.ones(rows, 4), training=True), index)
        following.append(torch.rand(()).item())
    assert following[0] == following[1]


@pytest.mark.parametrize("way", ["whole", "own", "another_torch"])
@pytest.mark.parametrize(
    "seed, noise_shape",
    [(None, None), (1, None), (1, (4, 1)), (1, (None, 6))],
)
def test_dropout_of_a_shard_is_its_part_of_one_mask(
    fake_world, monkeypatch, seed, noise_shape, way
):
    monkeypatch.setattr(drawing, "SMALLEST", 1 if way != "whole" else 100)
    if way == "another_torch":
        monkeypatch.setattr(drawing, "_drops_as_torch", lambda _: False)
    drawn = []
    dropout = drawing.dropout
    monkeypatch.setattr(
        drawing, "dropout", lambda *args: drawn.append(1) or dropout(*args)
    )
    x = torch.ones(4, 6)
    rng_utils.set_random_seed(3)
    expected = random.dropout(x, 0.5, noise_shape, seed=seed)
    after = torch.get_rng_state()
    pieces = []
    for rank in range(2):
        fake_world(2, rank)
        rng_utils.set_random_seed(3)
        mesh = torch.distributed.init_device_mesh(
            "cpu", (2,), mesh_dim_names=("model",)
        )
        context = types.SimpleNamespace(data_size=1, data_index=0)
        global_state.set_global_attribute(
            "distribution",
            types.SimpleNamespace(**{marks.CONTEXT: context}),
        )
        local = sharded.wrap(torch.ones(4, 3), mesh, (Shard(1),), (4, 6))
        modes.calls += 1
        try:
            y = random.dropout(local, 0.5, noise_shape, seed=seed)
        finally:
            modes.calls -= 1
            global_state.set_global_attribute("distribution", None)
        assert y.placements == (Shard(1),)
        assert torch.equal(torch.get_rng_state(), after)
        pieces.append(sharded.local_of(y))
    assert torch.equal(torch.cat(pieces, 1), expected)
    assert len(drawn) == (2 if way == "own" else 0)
