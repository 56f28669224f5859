"""Embedding on local shards.

- Hidden dim sharded ("column"): each process looks up its part of the vector.
- Vocabulary sharded ("row"): each process looks up the tokens that it holds and
  gives zeros for the others; the sum over processes is the result.
"""

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.layers import styles
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.ops import contraction
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.variables import reading


class LookupStyle(styles.ShardedStyle):
    """Runs Embedding on local shards where it can."""

    def call(self, layer, context, args, kwargs):
        if not self.applies(layer, args):
            return super().call(layer, context, args, kwargs)
        return look_up(layer, args[0], context)

    def applies(self, layer, args):
        return (
            len(args) == 1
            and type(args[0]) in (torch.Tensor, torch.nn.Parameter)
            and styles.reads_as_released(layer)
            and not cuts.has_several_on_a_dim(
                getattr(layer._embeddings._value, "placements", ())
            )
        )


def look_up(layer, indices, context):
    """Vectors of the indices, on local shards.

    Collective along the model axes that shard the vocabulary.

    Args:
        layer: a built Embedding.
        indices: plain tensor of any shape, equal on all model processes.
        context: the `Context`.

    Raises:
        IndexError: on CPU, for an index outside of the vocabulary, on all
            processes (on a GPU it is a device-side assertion, as with torch's
            own embedding).
    """
    table, table_placements = reading.operand_of(layer._embeddings, context)
    with private.without_torch_functions():
        return _look_up(layer, indices, table, table_placements, context)


def _look_up(layer, indices, table, table_placements, context):
    vocabulary, width = layer._embeddings.shape
    indices = indices.to(table.device, torch.long)
    # Keras counts negative indices from the end.
    indices = torch.where(indices < 0, indices + vocabulary, indices)
    placements, sums = [], []
    start, size = 0, vocabulary
    for axis, placement in enumerate(table_placements):
        if not placement.is_shard():
            placements.append(Replicate())
        elif placement.dim == 1:
            placements.append(Shard(indices.ndim))
        else:
            first, last = collectives.shard_range(
                size,
                context.model_mesh.size(axis),
                context.model_mesh.get_local_rank(axis),
            )
            start, size = start + first, last - first
            sums.append(axis)
            placements.append(Replicate())
    if sums:
        is_local = (indices >= start) & (indices < start + size)
        outside = (indices < 0) | (indices >= vocabulary)
        # An index of nobody stays wrong for everybody, and is reported.
        local = torch.where(is_local, indices - start, outside * vocabulary)
        if not size:
            table = torch.nn.functional.pad(table, (0, 0, 0, 1))
        vectors = torch.nn.functional.embedding(local, table)
        vectors = vectors.masked_fill_(~is_local.unsqueeze(-1), 0.0)
    else:
        vectors = torch.nn.functional.embedding(indices, table)
    if vectors.dtype != _compute_dtype(layer):
        vectors = vectors.to(_compute_dtype(layer))
    mesh = context.model_mesh
    cut = contraction.Operands(indices, table, placements, sums, mesh)
    vectors = cut.reduced(vectors, activations.requested(context, vectors.ndim))
    shape = (*indices.shape, width)
    return activations.carry(vectors, mesh, placements, shape)


def _compute_dtype(layer):
    return getattr(torch, layer.compute_dtype)
