"""Overlay: what this project adds to `keras.distribution`."""

from keras.src.distribution.checkpoints import load_checkpoint
from keras.src.distribution.checkpoints import save_checkpoint
from keras.src.distribution.report import Report
from keras.src.distribution.report import report

__all__ = ["Report", "load_checkpoint", "report", "save_checkpoint"]
