"""Overlay: what is symbolic is told at once; see `concrete`."""

from keras.src.ops.concrete import any_symbolic_tensors

__all__ = ["any_symbolic_tensors"]
