"""What the dims of a tensor are made of, as dims are joined and split.

A dim is a tuple of factors, pairs of a size and a set of labels. Where dims
have been joined each of them is a factor, in their order; where one has been
split, its labels stay with the first part. A dim without labels is `PLAIN`.
"""

import collections

NOTHING = frozenset()
PLAIN = ()


def labels_of(dim):
    """All labels of a dim."""
    return NOTHING.union(*(labels for _, labels in dim))


def regroup(dims, shape, new_shape, shards):
    """The dims of a tensor in another shape of the same size.

    Args:
        dims: list, the factors of each dim.
        shape, new_shape: tuples of ints.
        shards: int, into how many parts a labelled factor must divide.

    Returns:
        Tuple of the new list of dims and the labels that are lost.
    """
    todo = collections.deque()
    for dim, size in zip(dims, shape):
        todo.extend(dim or [(size, NOTHING)])
    todo = collections.deque(pair for pair in todo if pair[0] != 1)
    result, lost = [], NOTHING
    for need in new_shape:
        mine = []
        while need > 1:
            size, labels = todo.popleft()
            if need % size == 0:
                mine.append((size, labels))
                need //= size
            elif size % need == 0:
                if need % shards:
                    lost, labels = lost | labels, NOTHING
                mine.append((need, labels))
                todo.appendleft((size // need, NOTHING))
                need = 1
            else:
                other, others = todo.popleft()
                lost = lost | labels | others
                todo.appendleft((size * other, NOTHING))
        result.append(tuple(mine) if labels_of(mine) else PLAIN)
    return result, lost


def pairs(a, b, size, shards):
    """Factors of two dims of one size, beside each other.

    Returns:
        Tuple of a list of triples (a size, labels of `a`, labels of `b`), and
        the labels that are lost.
    """
    left = collections.deque(a or [(size, NOTHING)])
    right = collections.deque(b or [(size, NOTHING)])
    found, lost = [], NOTHING
    while left and right:
        (x, mine), (y, theirs) = left.popleft(), right.popleft()
        if x == y:
            found.append((x, mine, theirs))
            continue
        part = min(x, y)
        if max(x, y) % part:
            rest = [labels for _, labels in (*left, *right)]
            return [(size, NOTHING, NOTHING)], lost.union(mine, theirs, *rest)
        if part % shards:
            lost |= mine if x > y else theirs
            mine, theirs = (NOTHING, theirs) if x > y else (mine, NOTHING)
        found.append((part, mine, theirs))
        (left if x > y else right).appendleft((max(x, y) // part, NOTHING))
    return found, lost


def dim_of(triples):
    """The dim that has the labels of both of some `pairs`."""
    dim = tuple((size, a | b) for size, a, b in triples)
    return dim if labels_of(dim) else PLAIN
