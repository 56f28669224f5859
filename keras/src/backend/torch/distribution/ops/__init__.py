"""What a torch function does with shards, and the products that layers are
made of on local shards."""
