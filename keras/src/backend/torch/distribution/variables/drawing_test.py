"""What a process draws of a value is bit by bit what the whole has there."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import keras
from keras.src import initializers
from keras.src import layers
from keras.src import random
from keras.src import tree
from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import drawing
from keras.src.distribution.distribution_lib import DeviceMesh
from keras.src.distribution.distribution_lib import LayoutMap
from keras.src.distribution.distribution_lib import ModelParallel

SHAPES = [(64,), (67,), (5, 7), (16, 3, 5), (3, 1, 50), (2, 3, 4, 11), (0, 9)]
DRAWS = [
    initializers.RandomNormal(0.3, 1.7, seed=5),
    initializers.RandomUniform(-0.7, 2.1, seed=6),
    initializers.TruncatedNormal(0.1, 0.4, seed=7),
    initializers.GlorotUniform(seed=8),
    initializers.HeNormal(seed=9),
    initializers.VarianceScaling(distribution="untruncated_normal", seed=2),
]


@pytest.fixture(params=[(16, 1), (48, 5), (1 << 20, 1 << 12)])
def small(request, monkeypatch):
    piece, shortest = request.param
    monkeypatch.setattr(drawing, "PIECE", piece)
    monkeypatch.setattr(drawing, "SHORTEST", shortest)
    monkeypatch.setattr(drawing, "SMALLEST", 16)


def parts(shape, rng):
    """Parts of a shape: all of it, each third of each dim, some boxes."""
    yield drawing.Part(shape, [(0, n) for n in shape])
    for dim, size in enumerate(shape):
        for i in range(3):
            cut = (size * i // 3, size * (i + 1) // 3)
            ranges = [(0, n) for n in shape]
            ranges[dim] = cut
            yield drawing.Part(shape, ranges)
    for _ in range(4):
        cuts = [sorted(rng.integers(0, n + 1, 2).tolist()) for n in shape]
        yield drawing.Part(shape, [tuple(pair) for pair in cuts])


def assert_drawn(initializer, part, dtype="float32"):
    whole = initializer(part.shape, dtype=dtype)
    value = drawing.draw(initializer, part, dtype)
    if part.origin is None:
        assert torch.equal(value, whole)
        return False
    assert value.dtype == whole.dtype
    expected = whole[tuple(slice(*pair) for pair in part.ranges)]
    assert torch.equal(value, expected), (part.shape, part.ranges)
    return True


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("initializer", DRAWS)
def test_parts_of_random_values(initializer, shape, small):
    rng = np.random.default_rng(math.prod(shape))
    numbers = math.prod(shape)
    is_drawn = [assert_drawn(initializer, part) for part in parts(shape, rng)]
    assert drawing.knows(initializer)
    # So that the test does look at parts.
    assert all(is_drawn) if numbers >= 16 else not any(is_drawn)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("initializer", DRAWS)
def test_dtypes(initializer, dtype, small):
    rng = np.random.default_rng(3)
    for part in parts((5, 7, 3), rng):
        is_drawn = assert_drawn(initializer, part, dtype)
        assert is_drawn or dtype != "float64"


@pytest.mark.parametrize("initializer", DRAWS)
def test_pieces_of_their_real_size(initializer):
    # Several of them, an odd number, cut by rows and by columns.
    shape = (1031, 1033)
    for ranges in ([(500, 1031), (0, 1033)], [(0, 1031), (517, 1033)]):
        assert assert_drawn(initializer, drawing.Part(shape, ranges))


def test_a_seed_generator_goes_on_as_it_does():
    shape, dtype = (300, 301), "float32"
    part = drawing.Part(shape, [(100, 200), (0, 301)])
    seeds = [random.SeedGenerator(4), random.SeedGenerator(4)]
    first, second = (initializers.RandomNormal(seed=seed) for seed in seeds)
    first(shape, dtype=dtype)
    drawing.draw(second, part, dtype)
    assert part.origin is not None
    assert torch.equal(first(shape, dtype=dtype), second(shape, dtype=dtype))


@pytest.mark.parametrize(
    "initializer, value",
    [
        (initializers.Zeros(), 0),
        (initializers.Ones(), 1),
        (initializers.Constant(3), 3),
        (initializers.Constant(0.1), 0.1),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_constants(initializer, value, dtype):
    part = drawing.Part((6, 4), [(2, 5), (1, 4)])
    assert drawing.knows(initializer)
    result = drawing.draw(initializer, part, dtype)
    assert torch.equal(result, initializer((3, 3), dtype=dtype))
    assert part.origin


def test_what_is_not_known_is_drawn_whole():
    class Own(initializers.RandomNormal):
        def __call__(self, shape, dtype=None):
            return super().__call__(shape, dtype) + 1

    assert not drawing.knows(Own())
    assert not drawing.knows(initializers.Orthogonal())
    assert not drawing.knows(initializers.Constant(np.ones((3,))))
    assert not drawing.knows(lambda shape, dtype: None)


def test_another_torch_draws_whole(monkeypatch):
    """Where numbers come in another order, nothing is drawn in parts."""
    monkeypatch.setattr(drawing, "BLOCK", 8)
    drawing.is_as_torch_draws.cache_clear()
    try:
        part = drawing.Part((300, 301), [(100, 200), (0, 301)])
        assert not assert_drawn(initializers.RandomNormal(seed=1), part)
        assert assert_drawn(initializers.RandomUniform(seed=1), part)
    finally:
        drawing.is_as_torch_draws.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [None, 7])
def test_parts_of_dropout(seed, shape, dtype, small):
    rng = np.random.default_rng(math.prod(shape))
    has_generator = seed is not None
    ones = torch.ones(shape, dtype=getattr(torch, dtype))
    for part in parts(shape, rng):
        assert drawing.can_drop(part, has_generator) == (ones.numel() >= 16)
        keras.utils.set_random_seed(3)
        whole = random.dropout(ones, 0.3, seed=seed)
        after = torch.get_rng_state()
        keras.utils.set_random_seed(3)
        generator = torch.Generator().manual_seed(7) if has_generator else None
        actual = drawing.dropout(generator, part, ones.dtype, 0.3)
        expected = whole[tuple(slice(*pair) for pair in part.ranges)]
        assert actual.dtype == ones.dtype
        assert torch.equal(actual, expected), part.ranges
        assert torch.equal(torch.get_rng_state(), after)


def test_other_draws_meanwhile_are_whole():
    part = drawing.Part((300, 301), [(100, 200), (0, 301)])
    with modes.drawing_part(part):
        assert random.normal((300, 302), seed=1).shape == (300, 302)
        assert random.gamma((300, 301), 1.0, seed=1).shape == (300, 301)
    assert part.origin is None


class Largest(TorchDispatchMode):
    """Within it, keeps the most numbers that a tensor has had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree.flatten(result):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return result


@pytest.mark.parametrize("axes", [("batch", None), ("model", "batch")])
@pytest.mark.parametrize("kernel", ["random_normal", "he_normal", "ones"])
def test_a_model_and_its_slots_are_made_as_shards(
    fake_world, kernel, axes, monkeypatch
):
    monkeypatch.setattr(drawing, "PIECE", 1 << 10)
    monkeypatch.setattr(drawing, "SMALLEST", 1 << 10)

    def build():
        keras.utils.set_random_seed(3)
        layer = layers.Dense(333, kernel_initializer=kernel)
        layer.build((None, 200))
        return layer

    fake_world(4, 2)
    whole = build().kernel.numpy()
    mesh = DeviceMesh(
        (2, 2), ["batch", "model"], [f"cpu:{i}" for i in range(4)]
    )
    layout_map = LayoutMap(mesh)
    layout_map[".*kernel"] = axes
    with ModelParallel(layout_map=layout_map).scope(), Largest() as largest:
        kernel = build().kernel
        optimizer = keras.optimizers.Adam()
        optimizer.build([kernel])
    local = sharded.local_of(kernel._value)
    ranges = laid_out.ranges(laid_out.layout_of(kernel._value))
    assert largest.numbers <= max(local.numel(), 4 * (drawing.PIECE + 32))
    assert local.numel() < whole.size
    expected = whole[tuple(slice(*pair) for pair in ranges)]
    np.testing.assert_array_equal(local.detach().numpy(), expected)
    slots = [v for v in optimizer.variables if v.shape == kernel.shape]
    assert len(slots) == 2
    for slot in slots:
        assert not sharded.local_of(slot._value).any()
        assert slot._value.placements == kernel._value.placements
