"""Overlay: process 0 alone writes a file, after all have gathered it."""

from keras.src.distribution import hdf5
from keras.src.distribution import saving
from keras.src.saving import saving_lib as upstream

__all__ = [
    "H5IOStore",
    "ShardedH5IOStore",
    "save_model",
    "save_weights_only",
]


class H5IOStore(hdf5.WrittenByOne, upstream.H5IOStore):
    __doc__ = upstream.H5IOStore.__doc__


class ShardedH5IOStore(hdf5.WrittenByOne, upstream.ShardedH5IOStore):
    __doc__ = upstream.ShardedH5IOStore.__doc__


save_model = saving.written_once(upstream.save_model)
save_weights_only = saving.written_once(upstream.save_weights_only)
