"""Files that take the place of others: at every moment the old or the new.

What is renamed is on the disk before, so that a machine that is switched off
leaves whole files too.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import sys

# Linux's, of `renameat2`.
HERE, EXCHANGE = -100, 2

CONFIG, LIST, SHARD = "config.json", ".weights.json", ".weights.h5"
# In the name of a file that is put beside an old one.
MARK = ".new"


def move(source, destination):
    """Moves what is in a folder into another, and replaces files there.

    One file takes the place of another at once, and so does a list of files
    with all that it names. A program that is killed leaves the old ones or the
    new ones, and perhaps others that no list names, most of which the next call
    removes. A folder of a model takes the place of the old one at once too, on
    Linux; where the file system cannot exchange folders, and configuration or
    assets change, it is one that does not load while files are moved.

    Args:
        source, destination: `pathlib.Path` of folders on one file system.
    """
    _sync_all(source)
    paths = sorted(source.iterdir())
    lists = [path for path in paths if path.name.endswith(LIST)]
    for path in paths:
        target = destination / path.name
        if path.is_dir() and target.is_dir():
            _move_model(path, target)
        elif not lists:
            os.replace(path, target)
    for path in lists:
        _move_set(path, destination)
    sync_names(destination)


def _move_model(source, destination):
    """Moves the files of a model into its folder.

    The folder takes the place of the old one. Where that cannot be: the files
    are read by its configuration; where that stays what it is, each of them
    takes the place of its old one, else it is away until the others are there.
    """
    if _exchange_folders(source, destination):
        return
    paths = sorted(source.rglob("*"))
    config = destination / CONFIG
    stays = config.is_file() and (
        config.read_bytes() == (source / CONFIG).read_bytes()
    )
    if not stays or any(p.is_file() and p.parent != source for p in paths):
        config.unlink(missing_ok=True)
    for path in paths:
        target = destination / path.relative_to(source)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif path != source / CONFIG:
            os.replace(path, target)
    sync_names(destination)
    os.replace(source / CONFIG, config)
    sync_names(destination)


def _exchange_folders(source, destination):
    """Puts a folder in the place of another, at once; returns whether the
    system can.

    It gets all files that only the other has, but those of a set that is
    replaced. The other is in its place then.
    """
    destination = destination.resolve()
    old, new = destination.stat(), source.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        return False
    try:
        _link_others(destination, source)
        shutil.copymode(destination, source)
        sync_names(source)
        _exchange(source, destination)
    except OSError:
        return False
    sync_names(destination.parent)
    sync_names(source.parent)
    return True


def _link_others(source, destination):
    """Gives a folder the files that another has, and it has not."""
    replaced = {
        name
        for path in destination.glob(f"*{LIST}")
        for name in _named_by(source / path.name)
    }
    for path in source.iterdir():
        target = destination / path.name
        if path.is_dir() and not path.is_symlink():
            if not target.exists():
                target.mkdir()
                shutil.copymode(path, target)
            if target.is_dir():
                _link_others(path, target)
        elif path.name not in replaced and not os.path.lexists(target):
            os.link(path, target, follow_symlinks=False)
    sync_names(destination)


def _exchange(one, other):
    """Exchanges what two paths name."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "no exchange of folders")
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, "no exchange of folders")
    paths = HERE, os.fsencode(one), HERE, os.fsencode(other)
    if rename(*paths, EXCHANGE):
        raise OSError(ctypes.get_errno(), "folders are not exchanged", one)


def _move_set(source, destination):
    """Moves a list of files, and them.

    Where the old list names one of them, all get other names first, and a list
    of those takes the place of the old one. Then they get names of Keras's, and
    the list of those. Keras opens the first one, whatever its list says, so one
    is always there.
    """
    folder, target = source.parent, destination / source.name
    files = sorted(path.name for path in folder.glob(f"*{SHARD}"))
    old = _named_by(target)
    mark = MARK if set(old) & set(files) else ""
    names = {name: f"{name.removesuffix(SHARD)}{mark}{SHARD}" for name in files}
    new = _list_of(names, source) if mark else source
    for name, marked in names.items():
        os.replace(folder / name, destination / marked)
    sync_names(destination)
    os.replace(new, target)
    sync_names(destination)
    if mark and _give_own_names(names, destination):
        os.replace(source, target)
        sync_names(destination)
        names = {name: name for name in files}
    is_of_set = re.compile(
        rf"{re.escape(source.name.removesuffix(LIST))}_\d{{5}}"
        rf"({re.escape(MARK)})?{re.escape(SHARD)}({re.escape(MARK)})?"
    ).fullmatch
    for path in destination.iterdir():
        named = path.name in old or MARK in path.name
        used = path.name in (*names.values(), files[0])
        if is_of_set(path.name) and named and not used:
            path.unlink(missing_ok=True)


def _give_own_names(names, folder):
    """Gives files the names that they shall have, besides those that they
    have; returns whether the file system can."""
    temporary = folder / f"{next(iter(names))}{MARK}"
    for name, marked in names.items():
        temporary.unlink(missing_ok=True)
        try:
            os.link(folder / marked, temporary)
        except OSError:
            return False
        os.replace(temporary, folder / name)
    sync_names(folder)
    return True


def _named_by(path):
    """The names of files in a list, none where there is no list."""
    try:
        named = json.loads(path.read_text())["weight_map"].values()
        return [name for names in named for name in _as_list(names)]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return []


def _as_list(names):
    return [names] if isinstance(names, str) else names


def _list_of(names, path):
    """Writes a list beside another one; returns its path.

    Args:
        names: dict, from names in that to those in the new one.
        path: `pathlib.Path` of that.
    """
    said = json.loads(path.read_text())
    said["weight_map"] = {
        key: names[named]
        if isinstance(named, str)
        else [names[name] for name in named]
        for key, named in said["weight_map"].items()
    }
    new = path.with_name(f"{path.name}{MARK}")
    new.write_text(json.dumps(said, indent=4))
    sync(new)
    return new


def _sync_all(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
        else:
            sync_names(path)
    sync_names(folder)


def sync(path):
    """Waits until the disk has a file."""
    # To wait for what is written, Windows wants a file that may be written.
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def sync_names(folder):
    """Waits until the disk has the names in a folder, where it can."""
    # Windows opens no folder, and some file systems have nothing to wait for.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
