"""A model is saved by all processes, and its files are written by one."""

import contextlib
import functools
import io
import os
import pathlib
import re
import shutil
import socket
import tempfile

from keras.src.distribution import files
from keras.src.distribution import processes
from keras.src.distribution import replacing
from keras.src.utils import file_utils

# The folders that this process writes in now.
_in_use = set()


def written_once(save, makes_folders=False):
    """Wraps a function that saves a model to a path.

    Process 0 is sent the weights, a piece after the other, and writes them
    into a folder next to the path; then it puts its files where they belong.
    The others keep nothing but assets, in a folder of their own, until they
    are done. What one process raises, all raise; when it returns, the files
    are there.

    Collective under a distribution: every process calls it.

    Args:
        save: function of a model, a path and more.
        makes_folders: bool, whether `save` makes the folders of the path.
    """

    @functools.wraps(save)
    def save_once(model, filepath, *args, **kwargs):
        with processes.distribution_of(model):
            if not processes.is_distributed():
                return save(model, filepath, *args, **kwargs)
            return save_together(model, filepath, *args, **kwargs)

    def save_together(model, filepath, *args, **kwargs):
        if not isinstance(filepath, (str, os.PathLike)):
            # A file that the caller has opened: each process has its own.
            with processes.work("saving to an open file"):
                return save(model, filepath, *args, **kwargs)
        with files.save(filepath):
            name = os.fspath(filepath)
            is_remote = file_utils.is_remote_path(name) or "://" in name
            if is_remote and not files.is_other():
                return save(model, name, *args, **kwargs)
            path = pathlib.Path(name)
            parent = None if files.is_other() else path.parent
            if parent and (makes_folders or kwargs.get("zipped") is False):
                parent.mkdir(parents=True, exist_ok=True)
            if parent is None and path.suffix == ".keras":
                save(model, _Nothing(), *args, **kwargs)
                return
            with _folder(parent) as folder:
                save(model, folder / path.name, *args, **kwargs)
                if parent:
                    replacing.move(folder, parent)

    return save_once


class _Nothing(io.RawIOBase):
    """A file that keeps nothing."""

    def writable(self):
        return True

    def write(self, data):
        return memoryview(data).nbytes


def folder_beside(path):
    """A context with an empty folder beside a path, that is removed after it.

    Does not communicate.
    """
    return _folder(path.absolute().parent)


@contextlib.contextmanager
def _folder(parent):
    """A folder in `parent`, or among temporary ones where it is None."""
    if parent is not None:
        _remove_leftovers(parent)
    # Next to the file, so that moving it there is one rename.
    folder = pathlib.Path(
        tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=parent)
    )
    _in_use.add(folder.name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _in_use.discard(folder.name)


def _prefix():
    host = re.sub(r"\W", "_", socket.gethostname())
    return f".keras-saving-{host}-"


def _remove_leftovers(parent):
    """Removes folders of processes of this host that were killed in a save."""
    for folder in parent.glob(f"{_prefix()}*-*"):
        pid = folder.name.removeprefix(_prefix()).partition("-")[0]
        if (
            pid.isdigit()
            and folder.name not in _in_use
            and (int(pid) == os.getpid() or not _is_alive(int(pid)))
        ):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid):
    if os.name == "nt":
        # Signals end a process there.
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Somebody else's process.
        return True
    return True
