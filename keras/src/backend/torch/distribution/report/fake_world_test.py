import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

import keras
from keras.src.backend.torch.distribution.report import collectives
from keras.src.backend.torch.distribution.report import fake_world


def test_the_others_are_like_this_process(no_world):
    with fake_world.of(4, 1):
        assert keras.distribution.list_devices() == [
            f"cpu:{i}" for i in range(4)
        ]
        x = torch.ones(3)
        dist.all_reduce(x)
        assert x.tolist() == [4.0, 4.0, 4.0]
        dist.all_reduce(x, dist.ReduceOp.MAX)
        assert x.tolist() == [4.0, 4.0, 4.0]
        y = torch.empty(2)
        dist.reduce_scatter_single(y, torch.arange(8.0))
        assert y.tolist() == [8.0, 12.0]
        gathered = [torch.empty(2) for _ in range(4)]
        dist.all_gather(gathered, y)
        assert all(torch.equal(each, y) for each in gathered)
        z = functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD)
        assert (z + 0).tolist() == [4.0, 4.0]
        said = [None] * 4
        dist.all_gather_object(said, {"rank": 1})
        assert said == [{"rank": 1}] * 4
    assert not dist.is_initialized()


def test_it_is_left_after_an_error(no_world):
    keras.distribution.initialize()
    with pytest.raises(ValueError, match="of one's own"):
        with fake_world.of(2):
            raise ValueError("of one's own")
    assert not dist.is_initialized()


def test_not_in_a_job(fake_world):
    fake_world(2)
    from keras.src.backend.torch.distribution.report import fake_world as room

    with pytest.raises(RuntimeError, match="job of 2 processes"):
        with room.of(4):
            pass


def test_bytes(no_world):
    with fake_world.of(4), collectives.CollectiveCounter() as counter:
        dist.all_reduce(torch.ones(3))
        functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD) + 0
        dist.broadcast(torch.ones(5, dtype=torch.float16), 0)
        dist.barrier()
    assert counter.calls == {"all_reduce": 2, "broadcast": 1, "barrier": 1}
    assert counter.bytes == {"all_reduce": 20, "broadcast": 10, "barrier": 0}
    for op, sent in (
        ("all_reduce", 150),
        ("all_gather", 300),
        ("reduce_scatter", 75),
        ("broadcast", 75),
        ("send", 100),
    ):
        assert collectives.sent_bytes(op, 100, 4) == sent
