"""Runs the tests on the torch backend, with this tree laid over Keras."""

import os
import pathlib
import threading

import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")

# Before pytest makes a module `keras` of the folder of that name.
import keras  # noqa: E402, F401


def pytest_addoption(parser):
    parser.addoption(
        "--differences",
        action="store_true",
        help="print how far each integration test's numbers are from those of "
        "one device, at most",
    )
    parser.addoption(
        "--on-gpu",
        action="store_true",
        help="run the processes of all integration tests on the GPUs of this "
        "machine, which they share",
    )
    parser.addoption(
        "--simulate-gpu",
        action="store_true",
        help="run the integration tests, those of a GPU too, on a device that "
        "torch takes for a GPU and that computes on the host",
    )


def pytest_configure(config):
    # Without this tree underneath, tests would judge released Keras, or
    # another checkout.
    here = pathlib.Path(__file__).parent / "keras"
    try:
        from keras_torch_distribution import overlay
    except ImportError:
        found = "nothing"
    else:
        found = overlay.ROOT
    if found != here:
        raise pytest.UsageError(
            f"The tests need this tree installed in place: run "
            f"`pip install -e .` in {here.parent}. "
            f"Expected the overlay at {here}. Received: {found}"
        )


LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@pytest.fixture
def no_world(monkeypatch):
    """No process group, no launcher and no distribution, before and after."""
    import torch.distributed as dist

    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def leave():
        keras.distribution.set_distribution(None)
        if dist.is_initialized():
            dist.destroy_process_group()

    leave()
    yield
    leave()


@pytest.fixture
def fake_world(no_world):
    """A function that makes this process one of `world_size`.

    Collectives do nothing: what comes out of a sum is what this process gave.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def join(world_size=4, rank=0):
        keras.distribution.set_distribution(None)
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(
            "fake", store=FakeStore(), rank=rank, world_size=world_size
        )

    return join


class _ThreadLocalSlot(threading.local):
    """The slot that `rows` keeps the rows of the current step in."""

    rows = None

    def __getitem__(self, index):
        return self.rows

    def __setitem__(self, index, rows):
        self.rows = rows


@pytest.fixture
def on_threads(no_world, monkeypatch):
    """A function that calls `function(rank)` on threads that play processes.

    Their collectives are real. It returns the results, by rank.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import _set_thread_isolation_mode
    from torch.testing._internal.distributed import multi_threaded_pg

    from keras.src.backend.torch.distribution.mesh import rows

    monkeypatch.setattr(rows, "_current", _ThreadLocalSlot())

    def run(world_size, function):
        store = dist.HashStore()
        results, errors = [None] * world_size, []

        def play(rank):
            try:
                dist.init_process_group(
                    "threaded", store=store, rank=rank, world_size=world_size
                )
                results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                multi_threaded_pg.ProcessLocalGroup.exception_handle(error)
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()

        _set_thread_isolation_mode(True)
        multi_threaded_pg._install_threaded_pg()
        multi_threaded_pg.ProcessLocalGroup.reset()
        try:
            threads = [
                threading.Thread(target=play, args=(rank,), daemon=True)
                for rank in range(world_size)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=60)
            assert not any(thread.is_alive() for thread in threads)
        finally:
            multi_threaded_pg._uninstall_threaded_pg()
            _set_thread_isolation_mode(False)
        if errors:
            raise errors[0]
        return results

    return run
