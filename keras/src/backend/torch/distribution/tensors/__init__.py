"""Shards as tensors: collectives that autograd differentiates, and DTensors
that carry shards between plain code and the layouts of a user."""
