"""Members of a zip archive that lie in its file as they are.

Keras stores what it puts into a `.keras` file, and does not compress it: its
HDF5 file is a part of the archive's, and may be written and read in place.
"""

import os
import struct
import time
import zipfile
import zlib

CHUNK = 1 << 20
# Of the header in front of a member: its size, and where the sizes of what
# follows it are.
HEADER, NAME_AND_EXTRA = 30, struct.Struct("<26xHH")
SIGNATURE = b"PK\3\4"


def path_of(archive):
    """The path of the file that an archive is in, None if it is in none."""
    path = archive.filename
    try:
        opened = os.fstat(archive.fp.fileno())
        is_there = os.path.samestat(opened, os.stat(path))
    except (AttributeError, OSError, TypeError):
        # In memory, or what no path leads to any more.
        return None
    return path if is_there and os.path.isfile(path) else None


def start_of(archive, name):
    """Where a member's bytes begin in the archive's file.

    Args:
        archive: `zipfile.ZipFile` that is read.
        name: string, of a member.

    Returns:
        int, or None where they do not lie there as they are.

    Raises:
        zipfile.BadZipFile: if there is no member in the file.
    """
    info, path = archive.getinfo(name), path_of(archive)
    if path is None or info.compress_type != zipfile.ZIP_STORED:
        return None
    with open(path, "rb", buffering=0) as file:
        file.seek(info.header_offset)
        header = file.read(HEADER)
        if len(header) < HEADER or not header.startswith(SIGNATURE):
            raise zipfile.BadZipFile(f"{path} has no member {name!r}.")
        start = info.header_offset + HEADER
        start += sum(NAME_AND_EXTRA.unpack(header))
        if start + info.file_size > os.fstat(file.fileno()).st_size:
            raise zipfile.BadZipFile(f"{path} ends within {name!r}.")
    return start


class NewMember:
    """A member that is being written into the end of an archive's file.

    Args:
        archive: `zipfile.ZipFile` that is written, in a file of its own.
        name: string.

    Attributes:
        path: of the file.
        start: int, where in the file the member's bytes are to be written.
    """

    def __init__(self, archive, name):
        self._archive = archive
        self.path = path_of(archive)
        info = zipfile.ZipInfo(name, time.localtime()[:6])
        info.external_attr = 0o600 << 16
        info.header_offset, info.CRC = archive.start_dir, 0
        self._info = info
        self._write_header()
        self.start = archive.fp.tell()

    def _write_header(self):
        file = self._archive.fp
        file.seek(self._info.header_offset)
        # Of one size, whatever the member's turns out to be.
        file.write(self._info.FileHeader(zip64=True))
        file.flush()

    def finish(self):
        """Makes the bytes from `start` to the end of the file the member."""
        info, code = self._info, 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            while chunk := file.read(CHUNK):
                code = zlib.crc32(chunk, code)
            end = file.tell()
        info.CRC = code
        info.file_size = info.compress_size = end - self.start
        self._write_header()
        self._archive.fp.seek(end)
        self._archive.start_dir = end
        self._archive.filelist.append(info)
        self._archive.NameToInfo[info.filename] = info
