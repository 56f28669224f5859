"""HDF5 files that every process walks through, and process 0 writes."""

import contextlib
import io
import os

from keras.src.distribution import files
from keras.src.distribution import processes

try:
    import h5py
except ImportError:
    h5py = None


class Nowhere(object if h5py is None else h5py.File):
    """Stands for a file, its groups and datasets; keeps nothing.

    Args:
        filename: string, the name that it says it has.
    """

    name = "/"

    def __init__(self, filename):
        self._filename = filename

    @property
    def filename(self):
        return self._filename

    @property
    def attrs(self):
        return {}

    def create_group(self, *args, **kwargs):
        return self

    def create_dataset(self, *args, **kwargs):
        return self

    def flush(self):
        return None

    def close(self):
        return None

    def __setitem__(self, key, value):
        return None

    def __bool__(self):
        return True

    def __repr__(self):
        return f"<Nowhere filename={self._filename}>"


class Holding:
    """A file that HDF5 writes; what fails is held until it is asked for.

    HDF5 cannot close a file that it fails to write, and breaks the process
    down when Python drops what is left of it. So nothing fails for it: what
    is written after an error is lost, and `check` raises the error.

    Args:
        path: string or path-like.
        mode: `"w"` or `"a"`.
    """

    def __init__(self, path, mode):
        self._path = os.fspath(path)
        self._file = open(path, "w+b" if mode == "w" else "r+b", buffering=0)
        self._error = None

    def check(self):
        """Raises what a write has failed with."""
        if self._error is not None:
            raise self._error

    def read(self, size=-1):
        return self._file.read(size)

    def readinto(self, buffer):
        view = memoryview(buffer).cast("B")
        count = self._file.readinto(view) or 0
        if self._error is not None:
            # What was lost.
            view[count:] = bytes(len(view) - count)
            count = len(view)
        return count

    def write(self, data):
        view = memoryview(data).cast("B")
        written = 0
        try:
            while self._error is None and written < len(view):
                written += self._file.write(view[written:])
        except OSError as error:
            self._error = error
        if self._error is not None:
            self._file.seek(len(view) - written, os.SEEK_CUR)
        return len(view)

    def seek(self, offset, whence=os.SEEK_SET):
        return self._file.seek(offset, whence)

    def tell(self):
        return self._file.tell()

    def truncate(self, size=None):
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size

    def flush(self):
        return None

    def close(self):
        self._file.close()

    def __repr__(self):
        # h5py takes it for the name of the file.
        return self._path


@contextlib.contextmanager
def written(path):
    """An HDF5 file that process 0 writes, and that others only walk through.

    Args:
        path: string or path-like.
    """
    if files.is_other():
        yield Nowhere(str(path))
        return
    file = Holding(path, "w")
    try:
        with h5py.File(file, "w") as hdf5:
            yield hdf5
    finally:
        file.close()
    file.check()


class WrittenByOne:
    """Makes a store of Keras's one that process 0 writes for all.

    What fails there fails on all: opening, each value, closing. Values are
    gathered, so every process hands in the same ones. A store in memory is of
    each process alone.

    Collective in write mode under a distribution: every process calls it.
    """

    # Whether it is process 0's, and whether it agrees on each call by itself.
    _is_shared = _agrees = False
    _holding = None

    def _get_h5_file(self, path_or_io, mode=None):
        mode = mode or self.mode
        in_memory = self.archive or isinstance(path_or_io, io.BytesIO)
        if mode != "r" and processes.is_distributed():
            self._is_shared = files.is_saving() or not in_memory
            self._agrees = not files.is_saving() and not in_memory
        with self._agreement():
            if mode == "r" or not self._is_shared:
                return super()._get_h5_file(path_or_io, mode)
            if files.is_other():
                if self.archive:
                    self.io_file = io.BytesIO()
                return Nowhere(str(path_or_io))
            if in_memory:
                return super()._get_h5_file(path_or_io, mode)
            self._holding = Holding(path_or_io, mode)
            return h5py.File(self._holding, mode)

    def __setitem__(self, key, value):
        with self._agreement():
            super().__setitem__(key, value)
            self._check()

    def close(self):
        with self._agreement():
            # The store of several files would write their list.
            if self.archive or not isinstance(self.h5_file, Nowhere):
                super().close()
            if self._holding is not None:
                self._holding.close()
            self._check()

    def _check(self):
        if self._holding is not None:
            self._holding.check()

    def _agreement(self):
        if not self._agrees:
            return contextlib.nullcontext()
        return processes.work(f"writing {getattr(self, 'path_or_io', '')}")
