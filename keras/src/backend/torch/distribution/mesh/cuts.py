"""In which order mesh axes cut the dims of a tensor.

One dim may be cut by several axes. The first one cuts the whole dim into
chunks, the next one each chunk, and so on. torch cuts in the order of the
mesh's axes; a cut in another order it writes as a strided shard.
"""

import functools
import itertools
import math

from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src.backend.torch.distribution.private import StridedShard


def is_cut(placement):
    """Whether a placement shards, in whatever order."""
    return placement.is_shard() or isinstance(placement, StridedShard)


def to_placements(cuts, mesh_shape):
    """torch's placements, one for each mesh axis.

    Args:
        cuts: pairs of a dim and the mesh axis that cuts it, in order.
        mesh_shape: tuple, the sizes of the mesh axes.
    """
    result = [Replicate()] * len(mesh_shape)
    for i, (dim, axis) in enumerate(cuts):
        before = [a for d, a in cuts[:i] if d == dim and a > axis]
        stride = math.prod(mesh_shape[a] for a in before)
        result[axis] = Shard(dim)
        if before:
            result[axis] = StridedShard(dim, split_factor=stride)
    return tuple(result)


@functools.lru_cache(maxsize=1024)
def from_placements(placements, mesh_shape):
    """Pairs of a dim and the mesh axis that cuts it, in order.

    Args:
        placements: tuple, one for each mesh axis, none partial.
        mesh_shape: tuple, the sizes of the mesh axes.
    """
    axes_of = {}
    for axis, placement in enumerate(placements):
        if is_cut(placement):
            axes_of.setdefault(placement.dim, []).append(axis)
    cuts = []
    for dim, axes in axes_of.items():
        for order in itertools.permutations(axes):
            pairs = [(dim, axis) for axis in order]
            found = to_placements(pairs, mesh_shape)
            if all(found[axis] == placements[axis] for axis in axes):
                cuts += pairs
                break
        else:
            raise ValueError(
                f"No order of cuts gives the placements {placements} on a "
                f"mesh of shape {mesh_shape}."
            )
    return tuple(cuts)


def has_several_on_a_dim(placements):
    """Whether several axes cut one dim."""
    dims = [p.dim for p in placements if is_cut(p)]
    return len(set(dims)) < len(dims)
