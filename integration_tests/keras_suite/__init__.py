"""Keras's own tests on several processes that share a distribution."""
