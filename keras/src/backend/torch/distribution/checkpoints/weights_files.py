"""Checkpoints from `.weights.h5` files, and such files from checkpoints.

No model is built: the names of values are those of such a file.
"""

import pathlib

import torch

from keras.src import version
from keras.src.backend.torch.distribution.checkpoints import checkpoint
from keras.src.backend.torch.distribution.checkpoints import folders
from keras.src.backend.torch.distribution.checkpoints import reading
from keras.src.backend.torch.distribution.checkpoints import saving
from keras.src.backend.torch.distribution.checkpoints import state
from keras.src.saving import saving_lib

try:
    import h5py
except ImportError:
    h5py = None


def to_weights(path, filepath):
    """Writes the weights of a checkpoint to a `.weights.h5` file.

    One process does it, tensor by tensor.

    Args:
        path: path-like, of a checkpoint, or of a directory for its latest.
        filepath: path-like, of the file.

    Returns:
        `pathlib.Path` of the checkpoint.
    """
    filepath = _checked(filepath)
    reader = reading.ShardReader(path)
    manifest = reader.manifest
    store = saving_lib.H5IOStore(filepath, mode="w")
    try:
        for entry in manifest["entries"]:
            name = entry["name"]
            group = store.make(
                entry["path"], metadata=None if name is None else {"name": name}
            )
            for key in entry["keys"]:
                full = state.key_of(entry["path"], key)
                full = manifest["same"].get(full, full)
                group[key] = reading.read_whole(reader, full)
    finally:
        store.close()
    return reader.folder


def from_weights(filepath, directory):
    """Writes a checkpoint of what a `.weights.h5` file holds.

    Args:
        filepath: path-like, of the file.
        directory: path-like, in which the checkpoint is made.

    Returns:
        `pathlib.Path` of the checkpoint.
    """
    filepath = _checked(filepath)
    entries, tensors = [], {}
    store = saving_lib.H5IOStore(filepath, mode="r")
    try:
        for path in _paths(store.h5_file):
            group = store.get(path)
            name = group._h5_entry_group.attrs.get("name")
            keys = list(group.keys())
            entries.append({"path": path, "name": name, "keys": keys})
            for key in keys:
                tensors[state.key_of(path, key)] = _tensor(group[key])
    finally:
        store.close()
    if not entries:
        raise ValueError(
            f"{filepath} has no groups of variables, as `model.save_weights` "
            "of Keras 3 writes them."
        )
    saver = saving.Saver(directory)
    manifest = {
        "of": checkpoint.WEIGHTS,
        "keras": version.__version__,
        "step": 0,
        "training": {},
        "user": None,
        "entries": entries,
        "same": {},
    }
    saver.save(tensors, {}, 0, manifest, {})
    return saver.wait()


def describe(path):
    """What is in a checkpoint, as text."""
    reader = reading.ShardReader(path)
    manifest = reader.manifest
    lines = [
        f"{reader.folder}: {manifest['of']}, step {manifest['step']}, by "
        f"{manifest['processes']} process(es), Keras {manifest['keras']}"
    ]
    others = folders.complete(reader.folder.parent)
    if len(others) > 1:
        lines.append(f"beside it: {', '.join(sorted(p.name for p in others))}")
    for name, (dtype, shape) in manifest["tensors"].items():
        chunks = reader.read_metadata().state_dict_metadata[name].chunks
        lines.append(f"{name}  {dtype} {tuple(shape)}  {len(chunks)} shard(s)")
    return "\n".join(lines)


def _checked(filepath):
    if h5py is None:
        raise ImportError("`.weights.h5` files need h5py: `pip install h5py`.")
    if not str(filepath).endswith(".weights.h5"):
        raise ValueError(
            f"The filename must end in `.weights.h5`. Received: {filepath}"
        )
    return pathlib.Path(filepath)


def _paths(file):
    """The paths of a file's objects: the groups with a group `vars`."""
    paths = []

    def visit(name, item):
        if isinstance(item, h5py.Group) and name.split("/")[-1] == "vars":
            paths.append(name.removesuffix("vars").rstrip("/"))

    file.visititems(visit)
    return paths


def _tensor(value):
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(value.copy())
