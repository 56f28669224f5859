import random
import sys
import types
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.utils import rng_utils


@pytest.mark.parametrize(
    "address, url",
    [
        ("10.0.0.1:1234", "tcp://10.0.0.1:1234"),
        ("some.host:80", "tcp://some.host:80"),
        ("some.host", "tcp://some.host:29500"),
        ("[::1]:1234", "tcp://[::1]:1234"),
        ("[::1]", "tcp://[::1]:29500"),
        ("::1", "tcp://[::1]:29500"),
        ("fe80::1:2", "tcp://[fe80::1:2]:29500"),
    ],
)
def test_tcp_url(address, url):
    assert process_group._tcp_url(address) == url


@pytest.mark.parametrize("address", [":1234", "host:port", "[]:1", "host:-1"])
def test_tcp_url_of_a_wrong_address(address):
    with pytest.raises(ValueError, match="host:port.*IPv6.*Received"):
        process_group._tcp_url(address)


@pytest.mark.parametrize(
    "addresses, number, expected",
    [
        (None, None, (None, None)),
        ("", 2, (None, 2)),
        (" , ", 2, (None, 2)),
        ("a:1", None, ("a:1", None)),
        ("a:1", 3, ("a:1", 3)),
        ("a:1, b:1", None, ("a:1", 2)),
        ("a:1,b:1,", 2, ("a:1", 2)),
        ("[::1]:1,[::2]:1", None, ("[::1]:1", 2)),
    ],
)
def test_resolve_addresses(addresses, number, expected):
    assert process_group._resolve_addresses(addresses, number) == expected


def test_resolve_addresses_with_another_number_of_processes():
    with pytest.raises(ValueError, match="2 jobs, but num_processes is 3"):
        process_group._resolve_addresses("a:1,b:1", 3)


def test_start_without_an_address(no_world):
    with pytest.raises(ValueError, match="`job_addresses`.*2 processes"):
        process_group.start(num_processes=2, process_id=0)


def test_start_without_a_number_of_processes(no_world):
    with pytest.raises(ValueError, match="`num_processes` is needed"):
        process_group.start("localhost:1")
    with pytest.raises(ValueError, match="KERAS_DISTRIBUTION_PROCESS_ID"):
        process_group.start("localhost:1", num_processes=2)


@pytest.mark.parametrize("rank", [-1, 2])
def test_start_with_a_process_id_out_of_range(no_world, rank):
    with pytest.raises(ValueError, match=f"process_id={rank}, num_processes=2"):
        process_group.start("localhost:1", 2, rank)


def test_start_with_a_process_id_and_nothing_else(no_world):
    with pytest.raises(ValueError, match="`num_processes` is needed"):
        process_group.start(process_id=1)
    assert not process_group.is_running()


def test_arguments_win_over_the_launcher(no_world, monkeypatch):
    joined = []
    monkeypatch.setattr(
        process_group, "_join", lambda *args, **kwargs: joined.append(args)
    )
    monkeypatch.setattr(process_group, "agree_on_seed", lambda: None)
    for name, value in (
        ("RANK", "1"),
        ("WORLD_SIZE", "4"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    process_group.start()
    process_group.start(process_id=2)
    process_group.start("localhost:1", num_processes=8, process_id=7)
    assert joined == [(4, 1), (4, 2), (8, 7)]


def test_second_start(fake_world, monkeypatch):
    monkeypatch.setattr(process_group, "agree_on_seed", lambda: None)
    fake_world(4, rank=1)
    group = dist.group.WORLD
    process_group.start()
    process_group.start(num_processes=4, process_id=1)
    assert dist.group.WORLD is group
    for arguments in ({"num_processes": 2}, {"process_id": 0}):
        with pytest.raises(
            ValueError, match="already running.*num_processes=4, process_id=1"
        ):
            process_group.start(**arguments)


def test_num_processes_without_a_launcher_starts_nothing(no_world):
    assert process_group.num_processes() == 1
    assert process_group.process_id() == 0
    assert not process_group.is_running()


def test_num_processes(fake_world):
    fake_world(4, rank=3)
    assert process_group.num_processes() == 4
    assert process_group.process_id() == 3


def test_local_rank(fake_world, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fake_world(4, rank=3)
    assert process_group.local_rank() == 1
    assert [process_group.local_rank(rank) for rank in range(4)] == [0, 1] * 2
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert process_group.local_rank() == 0
    assert process_group.local_rank(3) == 1


class Seed:
    """The seed of this process, and what process 0 says of its own."""

    def __init__(self, monkeypatch, mine, of_process_0):
        self.value = mine
        monkeypatch.setattr(rng_utils, "get_random_seed", lambda: self.value)
        monkeypatch.setattr(rng_utils, "set_random_seed", self.set)
        monkeypatch.setattr(dist, "broadcast", self.broadcast)
        self.of_process_0 = of_process_0

    def set(self, value):
        self.value = value

    def broadcast(self, seeds, src):
        assert src == 0
        self.sent = seeds.tolist()
        if self.of_process_0 is not None:
            seeds.copy_(torch.tensor(self.of_process_0))


def test_agree_on_seed_takes_that_of_process_0(fake_world, monkeypatch):
    fake_world(2, rank=1)
    seed = Seed(monkeypatch, None, [0, 123])
    process_group.agree_on_seed()
    assert seed.value == 123


def test_agree_on_seed_leaves_the_users(fake_world, monkeypatch):
    fake_world(2)
    seed = Seed(monkeypatch, 0, None)
    process_group.agree_on_seed()
    assert seed.value == 0
    assert seed.sent == [1, 0]


def test_agree_on_seed_draws_one(fake_world, monkeypatch):
    fake_world(2)
    random.seed(1)
    seed = Seed(monkeypatch, None, None)
    process_group.agree_on_seed()
    assert seed.sent == [0, seed.value]


def test_agree_on_seed_of_different_seeds(fake_world, monkeypatch):
    fake_world(2, rank=1)
    Seed(monkeypatch, 5, [1, 6])
    with pytest.raises(ValueError, match="same random seed.*seed 5.*6 on proc"):
        process_group.agree_on_seed()


@pytest.mark.parametrize(
    "has_nccl, gpus, lacks",
    [
        (True, 2, None),
        (True, 1, "2 processes share 1"),
        (False, 2, "no NCCL"),
    ],
)
def test_backend_on_gpus(no_world, monkeypatch, caplog, has_nccl, gpus, lacks):
    joined = {}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(process_group, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, **kwargs: joined.update(backend=backend, **kwargs),
    )
    monkeypatch.setattr(process_group.atexit, "register", lambda *args: None)
    monkeypatch.setattr(process_group.private, "store_of_all", lambda: None)
    for each in (process_group.watch, process_group.failures):
        monkeypatch.setattr(each, "begin", lambda *args: None)
    monkeypatch.setattr(process_group, "_after_leaving", [])
    weakrefs = types.SimpleNamespace(ref=lambda group: None)
    monkeypatch.setattr(process_group, "weakref", weakrefs)
    monkeypatch.setattr(process_group, "_before_leaving", [])
    patched = []
    monkeypatch.setattr(
        process_group.gloo_on_gpus, "install", lambda: patched.append(True)
    )
    for rank in (0, 1):
        process_group._join(2, rank)
    if lacks is None:
        assert joined["backend"] == "cpu:gloo,cuda:nccl"
        assert joined["device_id"] == torch.device("cuda", 1)
        assert not patched
        assert not caplog.records
    else:
        assert joined["backend"] == "gloo"
        assert "device_id" not in joined
        assert patched
        # Said once, with the reason.
        assert [lacks in record.getMessage() for record in caplog.records] == [
            True
        ]


@pytest.mark.parametrize(
    "call",
    [
        process_group.start,
        process_group.num_processes,
        process_group.process_id,
        process_group.ensure_running,
    ],
)
def test_launcher_that_tells_half(no_world, monkeypatch, call):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        ValueError, match=r"WORLD_SIZE=2.*\['MASTER_ADDR', 'MASTER_PORT'\]"
    ):
        call()
    assert not process_group.is_running()
    monkeypatch.setenv("WORLD_SIZE", "1")
    call()


def test_launcher_that_tells_nothing(no_world, monkeypatch):
    monkeypatch.setattr(process_group, "_said", set())
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.warns(UserWarning, match="mpirun has started 4 processes"):
        process_group.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process_group.num_processes()


def launch(monkeypatch):
    for name, value in zip(process_group.LAUNCH, ("1", "2", "host", "80")):
        monkeypatch.setenv(name, value)


def test_worker_of_a_loader(no_world, monkeypatch):
    launch(monkeypatch)
    monkeypatch.setattr(
        torch.utils.data, "get_worker_info", lambda: types.SimpleNamespace()
    )
    for call in (process_group.start, process_group.ensure_running):
        with pytest.raises(RuntimeError, match="`DataLoader`'s.*__main__"):
            call()
    # What needs no others is told.
    assert process_group.num_processes() == 2
    assert process_group.process_id() == 1


def test_process_that_a_joined_one_has_started(no_world, monkeypatch):
    launch(monkeypatch)
    name = process_group._name_in_job()
    monkeypatch.setenv(process_group.JOINED, name)
    assert not process_group._is_worker()
    monkeypatch.setenv(process_group.JOINED, f"0 {name.partition(' ')[2]}")
    with pytest.raises(RuntimeError, match="a worker of process 1"):
        process_group.start()
    # One that is started as a process of another job.
    monkeypatch.setenv("MASTER_PORT", "81")
    assert not process_group._is_worker()


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo,cuda:nccl"])
def test_leaving(fake_world, monkeypatch, failed, backend):
    fake_world(2)
    calls = []
    monkeypatch.setattr(
        dist, "destroy_process_group", lambda: calls.append("destroyed")
    )
    monkeypatch.setattr(
        process_group.private,
        "abort_groups",
        lambda: calls.append("aborted"),
    )
    monkeypatch.setattr(dist, "get_backend_config", lambda: backend)
    monkeypatch.setattr(
        sys, "last_value", ValueError() if failed else None, raising=False
    )
    released = []
    monkeypatch.setattr(process_group, "_before_leaving", [])
    process_group.before_leaving(lambda: released.append(list(calls)))
    process_group._leave(weakref.ref(dist.group.WORLD))
    assert released == [[]]
    waits_for_nobody = failed and "nccl" in backend
    assert calls == ["aborted" if waits_for_nobody else "destroyed"]
    monkeypatch.undo()


@pytest.mark.parametrize("seconds", [0, -1, "10", None])
def test_timeout_that_is_none(seconds, no_world):
    with pytest.raises(ValueError, match="number of seconds.*Received"):
        process_group.set_timeout(seconds)


def test_timeout(no_world, monkeypatch):
    monkeypatch.setattr(process_group, "_timeout", [None])
    assert process_group.timeout() is None
    monkeypatch.setenv(process_group.TIMEOUT, "soon")
    with pytest.raises(ValueError, match="more than 0. Received.*'soon'"):
        process_group.timeout()
    monkeypatch.setenv(process_group.TIMEOUT, "20")
    assert process_group.timeout() == 20
    process_group.set_timeout(30)
    assert process_group.timeout() == 30
