import torch

from keras.src.backend.torch.distribution.gradients import buckets

MIB = 2**20
CPU = torch.device("cpu")


def sizes_of(gradients):
    """MiB of each bucket that these gradients make."""
    built = buckets.build(
        (i, torch.empty(int(size * MIB / 4), device="meta"), CPU)
        for i, size in enumerate(gradients)
    )
    assert [n for b in built for n in b.numbers] == list(range(len(gradients)))
    return [bucket.bytes / MIB for bucket in built]


def test_the_first_and_the_last_are_small():
    sizes = sizes_of([0.5] * 256)
    assert sizes[:5] == [1, 1, 2, 4, 8]
    assert max(sizes) == 25
    assert sizes[-1] <= 1
    assert all(b <= a for a, b in zip(sizes[-5:], sizes[-4:]))


def test_few_gradients():
    assert len(sizes_of([0.1, 0.2])) == 1
    assert sizes_of([]) == []


def test_one_dtype_and_device_a_bucket():
    likes = [
        torch.empty(4, dtype=dtype, device="meta")
        for dtype in (torch.float32, torch.float16, torch.float32)
    ]
    built = buckets.build((i, like, CPU) for i, like in enumerate(likes))
    assert [bucket.numbers for bucket in built] == [[0, 2], [1]]
