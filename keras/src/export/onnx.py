"""Overlay: the whole model is exported, by process 0."""

from keras.src.distribution import export
from keras.src.export import onnx as upstream

__all__ = ["export_onnx"]

export_onnx = export.by_one_device(upstream.export_onnx)
