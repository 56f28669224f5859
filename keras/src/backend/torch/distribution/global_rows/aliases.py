"""What shares memory with a `GlobalTensor`: views of it, and its gradient.

A view that the table knows is a box around a view of local rows, so torch
itself keeps them the same. Others are views of the gathered rows, which are a
copy: what is written into them is taken back before local rows are used again,
and what is written into local rows is gathered again for them.
"""

import weakref

import torch

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows.carrier import map_tensors


def _memory(x):
    """The tensor whose memory local rows, or addend, are in."""
    base = x.local._base
    return x.local if base is None else base


def settle(x):
    """Takes what was written into gathered rows of `x`, and of its views."""
    if x._whole is not None:
        write_back(x)
    followed = getattr(_memory(x), marks.FOLLOWED, None)
    if followed is not None:
        for box in followed.values():
            box = box()
            if box is not None and box is not x:
                write_back(box)


def write_back(x):
    """Takes what was written into (a view of) the gathered rows."""
    kept = x._whole
    if kept is None or kept._version == x._version_of_whole:
        return
    if x.pending is None:
        # Whether autograd has seen the write.
        with torch.set_grad_enabled(kept.grad_fn is not x._graph_of_whole):
            write(x, kept)
    carrier.keep(x, kept)


def write(x, y):
    """Puts our part of all rows where local rows are."""
    new = carrier.part_of(y, x.rows) if x.at is None else x.rows.cut(y, x.at)
    x.local.copy_(new)


def follow(result, boxes):
    """Remembers the boxes of whose gathered rows a result has views."""
    boxes = [x for x in boxes if x._whole is not None and x.pending is None]

    def see(y):
        base = y if y._base is None else y._base
        for x in boxes:
            if base is x._whole or base is x._whole._base:
                # It lives as long as the views.
                setattr(x._whole, marks.BOX, x)
                memory, local = _memory(x), x.local
                followed = getattr(memory, marks.FOLLOWED, None)
                if followed is None:
                    followed = {}
                    setattr(memory, marks.FOLLOWED, followed)
                place = (
                    x.at,
                    x.rows,
                    local.shape,
                    local.stride(),
                    local.storage_offset(),
                )
                followed[place] = weakref.ref(x)
        return y

    if boxes:
        map_tensors(see, result)


def written_into(x):
    """To be called when a program has written into local rows.

    Collective along the data axis, if there are views of gathered rows: also
    where they are gone, which a process may find out sooner than another.
    """
    owner = getattr(_memory(x), marks.GRADIENT, None)
    if owner is not None:
        grad, rows = owner
        grad.copy_(_memory(x) * carrier.shards_of(rows))
    followed = getattr(_memory(x), marks.FOLLOWED, None)
    if followed is None:
        return
    for place, reference in list(followed.items()):
        at, rows, *where = place
        box = reference()
        local = _memory(x).as_strided(*where) if box is None else box.local
        if at is None:
            new = carrier.Sum.apply(local, rows.group)
        else:
            new = carrier.Gather.apply(local, at, rows)
        if box is not None:
            box._whole.copy_(new)
            carrier.keep(box, box._whole)


def is_followed(x):
    """Whether others share the memory that a `GlobalTensor` is in."""
    return getattr(_memory(x), marks.FOLLOWED, None) is not None
