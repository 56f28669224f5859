"""How layers with sharded weights run: the plan of a layout map, the styles,
the hot paths of Dense, EinsumDense and Embedding, one call."""
