"""Overlay: the whole model is exported, by process 0."""

from keras.src.distribution import export
from keras.src.export import torch as upstream

__all__ = ["export_torch"]

export_torch = export.by_one_device(upstream.export_torch)
