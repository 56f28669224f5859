"""Sharded checkpoints: each process writes and reads its own shards.

- `parts`: which part of a tensor this process stores, and which it writes;
- `state`: of what variables the state of a training consists;
- `shard_file`: one file of shards, in the format of safetensors;
- `folders`: checkpoints in a directory, complete or not, and the latest;
- `reading`: shards of any cut as shards of any other, by the planner of
  `torch.distributed.checkpoint`;
- `saving`: writing while training goes on;
- `checkpoint`: a model is saved and restored;
- `weights_files`: checkpoints from and to `.weights.h5`.
"""
