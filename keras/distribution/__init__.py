"""Overlay: what this project adds to `keras.distribution`."""

from keras.src.distribution.checkpoints import load_checkpoint
from keras.src.distribution.checkpoints import save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
