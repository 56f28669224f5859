"""Overlay: what this project adds to `keras.callbacks`."""

from keras.src.callbacks.sharded_checkpoint import ShardedCheckpoint

__all__ = ["ShardedCheckpoint"]
