"""HDF5 files that process 0 writes, and of which each process reads its part.

What is spread over processes comes to process 0 in pieces, of which it writes
one while it receives the next. The others walk through a file that keeps
nothing.
"""

import contextlib
import functools
import io
import os

from keras.src.distribution import archive as archives
from keras.src.distribution import files
from keras.src.distribution import processes
from keras.src.distribution import slices

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
        start: int, where in the file it begins; what is before stays.
    """

    def __init__(self, path, mode, start=0):
        self._path = os.fspath(path)
        self._file = open(path, "w+b" if mode == "w" else "r+b", buffering=0)
        self._start = start
        self._error = None
        self._file.seek(start)

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
        if whence == os.SEEK_SET:
            offset += self._start
        return self._file.seek(offset, whence) - self._start

    def tell(self):
        return self._file.tell() - self._start

    def truncate(self, size=None):
        size = self.tell() if size is None else size
        try:
            return self._file.truncate(self._start + size) - self._start
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
    each process alone. Of a store that is read, each process reads what it
    keeps; that does not communicate.

    Collective in write mode under a distribution: every process calls it.
    """

    # Whatever it is handed is taken in pieces.
    takes_variables = True
    # Whether it is process 0's, and whether it agrees on each call by itself.
    _is_shared = _agrees = False
    # The file that HDF5 writes, and the member of the archive that it is.
    _holding = _member = None

    def _get_h5_file(self, path_or_io, mode=None):
        mode = mode or self.mode
        in_memory = self.archive or isinstance(path_or_io, io.BytesIO)
        if not processes.is_distributed():
            return super()._get_h5_file(path_or_io, mode)
        if mode == "r":
            return self._read(path_or_io)
        self._is_shared = files.is_saving() or not in_memory
        self._agrees = not files.is_saving() and not in_memory
        with self._agreement():
            if not self._is_shared:
                return super()._get_h5_file(path_or_io, mode)
            if files.is_other():
                return Nowhere(str(path_or_io))
            path, start = path_or_io, 0
            if self.archive and archives.path_of(self.archive):
                self._member = archives.NewMember(self.archive, str(path))
                path, start = self._member.path, self._member.start
                mode = "a"
            elif in_memory:
                return super()._get_h5_file(path_or_io, mode)
            self._holding = Holding(path, mode, start)
            return h5py.File(self._holding, "w" if self._member else mode)

    def _read(self, path_or_io):
        """The file, and what it is read by in parts, if it can be."""
        self.opened = None
        if isinstance(path_or_io, io.BytesIO):
            return super()._get_h5_file(path_or_io, "r")
        path, start = path_or_io, 0
        if self.archive:
            start = archives.start_of(self.archive, str(path_or_io))
            if start is None:
                from keras.src.saving import saving_lib

                # To go back in what is compressed takes a new beginning.
                self.io_file = io.BytesIO(
                    saving_lib._safe_zip_read(self.archive, str(path_or_io))
                )
                return h5py.File(self.io_file, "r")
            path = archives.path_of(self.archive)
        elif not os.path.isfile(path):
            # Released Keras says what is wrong with it.
            return super()._get_h5_file(path_or_io, "r")
        self.opened = slices.Opened(path, start)
        return h5py.File(self.opened, "r")

    def __setitem__(self, key, value):
        if not self._is_shared:
            super().__setitem__(key, value)
            return
        with self._agreement():
            super().__setitem__(key, processes.in_pieces(value))
            self._check()

    def close(self):
        if not self._is_shared:
            super().close()
            return
        with self._agreement():
            archive, member = self.archive, self._member
            if member is not None:
                self.archive = self._member = None
            # The store of several files would write their list.
            if not isinstance(self.h5_file, Nowhere):
                super().close()
            if self._holding is not None:
                self._holding.close()
            self._check()
            # Without an archive if saving has failed.
            if member is not None and archive is not None:
                member.finish()

    def _check(self):
        if self._holding is not None:
            self._holding.check()

    def _agreement(self):
        if not self._agrees:
            return contextlib.nullcontext()
        return processes.work(
            f"writing {getattr(self, 'path_or_io', '')}", by_writer=True
        )


class InPieces:
    """Goes in front of a store of one file: each value is written in pieces,
    and read in parts."""

    # By which a file is read in parts, and whether whoever reads takes them.
    opened = None
    gives_slices = False

    def __getitem__(self, key):
        if self.gives_slices and self.opened is not None:
            from keras.src.saving import saving_lib

            dataset = saving_lib.safe_get_h5_dataset(self._h5_entry_group, key)
            value = slices.Slices.of(self.opened, dataset)
            if value is not None:
                return value
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        if not processes.is_in_pieces(value):
            super().__setitem__(key, value)
            return
        if self.mode not in ("w", "a"):
            raise ValueError("Setting a value is only allowed in write mode.")
        if not self._h5_entry_initialized:
            self._create_h5_group(self._h5_entry_path)
        dataset = self._h5_entry_group.create_dataset(
            key, shape=value.shape, dtype=value.dtype
        )
        if value.dtype.name == "bfloat16":
            dataset.attrs["dtype"] = "bfloat16"
        _write(dataset, value)


def _write(dataset, pieces):
    """Writes what comes in pieces into a dataset.

    Collective: every process calls it.
    """
    error = None
    for rows, piece in pieces:
        try:
            if error is None:
                dataset[rows] = piece
        except Exception as raised:
            # What is on its way has to arrive.
            error = raised
    if error is not None:
        raise error


def is_in_parts(load):
    """Whether a function that loads variables only assigns what it reads."""
    return load in _loads_in_parts()


@functools.cache
def _loads_in_parts():
    """Those of Keras's, which is imported after this file."""
    from keras.src import layers
    from keras.src.layers.convolutional.base_conv import BaseConv
    from keras.src.optimizers.base_optimizer import BaseOptimizer

    return {
        each.load_own_variables
        for each in (
            layers.Layer,
            layers.Dense,
            layers.EinsumDense,
            layers.Embedding,
            layers.Normalization,
            BaseConv,
            BaseOptimizer,
        )
    }
