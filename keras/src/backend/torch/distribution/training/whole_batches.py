"""Batches that a program makes whole: cut where they lie, then moved.

Keras moves a batch of a generator, a `PyDataset` or a `tf.data.Dataset` to the
device as it is. Here a process cuts its rows on the host, and moves those.
"""

import numpy as np
import torch

from keras.src import tree
from keras.src.backend.torch import core
from keras.src.backend.torch.distribution.mesh import agreement
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.trainers.data_adapters import data_adapter_utils


def gpu():
    """The GPU of this process, None without one."""
    device = core.get_device()
    return device if str(device).startswith("cuda") else None


def to_gpu(x, device):
    """An array on a GPU, copied from pinned memory in passing.

    Keras converts a batch where it lies, in memory that may be paged: the host
    waits for the copy, which waits for all work that the GPU has been given.
    """
    if isinstance(x, torch.Tensor) and x.device.type != "cpu":
        return core.convert_to_tensor(x)
    with core.device_scope("cpu"):
        x = core.convert_to_tensor(x)
    if x.layout is torch.strided:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def to_device(x):
    """A batch's array as Keras gives it to a model."""
    device = gpu()
    if device is None:
        return core.convert_to_tensor(x)
    return to_gpu(x, device)


def cut(data, context):
    """Our rows of a whole batch, as a `rows.Batch` with facts of all rows."""
    batch = rows.cut(data, context)
    batch.facts = agreement.facts_of_batch(data)
    return batch


def cut_and_moved(data, context):
    """As `cut`, of anything that Keras converts, on the device."""
    # As Keras does: None is no array.
    data = tree.map_structure(_sliceable, data, none_is_leaf=False)
    batch = cut(data, context)
    batch[0] = tree.map_structure(to_device, batch[0], none_is_leaf=False)
    return batch


def cutting(loader, context):
    """A loader of our rows of what a loader of Keras's would convert whole.

    Args:
        loader: a `DataLoader` that Keras has made of an iterable.
        context: the `Context`.
    """
    dataset = loader.dataset
    if type(dataset).__module__ != data_adapter_utils.__name__:
        return loader
    return torch.utils.data.DataLoader(
        _Cut(dataset.iterable, context), batch_size=None, collate_fn=as_it_is
    )


class _Cut(torch.utils.data.IterableDataset):
    def __init__(self, iterable, context):
        self.iterable, self.context = iterable, context

    def __iter__(self):
        for data in self.iterable:
            yield cut_and_moved(data, self.context)


def as_it_is(batch):
    return batch


def _sliceable(x):
    if isinstance(x, np.ndarray) and x.dtype.kind in "biufc":
        return x
    if isinstance(x, torch.Tensor) and x.device.type == "cpu":
        return x
    # Whatever a slice of it may be.
    return core.convert_to_tensor(x)
