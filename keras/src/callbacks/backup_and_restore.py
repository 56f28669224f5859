"""Overlay: process 0 alone makes and removes files; all wait for it."""

from keras.src.distribution import files as file_utils

__all__ = ["file_utils"]
