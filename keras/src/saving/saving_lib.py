"""Overlay: process 0 alone writes a file, and each process reads its part."""

from keras.src.distribution import hdf5
from keras.src.distribution import processes
from keras.src.distribution import saving
from keras.src.saving import saving_lib as upstream

__all__ = [
    "H5IOStore",
    "ShardedH5IOStore",
    "_load_state",
    "is_memory_sufficient",
    "save_model",
    "save_weights_only",
]

released_is_memory_sufficient = upstream.is_memory_sufficient
released_load_state = upstream._load_state


class _OfPieces(hdf5.InPieces, upstream.H5IOStore):
    pass


class H5IOStore(hdf5.WrittenByOne, _OfPieces):
    __doc__ = upstream.H5IOStore.__doc__


# Released Keras's hands each value on to the store of one file.
class ShardedH5IOStore(hdf5.WrittenByOne, upstream.ShardedH5IOStore, _OfPieces):
    __doc__ = upstream.ShardedH5IOStore.__doc__


def is_memory_sufficient(model):
    """As Keras's, for one process.

    Under a distribution an HDF5 file is written and read where it lies in an
    archive, neither in memory nor in a file of its own. Keras does so where
    this question fails, and only there.
    """
    if processes.is_distributed():
        raise NotImplementedError
    return released_is_memory_sufficient(model)


def _load_state(
    saveable,
    weights_store,
    assets_store,
    inner_path,
    skip_mismatch=False,
    visited_saveables=None,
    failed_saveables=None,
    error_msgs=None,
):
    """As Keras's, which calls it for all that a model is made of.

    What Keras's own classes assign is read in parts; what may do something
    else with it is handed whole arrays.
    """
    if isinstance(weights_store, hdf5.InPieces):
        load = getattr(type(saveable), "load_own_variables", None)
        weights_store.gives_slices = hdf5.is_in_parts(load)
    released_load_state(
        saveable,
        weights_store,
        assets_store,
        inner_path,
        skip_mismatch=skip_mismatch,
        visited_saveables=visited_saveables,
        failed_saveables=failed_saveables,
        error_msgs=error_msgs,
    )


save_model = saving.written_once(upstream.save_model)
save_weights_only = saving.written_once(upstream.save_weights_only)
