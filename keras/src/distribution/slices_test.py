import itertools

import h5py
import ml_dtypes
import numpy as np
import pytest

from keras.src.distribution import slices

SHAPES = [(), (1,), (13,), (7, 5), (4, 1, 9), (3, 4, 5, 2), (0, 3)]


@pytest.fixture(params=[1, 1 << 20])
def shortest(request, monkeypatch):
    monkeypatch.setattr(slices, "SHORTEST", request.param)
    monkeypatch.setattr(slices, "PIECE", 64)


def stored(path, value, **kwargs):
    """A dataset and what reads it; the bytes that it has read in its list."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", data=value, **kwargs)
        if value.dtype == ml_dtypes.bfloat16:
            dataset.attrs["dtype"] = "bfloat16"
    opened, read = slices.Opened(path), []
    released = opened.read_at

    def read_at(offset, buffer):
        read.append(memoryview(buffer).nbytes)
        released(offset, buffer)

    opened.read_at = read_at
    dataset = h5py.File(opened, "r")["x"]
    return dataset, slices.Slices.of(opened, dataset), read


def boxes(shape, rng):
    yield [(0, size) for size in shape]
    for dim, size in enumerate(shape):
        for i in range(2):
            box = [(0, n) for n in shape]
            box[dim] = (size * i // 2, size * (i + 1) // 2)
            yield box
    for _ in range(5):
        yield [tuple(sorted(rng.integers(0, n + 1, 2))) for n in shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_parts(shape, tmp_path, shortest):
    rng = np.random.default_rng(1)
    value = rng.normal(size=shape).astype("float32")
    dataset, x, _ = stored(tmp_path / "m.h5", value)
    if not value.size:
        # HDF5 gives it no place.
        assert x is None
        return
    assert x.shape == shape and x.dtype == value.dtype
    for box in boxes(shape, rng):
        part = x.read_part(box)
        expected = value[tuple(slice(*pair) for pair in box)]
        np.testing.assert_array_equal(part, expected)
    np.testing.assert_array_equal(np.asarray(x), value)
    positions = rng.integers(0, value.size, 5)
    np.testing.assert_array_equal(
        x.take(positions.tolist()), value.reshape(-1)[positions]
    )


@pytest.mark.parametrize(
    "dtype",
    "float16 float32 float64 bfloat16 int8 uint32 int64 bool >f4 complex64"
    "".split(),
)
def test_dtypes(dtype, tmp_path):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    value = (np.arange(40).reshape(5, 8) % 7 - 2).astype(dtype)
    _, x, _ = stored(tmp_path / "m.h5", value)
    assert x.dtype == value.dtype
    part = x.read_part([(1, 4), (2, 7)])
    assert part.dtype == value.dtype
    np.testing.assert_array_equal(part, value[1:4, 2:7])


@pytest.mark.parametrize("cut", list(itertools.product([1, 4], [1, 4])))
def test_it_reads_what_it_keeps(cut, tmp_path):
    value = np.zeros((400, 1000), "float32")
    _, x, read = stored(tmp_path / "m.h5", value)
    read.clear()
    kept = x.read_part([(0, n // parts) for n, parts in zip(x.shape, cut)])
    assert sum(read) == kept.nbytes
    assert len(read) == (1 if cut[1] == 1 else len(kept))


def test_it_reads_short_rows_with_what_lies_between(tmp_path):
    value = np.zeros((4000, 8), "float32")
    _, x, read = stored(tmp_path / "m.h5", value)
    read.clear()
    x.read_part([(0, 4000), (2, 4)])
    assert sum(read) == value.nbytes and len(read) == 1


@pytest.mark.parametrize(
    "kwargs", [{"chunks": (2, 3)}, {"compression": "gzip"}]
)
def test_what_does_not_lie_there_as_it_is(kwargs, tmp_path):
    value = np.ones((4, 6), "float32")
    dataset, x, _ = stored(tmp_path / "m.h5", value, **kwargs)
    assert x is None
    np.testing.assert_array_equal(dataset, value)


def test_text(tmp_path):
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file["x"] = ["a", "b"]
    opened = slices.Opened(path)
    assert slices.Slices.of(opened, h5py.File(opened, "r")["x"]) is None


def test_a_file_that_ends_too_early(tmp_path):
    path = tmp_path / "m.h5"
    _, x, _ = stored(path, np.ones((100, 100), "float32"))
    with open(path, "r+b") as file:
        file.truncate(3000)
    with pytest.raises(EOFError, match="m.h5 ends at byte"):
        x.read_part([(50, 100), (0, 100)])
