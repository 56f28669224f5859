"""What a step has communicated for, in its order.

Collectives of one shape pair up whatever they are for: where a process calls
two layers in another order, each takes the other's numbers, and nobody is told.
So each of them leaves a name here, and what a step has left is compared with
what it did on the others, in a reduction that there is anyway (see
`agreement`).

What layers do with shards pairs up within a data shard, and is compared there.
All processes gather the same weights.
"""

import collections

# So many names of a step, the last ones, are compared.
KEPT = 4096

_layers = collections.deque(maxlen=KEPT)
_gathers = collections.deque(maxlen=KEPT)
# To be called with the name of a layer that communicates along model axes, None
# where it has none; and with that of a weight that a data axis gathers.
note = _layers.append
note_gather = _gathers.append


class Trail(tuple):
    """Names of a step, as a fact.

    Attributes:
        shard: int, the data shard in which they are compared; None for all.
    """

    shard = None


def begin():
    """To be called as a step begins."""
    _layers.clear()
    _gathers.clear()


def layers(shard):
    """The `Trail` of the layers of the step that ends, in a data shard."""
    trail = Trail(_layers)
    trail.shard = shard
    return trail


def gathers():
    """The `Trail` of what has been gathered in the step that ends."""
    return Trail(_gathers)
