"""Gradients over data shards: buckets, one backward pass, all of them."""
