"""Overlay: any source of batches may be read under a distribution."""

import functools

from keras.src.distribution import distribution_lib
from keras.src.trainers import data_adapters as upstream

__all__ = ["get_data_adapter"]

released_get_data_adapter = upstream.get_data_adapter


@functools.wraps(released_get_data_adapter)
def get_data_adapter(*args, **kwargs):
    # As if there were no distribution: released Keras refuses anything but a
    # `tf.data.Dataset` for several processes. `fit` and its like cut what this
    # adapter gives; who makes one by hand gets global batches.
    distribution = distribution_lib.distribution()
    distribution_lib.set_distribution(None)
    try:
        return released_get_data_adapter(*args, **kwargs)
    finally:
        distribution_lib.set_distribution(distribution)
