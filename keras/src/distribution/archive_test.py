import zipfile

import pytest

from keras.src.distribution import archive as archives
from keras.src.distribution import hdf5

WEIGHTS = bytes(range(256)) * 50


def written(path, data=WEIGHTS):
    """An archive with a member that was written back to front."""
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("first", b"one")
        member = archives.NewMember(archive, "weights")
        holding = hdf5.Holding(member.path, "a", member.start)
        half = len(data) // 2
        holding.seek(half)
        holding.write(data[half:])
        holding.seek(0)
        holding.write(data[:half])
        holding.close()
        holding.check()
        member.finish()
        archive.writestr("last", b"three")
    return path


def test_others_read_it(tmp_path):
    with zipfile.ZipFile(written(tmp_path / "a.zip")) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["first", "weights", "last"]
        assert archive.read("weights") == WEIGHTS
        assert archive.read("last") == b"three"
        info, other = archive.infolist()[1:]
        assert info.compress_type == zipfile.ZIP_STORED
        assert info.external_attr == other.external_attr


def test_an_empty_member(tmp_path):
    with zipfile.ZipFile(written(tmp_path / "a.zip", b"")) as archive:
        assert archive.testzip() is None
        assert archive.read("weights") == b""


def test_where_a_member_is(tmp_path):
    path = written(tmp_path / "a.zip")
    with zipfile.ZipFile(path) as archive:
        start = archives.start_of(archive, "weights")
        data = path.read_bytes()
        assert data[start : start + len(WEIGHTS)] == WEIGHTS
        with pytest.raises(KeyError):
            archives.start_of(archive, "nothing")
        # Another file has taken its place.
        other = tmp_path / "b.zip"
        other.write_bytes(b"")
        other.replace(path)
        assert archives.start_of(archive, "weights") is None


def test_what_does_not_lie_there_as_it_is(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights", WEIGHTS)
    with zipfile.ZipFile(path) as archive:
        assert archives.start_of(archive, "weights") is None


def test_a_file_that_ends_too_early(tmp_path):
    path = written(tmp_path / "a.zip")
    with zipfile.ZipFile(path) as archive:
        with open(path, "r+b") as file:
            file.truncate(200)
        with pytest.raises(zipfile.BadZipFile, match="ends within 'weights'"):
            archives.start_of(archive, "weights")
