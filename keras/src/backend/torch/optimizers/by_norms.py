"""Optimizers that ask for more than single entries, on local shards.

Muon asks for whole matrices: see `by_matrices`. The others ask for norms of
whole variables. They compute what Keras's `update_step` computes, for all
variables together, so that sums over shards travel together: one all-reduce for
Lamb, two for Adafactor, of one number a variable, and Adafactor's of its rows
and columns.
"""

import torch

from keras.src import ops
from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import storage
from keras.src.backend.torch.distribution.variables import weight_sums
from keras.src.backend.torch.optimizers import by_matrices


def update_of(optimizer, variables):
    """The function here that makes an optimizer's update, None without."""
    # They are imported after this file.
    from keras.src.optimizers.adafactor import Adafactor
    from keras.src.optimizers.lamb import Lamb
    from keras.src.optimizers.muon import Muon

    plain = []
    if type(optimizer) is Lamb:
        update = _lamb
        alike = [optimizer._momentums, optimizer._velocities]
    elif type(optimizer) is Adafactor:
        update = _adafactor
        alike, plain = [optimizer._v], [optimizer._r, optimizer._c]
    elif type(optimizer) is Muon:
        update, alike = by_matrices.muon, [optimizer.momentums]
    else:
        return None
    stored = [variable._value for variable in variables]
    if not weight_sums.are_on_one_mesh(stored):
        return None
    for variable in variables:
        index = optimizer._get_variable_index(variable)
        if not all(
            _is_laid_out_alike(slots[index], variable) for slots in alike
        ) or not all(_is_plain(slots[index]) for slots in plain):
            return None
    return update


def _is_plain(slot):
    return slot is not None and not sharded.is_weight(slot._value)


def _is_laid_out_alike(slot, variable):
    if slot is None:
        return False
    value, like = slot._value, variable._value
    if not sharded.is_weight(like):
        return not sharded.is_weight(value)
    return sharded.is_weight(value) and (
        tuple(value.placements) == tuple(like.placements)
    )


def _lamb(optimizer, grads, variables, learning_rate):
    """Collective: every process calls it."""
    slots = []
    for grad, variable in zip(grads, variables):
        index = optimizer._get_variable_index(variable)
        m = optimizer._momentums[index].value
        v = optimizer._velocities[index].value
        grad = ops.cast(grad, variable.dtype)
        m.add_((grad - m) * (1 - optimizer.beta_1))
        v.add_((torch.square(grad) - v) * (1 - optimizer.beta_2))
        slots.append((m, v))

    def direction(variable, m, v):
        step = ops.cast(optimizer.iterations + 1, variable.dtype)
        beta_1, beta_2 = [
            ops.power(ops.cast(beta, variable.dtype), step)
            for beta in (optimizer.beta_1, optimizer.beta_2)
        ]
        return (m / (1.0 - beta_1)) / (
            torch.sqrt(v / (1.0 - beta_2)) + optimizer.epsilon
        )

    sums = []
    for variable, (m, v) in zip(variables, slots):
        for x in (variable.value, direction(variable, m, v)):
            sums.append(torch.sum(torch.square(x)))
    stored = [variable._value for variable in variables for _ in range(2)]
    norms = iter(weight_sums.add_up(sums, stored))
    for variable, (m, v) in zip(variables, slots):
        w_norm, g_norm = torch.sqrt(next(norms)), torch.sqrt(next(norms))
        both = (w_norm > 0) & (g_norm > 0)
        ratio = torch.where(both, w_norm / g_norm, torch.ones_like(w_norm))
        rate = ops.cast(learning_rate, variable.dtype)
        # Anew, as all of them at once are as large as the variables.
        variable.value.sub_(ratio * rate * direction(variable, m, v))


def _adafactor(optimizer, grads, variables, learning_rate):
    """Collective: every process calls it."""
    grads = [ops.cast(g, v.dtype) for g, v in zip(grads, variables)]
    factors = [
        _Factored(optimizer, variable) if len(variable.shape) > 1 else None
        for variable in variables
    ]
    sums, stored = [], []
    for grad, variable, factored in zip(grads, variables, factors):
        sums.append(torch.sum(torch.square(variable.value)))
        if factored is not None:
            squares = torch.square(grad) + optimizer.epsilon_1
            sums += factored.sums(squares)
        stored += [variable._value] * (len(sums) - len(stored))
    sums = iter(weight_sums.add_up(sums, stored))
    rates, squares = [], []
    for grad, variable, factored in zip(grads, variables, factors):
        dtype = variable.dtype
        step = ops.cast(optimizer.iterations + 1, dtype)
        rate = ops.cast(learning_rate, dtype)
        bound = 1 / torch.sqrt(step)
        if not callable(optimizer._learning_rate) and optimizer.relative_step:
            rate = torch.minimum(rate, bound)
        rms = torch.sqrt(next(sums) / _count(variable))
        least = ops.cast(optimizer.epsilon_2, dtype)
        rates.append(torch.maximum(least, rms) * torch.minimum(rate, bound))
        beta = 1 - ops.power(step, optimizer.beta_2_decay)
        v = optimizer._v[optimizer._get_variable_index(variable)].value
        if factored is not None:
            v.copy_(factored.velocity(beta, next(sums), next(sums)))
        else:
            square = torch.square(grad) + optimizer.epsilon_1
            v.copy_(beta * v + (1 - beta) * square)
        squares.append(torch.sum(torch.square(grad / torch.sqrt(v))))
    stored = [variable._value for variable in variables]
    squares = weight_sums.add_up(squares, stored)
    for grad, variable, rate, square in zip(grads, variables, rates, squares):
        v = optimizer._v[optimizer._get_variable_index(variable)].value
        rms = torch.sqrt(square / _count(variable)) / optimizer.clip_threshold
        update = grad / torch.sqrt(v) / torch.clamp(rms, min=1.0)
        variable.value.sub_(rate * update)


def _count(variable):
    return variable._value.numel()


class _Factored:
    """Of a variable of rows and columns, what Adafactor has of each of them.

    They are whole on all processes: means over rows and over columns.
    """

    def __init__(self, optimizer, variable):
        index = optimizer._get_variable_index(variable)
        self.r, self.c = optimizer._r[index].value, optimizer._c[index].value
        self.shape = tuple(variable.shape)
        ranges = [(0, size) for size in self.shape]
        if sharded.is_weight(variable._value):
            ranges = laid_out.ranges(variable._value.sharding)
        own = [slice(start, stop) for start, stop in ranges]
        self.own_r = tuple(own[:-1])
        self.own_c = (*own[:-2], own[-1])

    def sums(self, squares):
        """Over rows and columns of our shard, where it is in the whole."""
        r, c = torch.zeros_like(self.r), torch.zeros_like(self.c)
        r[self.own_r] = torch.sum(squares, -1)
        c[self.own_c] = torch.sum(squares, -2)
        return r, c

    def velocity(self, beta, r, c):
        """Our shard of it, after new sums."""
        self.r.copy_(beta * self.r + (1 - beta) * (r / self.shape[-1]))
        self.c.copy_(beta * self.c + (1 - beta) * (c / self.shape[-2]))
        r = self.r / torch.mean(self.r, -1, keepdim=True)
        return r[self.own_r].unsqueeze(-1) * self.c[self.own_c].unsqueeze(-2)


def update(function, optimizer, grads, variables, learning_rate):
    """Makes an update by one of these functions.

    Collective: every process calls it.
    """
    grads = storage.local_gradients(grads, variables)
    with modes.local_shards():
        function(optimizer, grads, variables, learning_rate)
