"""Shards of any cut are read as shards of any other cut.

Which parts of which files those are, `torch.distributed.checkpoint` plans.
"""

import collections
import json
import math
import os
import pathlib

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner_helpers import (
    create_read_items_for_chunk_list,
)

from keras.src.backend.torch.distribution.checkpoints import folders
from keras.src.backend.torch.distribution.checkpoints import parts
from keras.src.backend.torch.distribution.checkpoints import shard_file


class ShardReader(dcp.StorageReader):
    """Reads a checkpoint for `torch.distributed.checkpoint.load`.

    So a program that knows nothing of Keras reads it too. Nothing is unpickled.

    Args:
        path: path-like, of a checkpoint or of a directory of them.
    """

    def __init__(self, path):
        self.reset(path)

    def reset(self, checkpoint_id=None):
        self.folder = folders.resolve(checkpoint_id or self.folder)
        self.manifest = folders.read_manifest(self.folder)
        self.shards, self.metadata = {}, None

    def read_metadata(self, *args, **kwargs):
        if self.metadata is None:
            self.metadata = self._read_metadata()
        return self.metadata

    def _read_metadata(self):
        tensors = {
            name: dcp.TensorStorageMetadata(
                properties=TensorProperties(dtype=shard_file.DTYPES[dtype]),
                size=torch.Size(shape),
                chunks=[],
            )
            for name, (dtype, shape) in self.manifest["tensors"].items()
        }
        for file in self.manifest["files"]:
            path = self.folder / file
            for name, shard in shard_file.read_header(path).items():
                chunk = dcp.ChunkStorageMetadata(
                    torch.Size(shard.offsets), torch.Size(shard.shape)
                )
                if name in tensors:
                    tensors[name].chunks.append(chunk)
                index = MetadataIndex(name, shard.offsets)
                self.shards[index] = path, shard
        return dcp.Metadata(tensors)

    def set_up_storage_reader(self, metadata, is_coordinator, *args, **kwargs):
        pass

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    def read_data(self, plan, planner):
        of_file = collections.defaultdict(list)
        for item in plan.items:
            path, shard = self.shards[item.storage_index]
            of_file[path].append((item, shard))
        for path, items in of_file.items():
            with shard_file.opened(path) as read:
                for item, shard in items:
                    whole = read(shard)
                    if tuple(item.lengths) == shard.shape:
                        name = item.storage_index.fqn
                        shard_file.check(whole, shard, name, path)
                    part = tuple(
                        slice(start, start + length)
                        for start, length in zip(
                            item.storage_offsets, item.lengths
                        )
                    )
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(whole[part])
                    planner.commit_tensor(item, target)
        done = torch.futures.Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return folders.latest(checkpoint_id) is not None or os.path.isfile(
            pathlib.Path(checkpoint_id) / folders.MANIFEST
        )

    def read_own(self, rank):
        """What a process has kept of its own: see `saving`. None without."""
        path = self.folder / shard_file.name_of(rank)
        name = own_name(rank)
        if path.name not in self.manifest["files"]:
            return None
        shard = shard_file.read_header(path).get(name)
        if shard is None:
            return None
        with shard_file.opened(path) as read:
            x = read(shard)
            shard_file.check(x, shard, name, path)
            return json.loads(bytes(x.numpy()))


OWN = "processes"


def own_name(rank):
    """The name of a tensor with what a process keeps of its own, as JSON."""
    return f"{OWN}/{rank}"


class Parts(dcp.DefaultLoadPlanner):
    """Fills parts of tensors, as `parts.stored` gives them.

    Args:
        targets: dict from names to `parts.Part`.
    """

    def __init__(self, targets):
        super().__init__()
        self.targets = targets

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.metadata = metadata

    def create_local_plan(self):
        items, wrong = [], []
        for name, part in self.targets.items():
            if not part.local.numel():
                continue
            chunk = dcp.ChunkStorageMetadata(
                torch.Size(part.offsets), torch.Size(part.local.shape)
            )
            saved = self.metadata.state_dict_metadata[name]
            found = create_read_items_for_chunk_list(name, saved, [chunk])
            count = sum(math.prod(item.lengths) for item in found)
            if count != part.local.numel():
                wrong.append(
                    f"'{name}': {count} of {part.local.numel()} numbers"
                )
            items += found
        if wrong:
            raise OSError(
                "The checkpoint lacks shards that are read here: "
                f"{'; '.join(wrong[:5])}"
            )
        return dcp.LoadPlan(items)

    def lookup_tensor(self, index):
        return self.targets[index.fqn].local


def fill(reader, targets):
    """Reads into parts of tensors.

    Args:
        reader: a `ShardReader`.
        targets: dict from names to `parts.Part`.
    """
    planner = Parts(targets)
    planner.set_up_planner({}, reader.read_metadata())
    with torch.no_grad():
        reader.read_data(planner.create_local_plan(), planner).wait()


def read_whole(reader, name):
    """A whole tensor, in the memory of the host."""
    dtype, shape = reader.manifest["tensors"][name]
    x = torch.empty(shape, dtype=shard_file.DTYPES[dtype])
    fill(reader, {name: parts.Part(tuple(shape), (0,) * x.ndim, x)})
    return x
