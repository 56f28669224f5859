"""Writing while training goes on.

A save copies what this process writes, and then a thread writes the copy: no
process group is of it, and no collective. The threads tell the first process
through the store of the job that their shards are on the disk, and its thread
makes them a checkpoint. Whether that failed anywhere all processes learn at
the next save, or when they wait.
"""

import datetime
import json
import os
import pathlib
import secrets
import sys
import threading
import time

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.checkpoints import folders
from keras.src.backend.torch.distribution.checkpoints import parts
from keras.src.backend.torch.distribution.checkpoints import reading
from keras.src.backend.torch.distribution.checkpoints import shard_file
from keras.src.backend.torch.distribution.mesh import together
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.mesh.context import logger

KEY = "keras_checkpoint/{}/{}"
# Seconds between two looks of the first process at who is done, and that it
# waits for the others where the program has ended.
PERIOD, LAST = 0.05, 60.0


class _Left(Exception):
    """The program has ended before the checkpoint."""


class Saver:
    """Writes checkpoints into a directory, one after the other.

    Args:
        directory: path-like, which all processes see.
        max_to_keep: int, how many complete ones it keeps; None for all.
    """

    def __init__(self, directory, max_to_keep=None):
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(
                "`max_to_keep` is a number of checkpoints, or None for all of "
                f"them. Received: max_to_keep={max_to_keep}"
            )
        self.directory = os.path.abspath(os.fspath(directory))
        self.max_to_keep = max_to_keep
        self._thread = self._writing = None

    def save(self, tensors, own, step, manifest, kept):
        """Copies what this process writes, and lets a thread write it.

        Waits for the checkpoint before it. Collective under a distribution:
        every process calls it.

        Args:
            tensors: dict from names to tensors, the same on all processes.
            own: what this process keeps of its own; written as JSON.
            step: int, for the name of the checkpoint.
            manifest: dict, of the first process, written as JSON.
            kept: dict from names to plain tensors, of the first process.
        """
        self.wait()
        with work(f"copying a checkpoint for {self.directory}"):
            rank, world = place()
            token = _token(world)
            mine, index = {}, {}
            for number, (name, x) in enumerate(tensors.items()):
                shard_file.check_dtype(name, x)
                dtype = shard_file.NAMES[x.dtype]
                index[name] = dtype, list(x.shape)
                part = parts.written(x, number)
                if part is not None:
                    mine[name] = part
            for name, x in kept.items():
                index[name] = shard_file.NAMES[x.dtype], list(x.shape)
                if rank == 0 and x.numel():
                    shape = tuple(x.shape)
                    mine[name] = parts.Part(shape, (0,) * x.ndim, x)
            mine = dict(zip(mine, parts.on_host(list(mine.values()))))
            text = json.dumps(own).encode()
            text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            mine[reading.own_name(rank)] = parts.Part(
                tuple(text.shape), (0,), text
            )
            manifest = {
                "format": folders.FORMAT,
                "version": folders.VERSION,
                **manifest,
                "processes": world,
                "tensors": index,
            }
            self._writing = _Writing(
                folders.unfinished(self.directory, token),
                *(mine, step, manifest, self.max_to_keep),
                *(token, rank, world),
            )
        # It lives until it is done, also where the program ends.
        self._thread = _Thread(self._writing)
        self._thread.start()

    def wait(self):
        """Waits until the last checkpoint is complete.

        Collective under a distribution: every process calls it.

        Returns:
            Its path; None without one.

        Raises:
            What any process has failed with, on all.
        """
        writing, thread = self._writing, self._thread
        self._writing = self._thread = None
        if writing is None:
            return None
        try:
            with work(f"writing a checkpoint to {self.directory}"):
                # All say that theirs is written, or raise, before the first
                # is waited for: a process that is gone is found out there.
                writing.written.wait()
                writing.check()
                together.go_on()
                thread.join()
                writing.check()
        finally:
            writing.stop()
            thread.join()
        return folders.latest(self.directory)


class _Thread(threading.Thread):
    def __init__(self, writing):
        super().__init__(
            target=writing.run, name="keras-checkpoint", daemon=False
        )
        self.writing = writing


def end_left(path):
    """Lets this process finish what an exception has left under way: it will
    be the newest checkpoint, and removes the oldest.

    Waits for the disk, and for some time for other processes, which may have
    left as well.

    Args:
        path: path-like, of a directory of checkpoints, or of one in it.
    """
    path = pathlib.Path(os.path.abspath(path))
    for thread in threading.enumerate():
        if not isinstance(thread, _Thread):
            continue
        writing = thread.writing
        if writing.folder.parent not in (path, path.parent):
            continue
        writing.written.wait()
        thread.join(LAST)
        if thread.is_alive():
            logger.warning(
                "A checkpoint in %s has been begun, and other processes have "
                "not written their parts of it for %s s: it is left out.",
                writing.folder.parent,
                LAST,
            )


class _Writing:
    """One checkpoint that is written: the work of a thread.

    Attributes:
        written: event, when this process has done its part.
        error: what it has failed with, or None.
    """

    def __init__(
        self, folder, mine, step, manifest, max_to_keep, token, rank, world
    ):
        self.folder, self.mine = folder, mine
        self.step, self.manifest = step, manifest
        self.max_to_keep, self.token = max_to_keep, token
        self.rank, self.world = rank, world
        self.written = threading.Event()
        self._stopped = threading.Event()
        self.error = None
        # The store's own connection is of the main thread.
        self._store = None
        if world > 1:
            self._store = private.store_of_all().clone()
            self._store.set_timeout(datetime.timedelta(seconds=10))

    def stop(self):
        """Lets the thread end, though nothing comes of it."""
        self._stopped.set()

    def check(self):
        if self.error is not None:
            raise self.error

    def run(self):
        try:
            self._write()
            self.written.set()
            if self.rank == 0:
                self._finish(self._sizes())
        except _Left:
            pass
        except Exception as error:
            self.error = error
        finally:
            # Copies, and a connection, end with the work.
            self.mine = self._store = None
            self.written.set()

    def _write(self):
        name = shard_file.name_of(self.rank)
        try:
            if self.rank == 0:
                folders.remove_unfinished(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            size = shard_file.write(self.folder / name, self.mine, self._go_on)
        except Exception:
            self._tell(None)
            raise
        self._tell(size)
        self.mine = None

    def _tell(self, size):
        if self._store is not None:
            said = json.dumps(size)
            self._store.set(KEY.format(self.token, self.rank), said)
        else:
            self._said = size

    def _sizes(self):
        """The sizes of the files of all processes."""
        if self._store is None:
            return [self._said]
        keys = [KEY.format(self.token, rank) for rank in range(self.world)]
        end = None
        while not self._store.check(keys):
            self._go_on()
            if not threading.main_thread().is_alive():
                end = end or time.monotonic() + LAST
                if time.monotonic() > end:
                    raise _Left()
            time.sleep(PERIOD)
        sizes = [json.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        if None in sizes:
            # It says so itself.
            raise _Left()
        return sizes

    def _finish(self, sizes):
        names = [shard_file.name_of(rank) for rank in range(self.world)]
        lacking = [n for n in names if not (self.folder / n).is_file()]
        if lacking:
            raise FileNotFoundError(
                f"{len(lacking)} of {self.world} processes wrote to another "
                f"{self.folder.parent} than the first process: {lacking[:5]}. "
                "All hosts must see one directory, as of a network file system."
            )
        self.manifest["files"] = dict(zip(names, sizes))
        folders.finish(self.folder, self.step, self.manifest, self.max_to_keep)

    def _go_on(self):
        """Raises where nobody waits any more."""
        is_alive = threading.main_thread().is_alive()
        if self._stopped.is_set() or (not is_alive and _has_failed()):
            raise _Left()


def _has_failed():
    return getattr(sys, "last_value", None) is not None


class work:
    """`together.work` under a distribution."""

    def __init__(self, what):
        self.work = None if current() is None else together.work(what)

    def __enter__(self):
        return None if self.work is None else self.work.__enter__()

    def __exit__(self, *error):
        return None if self.work is None else self.work.__exit__(*error)


def place():
    """This process's number, and how many there are."""
    if current() is None:
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _token(world):
    """A name that no checkpoint has had.

    Collective under a distribution: every process calls it.
    """
    token = torch.tensor([secrets.randbits(62)])
    if world > 1:
        together.go_on()
        dist.broadcast(token, src=0)
    return f"{token.item():016x}"
