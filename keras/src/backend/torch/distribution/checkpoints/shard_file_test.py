import pytest
import torch

from keras.src.backend.torch.distribution.checkpoints import shard_file
from keras.src.backend.torch.distribution.checkpoints.parts import Part


@pytest.mark.parametrize("dtype", shard_file.NAMES)
def test_each_dtype(dtype, tmp_path):
    path = tmp_path / "a"
    x = torch.arange(15).view(3, 5).to(dtype)
    # Before it, entries that are less wide.
    bits = torch.tensor([True, False, True])
    parts = {
        "bits": Part((3,), (0,), bits),
        "x": Part((9, 5), (6, 0), x),
        "number": Part((), (), torch.tensor(2.5)),
    }
    size = shard_file.write(path, parts)
    assert size == path.stat().st_size
    shards = shard_file.read_header(path)
    assert shards["x"].offsets == (6, 0) and shards["x"].shape == (3, 5)
    with shard_file.opened(path) as read:
        for name, part in parts.items():
            actual = read(shards[name])
            assert actual.dtype == part.local.dtype
            assert torch.equal(
                actual.contiguous().view(-1).view(torch.uint8),
                part.local.contiguous().view(-1).view(torch.uint8),
            )
            shard_file.check(actual, shards[name], name, path)


def test_part_of_a_tensor_that_is_not_contiguous(tmp_path):
    x = torch.randn(4, 6)
    part = Part((4, 6), (0, 2), x[:, 2:5])
    shard_file.write(tmp_path / "a", {"x": part})
    shards = shard_file.read_header(tmp_path / "a")
    with shard_file.opened(tmp_path / "a") as read:
        assert torch.equal(read(shards["x"]), x[:, 2:5])


def test_a_dtype_that_no_file_holds():
    x = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(ValueError, match="complex128.*'x' of shape"):
        shard_file.check_dtype("x", x)


def test_it_may_be_left(tmp_path):
    def leave():
        raise KeyError("left")

    with pytest.raises(KeyError):
        part = Part((2,), (0,), torch.zeros(2))
        shard_file.write(tmp_path / "a", {"x": part}, leave)
