import itertools

import pytest
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src.backend.torch.distribution.mesh import cuts


def test_cuts_in_the_order_of_the_mesh_are_shards():
    placements = cuts.to_placements([(1, 0), (1, 1)], (2, 3))
    assert placements == (Shard(1), Shard(1))


def test_cuts_in_another_order_are_strided():
    placements = cuts.to_placements([(0, 1), (0, 0)], (2, 3))
    assert placements[1] == Shard(0)
    assert not placements[0].is_shard() and cuts.is_cut(placements[0])
    assert placements[0].split_factor == 3


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_order_is_found_again(order):
    pairs = tuple((2, axis) for axis in order)
    placements = cuts.to_placements(pairs, (2, 3, 5))
    assert cuts.from_placements(placements, (2, 3, 5)) == pairs


def test_dims_do_not_disturb_each_other():
    pairs = ((1, 2), (1, 0), (0, 1))
    placements = cuts.to_placements(pairs, (2, 2, 2))
    assert set(cuts.from_placements(placements, (2, 2, 2))) == set(pairs)
    assert cuts.has_several_on_a_dim(placements)
    assert not cuts.has_several_on_a_dim((Shard(0), Shard(1), Replicate()))
