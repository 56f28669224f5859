"""Muon, which orthogonalizes whole matrices, on shards of them.

Each matrix that is cut goes to one process, which computes its update for all
and sends each its shard. Processes take different matrices at the same time,
so that none holds two of them, and the work is shared.
"""

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import streams


def muon(optimizer, grads, variables, learning_rate):
    """What Keras's `update_step` computes, for all variables.

    Collective: every process calls it.

    Args:
        optimizer: the `Muon`.
        grads: list of plain tensors, local shards of those that are cut.
        variables: list of `Variable`s, which show their shards.
        learning_rate: tensor.
    """
    cut = {}
    for grad, variable in zip(grads, variables):
        index = optimizer._get_variable_index(variable)
        if not sharded.is_weight(variable._value) or (
            optimizer.adam_velocities[index] is not None
        ):
            # Whole ones, and Adam's.
            optimizer.update_step(grad, variable, learning_rate)
        else:
            cut.setdefault(variable.value.dtype, []).append((grad, variable))
    size = dist.get_world_size()
    for pairs in cut.values():
        # Those that are computed at the same time are of like sizes.
        pairs.sort(key=lambda pair: pair[1]._value.numel(), reverse=True)
        for i in range(0, len(pairs), size):
            _update(optimizer, pairs[i : i + size], learning_rate)


def _update(optimizer, pairs, learning_rate):
    """Updates as many matrices as there are processes, or fewer."""
    directions = [_direction(optimizer, *pair) for pair in pairs]
    variables = [variable for _, variable in pairs]
    ranks = range(dist.get_world_size())
    ranges = [streams.ranges_of_all(v._value.sharding) for v in variables]
    senders = [streams.boxes(v._value.sharding) for v in variables]
    rank, like = dist.get_rank(), directions[0]
    sent = [
        direction.reshape(-1) if rank in boxes else like.new_empty(0)
        for direction, boxes in zip(directions, senders)
    ]
    own = rank if rank < len(pairs) else None
    boxes = {} if own is None else senders[own]
    parts = _exchange(like, sent, [_size(boxes.get(r)) for r in ranks])
    del directions, sent
    updates = []
    if own is not None:
        matrix = like.new_empty(variables[own]._value.shape)
        for r, box in boxes.items():
            part = matrix[_slices(box)]
            part.copy_(parts[r].view(part.shape))
        matrix = optimizer.zeropower_via_newtonschulz5(
            matrix, optimizer.ns_steps
        )
        matrix = optimizer.lr_adjust(learning_rate * matrix)
        updates = [matrix[_slices(ranges[own][r])].reshape(-1) for r in ranks]
    parts = _exchange(
        like,
        updates,
        [_size(box[rank]) for box in ranges] + [0] * (len(ranks) - len(pairs)),
    )
    for variable, part in zip(variables, parts):
        variable.value.sub_(part.view(variable.value.shape))


def _direction(optimizer, grad, variable):
    """What is orthogonalized, after a step of the momentum."""
    m = optimizer.momentums[optimizer._get_variable_index(variable)].value
    m.add_(grad + m * (optimizer.momentum - 1))
    return grad + optimizer.momentum * m if optimizer.nesterov else m


def _exchange(like, parts, sizes):
    """Sends each process a part; returns what each has sent.

    Collective: every process calls it.

    Args:
        like: tensor, for the dtype and device.
        parts: list of 1-D tensors, for the first processes.
        sizes: how many numbers come from each process.
    """
    given = [len(part) for part in parts]
    given += [0] * (len(sizes) - len(given))
    sent = torch.cat(parts) if parts else like.new_empty(0)
    received = like.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, given)
    return received.split(sizes)


def _slices(box):
    return tuple(slice(start, stop) for start, stop in box)


def _size(box):
    if box is None:
        return 0
    (a, b), (c, d) = box
    return (b - a) * (d - c)
