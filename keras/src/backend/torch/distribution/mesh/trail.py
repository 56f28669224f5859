"""What a step has communicated for, in its order.

Collectives of one shape pair up whatever they are for: where a process calls
two layers in another order, each takes the other's numbers, and nobody is told.
So each of them leaves a name here, and what a step has left is compared with
what it did on the others, in a reduction that there is anyway (see
`agreement`).
"""

import collections

# So many names of a step, the last ones, are compared.
KEPT = 4096

names = collections.deque(maxlen=KEPT)
# To be called with the name of a layer or a weight, None where it has none, in
# each collective for one.
note = names.append


class Trail(tuple):
    """The names of a step, as a fact."""


def begin():
    """To be called as a step begins."""
    names.clear()


def take():
    """The `Trail` of the step that ends."""
    return Trail(names)
