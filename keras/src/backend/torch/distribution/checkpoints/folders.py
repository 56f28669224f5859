"""Checkpoints in a directory: a folder each, complete or not there.

A checkpoint is written under a name with a dot, and gets its own by one
rename, when all of it is on the disk. `latest` holds the name of the newest.
A program that is killed at any moment leaves those before as they were.
"""

import json
import os
import pathlib
import re
import shutil

PREFIX, UNFINISHED = "step-", ".unfinished-"
LATEST, MANIFEST = "latest", "checkpoint.json"
FORMAT = "keras-sharded-checkpoint"
VERSION = 1


def unfinished(directory, token):
    """The folder in which a checkpoint is written."""
    return pathlib.Path(directory) / f"{UNFINISHED}{token}"


def remove_unfinished(current):
    """Removes what was left of checkpoints that were never finished, and of
    those that were being removed, but for the one that is written now."""
    for folder in current.parent.glob(f"{UNFINISHED}*"):
        if folder != current:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in current.parent.glob(f"{PREFIX}*"):
        if not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)


def complete(directory):
    """The complete checkpoints of a directory, the oldest first."""
    manifests = pathlib.Path(directory).glob(f"{PREFIX}*/{MANIFEST}")
    found = sorted((path.stat().st_mtime_ns, path.parent) for path in manifests)
    return [folder for _, folder in found]


def latest(directory):
    """The newest checkpoint of a directory, None without one."""
    directory = pathlib.Path(directory)
    if (directory / LATEST).is_file():
        name = (directory / LATEST).read_text().strip()
        if re.fullmatch(rf"{PREFIX}[\d-]+", name):
            folder = directory / name
            if (folder / MANIFEST).is_file():
                return folder
    found = complete(directory)
    return found[-1] if found else None


def resolve(path):
    """The folder of a checkpoint: itself, or the newest of a directory.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = pathlib.Path(path)
    folder = path if (path / MANIFEST).is_file() else latest(path)
    if folder is None:
        raise FileNotFoundError(
            f"There is no complete checkpoint in {path}: a folder with a file "
            f"'{MANIFEST}', or a directory of such folders."
        )
    return folder


def finish(folder, step, manifest, max_to_keep):
    """Makes a checkpoint of a folder whose shards are on the disk.

    Args:
        folder: path of the folder, as `unfinished` gives it.
        step: int, for its name.
        manifest: dict, written as JSON.
        max_to_keep: int, how many the directory keeps; None for all.

    Returns:
        Its path.
    """
    directory = folder.parent
    _write(folder / MANIFEST, json.dumps(manifest, indent=1))
    _sync(folder)
    name, number = f"{PREFIX}{step:08d}", 0
    while (directory / name).exists():
        number += 1
        name = f"{PREFIX}{step:08d}-{number}"
    os.rename(folder, directory / name)
    _sync(directory)
    _write(directory / f"{UNFINISHED}{LATEST}", name)
    os.replace(directory / f"{UNFINISHED}{LATEST}", directory / LATEST)
    _sync(directory)
    if max_to_keep is not None:
        for old in complete(directory)[:-max_to_keep]:
            if old.name != name:
                # Without it, it is no checkpoint any more.
                os.remove(old / MANIFEST)
                shutil.rmtree(old, ignore_errors=True)
    return directory / name


def read_manifest(folder):
    """The manifest of a checkpoint, whose files are all there.

    Raises:
        OSError: if one is missing or cut short, which it names.
        ValueError: if the checkpoint is of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise OSError(f"{path} is damaged: {error}") from error
    if manifest.get("format") != FORMAT or manifest["version"] > VERSION:
        raise ValueError(
            f"{path} is of a format that this version does not read: "
            f"{manifest.get('format')} {manifest.get('version')}. Expected: "
            f"{FORMAT} {VERSION}"
        )
    wrong = []
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != size:
            wrong.append(
                f"{name} is cut short ({file.stat().st_size} of {size} bytes)"
            )
    if wrong:
        others = [f for f in complete(folder.parent) if f != folder]
        advice = f" Load {others[-1]} instead." if others else ""
        raise OSError(
            f"The checkpoint {folder} is not whole, {len(wrong)} of "
            f"{len(manifest['files'])} files: {'; '.join(wrong[:5])}.{advice}"
        )
    return manifest


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder):
    """Waits until the disk has the names in a folder."""
    if os.name == "nt":
        # A folder cannot be opened there.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
