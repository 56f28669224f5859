"""Overlay: the whole model is exported, by process 0."""

from keras.src.distribution import export
from keras.src.export import litert as upstream

__all__ = ["export_litert"]

export_litert = export.by_one_device(upstream.export_litert)
