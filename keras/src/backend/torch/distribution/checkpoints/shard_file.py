"""One file of shards, in the format of safetensors: nothing in it is pickled.

A header in JSON, then the bytes of each tensor. Where a shard lies in its
tensor is said as `torch.distributed.checkpoint` says it in such files, so that
its `HuggingFaceStorageReader` reads them too.
"""

import contextlib
import json
import math
import mmap
import os
import struct
import zlib

import torch

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What torch writes and reads there.
SHARDING, OFFSETS, CHECKSUM = "DCP_SHARDING_INFO", "saved_offsets", "crc32"
LARGEST_HEADER = 100 << 20


def name_of(rank):
    """The name of a process's file, as torch names them."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def write(path, parts, go_on=lambda: None):
    """Writes a file, and waits until the disk has it.

    Args:
        path: path-like.
        parts: dict from names to `parts.Part` in the memory of the host.
        go_on: function, called before each tensor; raises to leave it.

    Returns:
        The size of the file in bytes.
    """
    # Wide entries first: each begins where its dtype is aligned.
    parts = sorted(parts.items(), key=lambda item: -_width(item[1].local))
    header, sharding, start = {}, {}, 0
    for name, part in parts:
        data = _bytes_of(part.local)
        header[name] = {
            "dtype": NAMES[part.local.dtype],
            "shape": list(part.local.shape),
            "data_offsets": [start, start + len(data)],
        }
        sharding[name] = {
            OFFSETS: list(part.offsets),
            CHECKSUM: zlib.crc32(data),
        }
        start += len(data)
    header["__metadata__"] = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        SHARDING: json.dumps(sharding),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for _, part in parts:
            go_on()
            file.write(_bytes_of(part.local))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _width(x):
    # safetensors takes a complex number for one of 8 bytes too.
    return x.element_size()


def _bytes_of(x):
    return memoryview(x.contiguous().view(-1).view(torch.uint8).numpy())


def check_dtype(name, x):
    """Raises if a file cannot hold a tensor of this dtype."""
    if x.dtype not in NAMES:
        raise ValueError(
            f"A checkpoint cannot hold tensors of {x.dtype}. Received: "
            f"'{name}' of shape {tuple(x.shape)}"
        )


class Shard:
    """A shard in a file.

    Attributes:
        dtype: torch's.
        shape, offsets: tuples, its own shape, and where it begins in the
            tensor.
        start, stop: of its bytes in the file.
        checksum: int, or None.
    """

    def __init__(self, entry, sharding, data_start):
        self.dtype = DTYPES[entry["dtype"]]
        self.shape = tuple(entry["shape"])
        self.offsets = tuple(sharding.get(OFFSETS, (0,) * len(self.shape)))
        self.start, self.stop = (data_start + n for n in entry["data_offsets"])
        self.checksum = sharding.get(CHECKSUM)


def read_header(path):
    """The shards of a file.

    Args:
        path: path-like.

    Returns:
        Dict from names to `Shard`.

    Raises:
        OSError: if it is no file of shards, or not whole.
    """
    size = os.stat(path).st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        sharding = json.loads(metadata.get(SHARDING, "{}"))
        shards = {
            name: Shard(entry, sharding.get(name, {}), 8 + length)
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise OSError(f"{path} is no file of shards: {error}") from error
    for name, shard in shards.items():
        count = math.prod(shard.shape) * shard.dtype.itemsize
        if shard.stop > size or shard.stop - shard.start != count:
            raise OSError(
                f"{path} is cut short: '{name}' ends at byte {shard.stop}, and "
                f"the file has {size}."
            )
    return shards


@contextlib.contextmanager
def opened(path):
    """A function that gives the whole of a `Shard` of the file, plain.

    Its memory is the file's, of which only that is read which is looked at.
    """
    with open(path, "rb") as file:
        # Private, as torch takes no memory that cannot be written.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    yield lambda shard: torch.frombuffer(
        data,
        dtype=shard.dtype,
        count=math.prod(shard.shape),
        offset=shard.start,
    ).view(shard.shape)


def check(x, shard, name, path):
    """Raises if the bytes of a shard are not those that were written."""
    if shard.checksum is not None and zlib.crc32(_bytes_of(x)) != (
        shard.checksum
    ):
        raise OSError(
            f"{path} is damaged: the bytes of '{name}' are not those that were "
            "written."
        )
