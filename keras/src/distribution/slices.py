"""Parts of what a file holds, of which each process reads its own."""

import itertools
import math
import os

import numpy as np

try:
    import h5py
except ImportError:
    h5py = None

# Bytes in a row that are worth a read of their own: fewer are read with what
# lies between them.
SHORTEST = 256
# Bytes that are read at once where some of them are not kept.
PIECE = 4 << 20


class Opened:
    """A file that HDF5 reads, which may be a part of another.

    Args:
        path: string or path-like.
        start: int, where in the file it begins.
    """

    def __init__(self, path, start=0):
        self._path = os.fspath(path)
        self._start = start
        self._position = 0
        self._file = open(path, "rb", buffering=0)

    def read_at(self, offset, buffer):
        """Fills a writable buffer with the bytes at an offset."""
        view = memoryview(buffer).cast("B")
        offset += self._start
        while len(view):
            count = os.preadv(self._file.fileno(), [view], offset)
            if not count:
                raise EOFError(f"{self._path} ends at byte {offset}.")
            view, offset = view[count:], offset + count

    def readinto(self, buffer):
        view = memoryview(buffer).cast("B")
        self.read_at(self._position, view)
        self._position += len(view)
        return len(view)

    def read(self, size=-1):
        if size < 0:
            size = self._size() - self._position
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def _size(self):
        return os.fstat(self._file.fileno()).st_size - self._start

    def seek(self, offset, whence=os.SEEK_SET):
        base = {
            os.SEEK_SET: 0,
            os.SEEK_CUR: self._position,
            os.SEEK_END: self._size(),
        }
        self._position = base[whence] + offset
        return self._position

    def tell(self):
        return self._position

    def flush(self):
        return None

    def close(self):
        self._file.close()

    def __del__(self):
        # What has been read of it may still be asked for more.
        self.close()

    def __repr__(self):
        # h5py takes it for the name of the file.
        return self._path


class Slices:
    """An array in a file, to be read in parts.

    It is no numpy array, but becomes one wherever one is asked for.

    Args:
        opened: `Opened`, the file.
        offset: int, where the array begins in it.
        shape: tuple.
        dtype: numpy's.

    Attributes:
        shape, dtype: of the whole.
    """

    def __init__(self, opened, offset, shape, dtype):
        self._opened = opened
        self._offset = offset
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)

    @classmethod
    def of(cls, opened, dataset):
        """That of a dataset; None if it does not lie in the file as it is in
        memory.

        Args:
            opened: `Opened`.
            dataset: `h5py.Dataset` of that file.
        """
        offset, dtype = dataset.id.get_offset(), dataset.dtype
        if offset is None or dataset.chunks is not None:
            return None
        if dataset.attrs.get("dtype") == "bfloat16":
            import ml_dtypes

            if dtype.itemsize != 2:
                return None
            dtype = ml_dtypes.bfloat16
        elif dtype.kind not in "biufc" or (
            h5py.h5t.py_create(dtype, logical=True) != dataset.id.get_type()
        ):
            return None
        return cls(opened, offset, dataset.shape, dtype)

    @property
    def ndim(self):
        return len(self.shape)

    def __len__(self):
        return self.shape[0]

    def __array__(self, dtype=None, copy=None):
        whole = self.read_part([(0, size) for size in self.shape])
        return whole if dtype is None else whole.astype(dtype)

    def __getitem__(self, key):
        return np.asarray(self)[key]

    def take(self, positions):
        """Single numbers, by their positions in the flattened array."""
        result = np.empty(len(positions), self.dtype)
        for i, position in enumerate(positions):
            self._read(position, result[i : i + 1])
        return result

    def read_part(self, ranges):
        """A part, and little else, of the file.

        Args:
            ranges: pairs of a start and a stop, for each dim.

        Returns:
            numpy array.
        """
        part = np.empty([stop - start for start, stop in ranges], self.dtype)
        if not part.size:
            return part
        strides = [math.prod(self.shape[d + 1 :]) for d in range(self.ndim)]
        axis = self._axis(ranges, strides)
        if axis is None:
            self._read(0, part)
            return part
        start, stop = ranges[axis]
        stride = strides[axis]
        inner = [slice(*pair) for pair in ranges[axis + 1 :]]
        is_all_kept = part[(0,) * (axis + 1)].size == stride
        rows = stop - start
        if not is_all_kept:
            rows = max(1, min(rows, PIECE // (stride * self.dtype.itemsize)))
            read = np.empty((rows, *self.shape[axis + 1 :]), self.dtype)
        for index in itertools.product(*(range(*r) for r in ranges[:axis])):
            base = sum(i * s for i, s in zip(index, strides))
            target = part[tuple(i - r[0] for i, r in zip(index, ranges))]
            if is_all_kept:
                self._read(base + start * stride, target)
                continue
            for row in range(start, stop, rows):
                values = read[: min(rows, stop - row)]
                self._read(base + row * stride, values)
                target[row - start :][: len(values)] = values[:, *inner]
        return part

    def _axis(self, ranges, strides):
        """The dim along which numbers are read one after the other, with all
        of the dims behind it: the last one that is cut, or one before it if
        there are too few in a row. None if the whole is read at once."""
        is_cut = [
            stop - start < size
            for (start, stop), size in zip(ranges, self.shape)
        ]
        if not any(is_cut):
            return None
        axis = max(dim for dim, cut in enumerate(is_cut) if cut)
        while (
            axis
            and self.dtype.itemsize
            * strides[axis]
            * (ranges[axis][1] - ranges[axis][0])
            < SHORTEST
        ):
            axis -= 1
        return axis

    def _read(self, position, array):
        """Fills a contiguous array with the numbers from a position on."""
        offset = self._offset + position * self.dtype.itemsize
        self._opened.read_at(offset, array.reshape(-1).view(np.uint8))
