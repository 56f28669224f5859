"""What a reader of a variable sees of it: see `modes`."""

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.variables import get_autocast_scope
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.modes import Shows
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.modes import stored_values
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import unshard


def read_stored(variable):
    """The stored value of a variable, cast if its layer is of mixed dtype."""
    value = variable._value
    if value is None or get_autocast_scope() or in_stateless_scope():
        with stored_values():
            return variable.value
    return value


def values_of(variables):
    """What an optimizer reads of variables, as `[v.value for v in variables]`.

    Does not communicate in an optimizer's update.

    Args:
        variables: list of those that it updates, or of its own.
    """
    if get_autocast_scope() or in_stateless_scope():
        return [v.value for v in variables]
    if modes.shows is Shows.LOCAL:
        return [
            sharded.local_of(v._value)
            if isinstance(v._value, DTensor)
            else v._value
            for v in variables
        ]
    return [
        v._value if type(v._value) is torch.nn.Parameter else v.value
        for v in variables
    ]


def operand_of(variable, context):
    """`unshard.operand` of a variable.

    Collective along the data axis if it shards the variable.
    """
    return unshard.operand(read_stored(variable), context, variable)


def present(value, variable):
    """What a reader sees of the value of a variable; see `modes`.

    Collective inside a layer's call if the data axis shards the variable.

    Args:
        value: the stored value, perhaps cast to another dtype.
        variable: whose value it is.
    """
    if not isinstance(value, DTensor):
        return _enter(value) if modes.shows is Shows.DTENSORS else value
    if modes.shows is Shows.LOCAL:
        return sharded.local_of(value)
    if not modes.calls or modes.shows is Shows.STORED:
        return value
    context = current()
    if context is None or value.device_mesh != context.mesh:
        return value
    if modes.gathered is None:
        return _operand_of_a_layer(value, variable, context)
    key = (id(variable), value.dtype, torch.is_grad_enabled())
    if key not in modes.gathered:
        modes.gathered[key] = _operand_of_a_layer(value, variable, context)
    return modes.gathered[key]


def _operand_of_a_layer(value, variable, context):
    if private.is_in_transform():
        return laid_out.whole(value)
    local, placements = unshard.operand(value, context, variable)
    if not any(p.is_shard() for p in placements):
        return _enter(local) if modes.shows is Shows.DTENSORS else local
    if modes.shows is Shows.WHOLE:
        return unshard.gather_model_axes(
            local, placements, value.shape, context
        )
    shape = tuple(value.shape)
    return sharded.Enter.apply(local, context.model_mesh, placements, shape)


def _enter(value):
    context = current()
    if not value.is_floating_point():
        return value
    return sharded.Enter.apply(
        value,
        context.model_mesh,
        context.model_placements_whole,
        tuple(value.shape),
    )
