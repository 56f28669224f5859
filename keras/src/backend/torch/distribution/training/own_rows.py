"""Our rows of what is read by rows: arrays, and a `DataLoader`'s dataset."""

import functools

import numpy as np
import torch

from keras.src import tree
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.training import random_states
from keras.src.backend.torch.distribution.training import whole_batches


class PinnedArrays(torch.utils.data.Dataset):
    """Arrays as Keras's own dataset reads them, copied to a GPU in passing.

    Args:
        dataset: the dataset of an `ArrayDataAdapter` (of Keras 3.15.1, which
            keeps the arrays as `array`).
        device: the GPU.
    """

    def __init__(self, dataset, device):
        self.dataset, self.device = dataset, device

    def __getitems__(self, indices):
        return tree.map_structure(
            lambda array: whole_batches.to_gpu(
                array.convert_to_torch_compatible(array[indices]), self.device
            ),
            self.dataset.array,
            none_is_leaf=False,
        )

    def __len__(self):
        return len(self.dataset)


def arrays_of(loader):
    """The dataset of the loader of an `ArrayDataAdapter`."""
    device = whole_batches.gpu()
    if device is None:
        return loader.dataset
    return PinnedArrays(loader.dataset, device)


def sliced(sampler):
    """The batches of the sampler of an `ArrayDataAdapter`, as arrays.

    torch's sampler makes a list of the rows of each global batch, of which
    each of a thousand processes would need a few.
    """
    kind = type(sampler.sampler)
    if type(sampler) is not torch.utils.data.BatchSampler or kind not in (
        torch.utils.data.RandomSampler,
        torch.utils.data.SequentialSampler,
    ):
        return sampler
    is_shuffled = kind is torch.utils.data.RandomSampler
    if is_shuffled and not _shuffles_as_released():
        return sampler
    return _Slices(len(sampler.sampler), sampler.batch_size, is_shuffled)


def _order(number):
    """The rows in the order in which torch's `RandomSampler` gives them."""
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(number, generator=generator).numpy()


@functools.cache
def _shuffles_as_released():
    """Whether this torch draws an order as `_order` does."""
    number, before = 1000, torch.get_rng_state()
    try:
        released = list(torch.utils.data.RandomSampler(range(number)))
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        ours = _order(number).tolist()
        return ours == released and after.equal(torch.get_rng_state())
    finally:
        torch.set_rng_state(before)


class _Slices(torch.utils.data.Sampler):
    """Batches of rows, in order or shuffled, as arrays.

    Args:
        number: int, of rows.
        size: int, of a batch.
        is_shuffled: bool.
    """

    def __init__(self, number, size, is_shuffled):
        self.number, self.size = number, size
        self.is_shuffled = is_shuffled

    def __iter__(self):
        order = _order(self.number) if self.is_shuffled else None
        for start in range(0, self.number, self.size):
            stop = min(start + self.size, self.number)
            yield (
                np.arange(start, stop) if order is None else order[start:stop]
            )

    def __len__(self):
        return -(-self.number // self.size)


class OurRows(torch.utils.data.Dataset):
    """Reads local rows of the global batches of a dataset.

    A dataset that draws random numbers must draw those of all rows, as on one
    device: or the processes' random states would part. Whether it does, the
    first batch tells, which is read whole.

    Args:
        dataset: a map-style dataset.
        context: the `Context`.
        draws: bool, whether reading draws random numbers; None to find out.
    """

    def __init__(self, dataset, context, draws=None):
        # Not the context, which cannot be sent to worker processes.
        own = {
            "_dataset": dataset,
            "_shard": (context.data_size, context.data_index),
            "_draws": draws,
            "_is_watched": draws is None,
        }
        self.__dict__.update(own)

    def __getitems__(self, indices):
        is_array = isinstance(indices, np.ndarray)
        indices = indices if is_array else list(indices)
        start, stop = rows.split(len(indices), *self._shard)
        local_rows = rows.split_evenly(len(indices), *self._shard)
        part = slice(*rows.with_a_row(start, stop))
        if is_array:
            ours = self._read(indices[part].tolist())
            return ours, local_rows, _facts_of(indices)
        if self._draws is False:
            read = self._read_quietly if self._is_watched else self._read
            return read(indices[part]), local_rows, _facts_of(indices)
        before = random_states.mark()
        samples = self._read(indices)[part]
        if self._draws is None:
            self.__dict__["_draws"] = random_states.mark() != before
        return samples, local_rows, _facts_of(indices)

    def _read_quietly(self, indices):
        before = random_states.mark()
        samples = self._read(indices)
        if random_states.mark() != before:
            raise ValueError(
                "The dataset of a `DataLoader` must draw random numbers for "
                "every batch or for none, so that all processes draw the same. "
                f"{self._dataset} drew none for its first batch. Draw in "
                "`collate_fn` or in a layer, or pass an `IterableDataset`."
            )
        return samples

    def _read(self, indices):
        if getattr(self._dataset, "__getitems__", None):
            return self._dataset.__getitems__(indices)
        return [self._dataset[i] for i in indices]

    def __len__(self):
        return len(self._dataset)

    # To a `worker_init_fn`, this is the dataset itself.
    def __getattr__(self, name):
        if name.startswith("__") or "_dataset" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name, value):
        setattr(self._dataset, name, value)


def collate_ours(collate, read):
    samples, local_rows, facts = read
    return rows.Batch(collate(samples), local_rows, facts)


def _facts_of(indices):
    """Which rows a batch is made of: so many, the first ones, the last ones."""
    ends = [int(i) for i in (*indices[:4], *indices[-4:])]
    return {"batch, order of its rows": (len(indices), *ends)}


def loader_of_our_rows(loader, context):
    """A user's `DataLoader` that reads local rows of the same batches."""
    # Workers in order: all processes see the same batches.
    return torch.utils.data.DataLoader(
        OurRows(loader.dataset, context),
        batch_sampler=loader.batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=functools.partial(collate_ours, loader.collate_fn),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory_device=loader.pin_memory_device,
    )
