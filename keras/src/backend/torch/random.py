"""Overlay: random numbers that differ where rows differ, and only there.

Every process holds the same random state. What a layer draws for its rows must
differ between data shards, and be the same on the processes of one; what is
drawn for weights must be the same everywhere.

With `draw_global_batch` of the distribution, a data shard draws for all rows
of the global batch and keeps what is for its own: one device's numbers.
"""

import functools
import inspect

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.config import floatx
from keras.src.backend.torch import random as upstream
from keras.src.backend.torch.core import get_device
from keras.src.backend.torch.core import to_torch_dtype
from keras.src.backend.torch.distribution import modes as modes_lib
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.mesh import rows as rows_lib
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import drawing
from keras.src.backend.torch.distribution.variables import storage
from keras.src.random.seed_generator import SeedGenerator

# Keras's functions of this module take their seeds from `draw_seed`.
__all__ = [
    "beta",
    "binomial",
    "draw_seed",
    "dropout",
    "gamma",
    "normal",
    "randint",
    "truncated_normal",
    "uniform",
]

released_draw_seed = upstream.draw_seed
released_dropout = upstream.dropout

# Far apart, since Keras adds a counter to its seeds.
STRIDE = 0x9E3779B1


def _draws_for_rows(context):
    """Whether what is drawn now is drawn for rows of a data shard."""
    return (
        context is not None
        and context.data_size > 1
        and modes.calls
        and not modes.drawing
        # What code draws that sees the global batch is for all of it.
        and (modes.step is None or rows_lib.get_current_rows() is not None)
    )


def draw_seed(seed):
    """As Keras's; draws for rows differ between data shards."""
    context = current()
    first, second = released_draw_seed(seed)
    if not _draws_for_rows(context) or _batch(context) is not None:
        return first, second
    # Their sum seeds a generator: read once from a device, as there.
    return int(first + second) + context.data_index * STRIDE, 0


def _batch(context):
    """The `Rows` to draw for where all are drawn for, else None."""
    batch = rows_lib.get_current_rows()
    if batch is None or not context.distribution.draw_global_batch:
        return None
    return batch


def _local_rows(batch, size):
    """A slice of what is drawn for a batch, None if `size` is not its local
    rows."""
    start, stop = rows_lib.with_a_row(batch.start, batch.start + batch.local)
    return slice(start, stop) if size == stop - start else None


def _for_all_rows(function):
    """A function that draws a shape: for the global batch, if that is asked
    for and the first dim is the rows of our data shard. A single number is no
    row's: it is the same on all processes."""

    @functools.wraps(function)
    def draw(shape, *args, **kwargs):
        context = current()
        if not _draws_for_rows(context):
            return function(shape, *args, **kwargs)
        if not len(shape):
            with modes_lib.drawing_initial_values():
                return function(shape, *args, **kwargs)
        batch = _batch(context)
        local = batch and _local_rows(batch, shape[0])
        if local and not any(map(_is_of_rows, (*args, *kwargs.values()))):
            shape = (batch.total, *shape[1:])
            return function(shape, *args, **kwargs)[local]
        return function(shape, *args, **kwargs)

    return draw


def _is_of_rows(parameter):
    """Whether a parameter of a draw may have an entry for each row."""
    return getattr(parameter, "ndim", 0) > 0


beta = _for_all_rows(upstream.beta)
binomial = _for_all_rows(upstream.binomial)
gamma = _for_all_rows(upstream.gamma)
randint = _for_all_rows(upstream.randint)


def _in_parts(function, numbers, draw):
    """A function that draws a shape: our part, where that is of a variable
    that is sharded, and can be drawn without the whole.

    Args:
        function: of a shape, two parameters, a dtype and a seed.
        numbers: class of `drawing`, what it draws by.
        draw: function of `drawing`, by which a part is drawn.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def draw_part(*args, **kwargs):
        part = modes.part
        if part is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        shape, *parameters, dtype, seed = bound.arguments.values()
        dtype = to_torch_dtype(dtype or floatx())
        if (
            tuple(shape) != part.shape
            or any(type(x) not in (int, float) for x in parameters)
            or torch.device(get_device()).type != "cpu"
            or not drawing.can_draw(numbers, part, dtype)
        ):
            return function(*args, **kwargs)
        generator = upstream.torch_seed_generator(seed)
        part.origin = f"{tuple(parameters)} of seed {generator.initial_seed()}"
        return draw(generator, part, dtype, *parameters)

    return draw_part


normal = _in_parts(
    _for_all_rows(upstream.normal), drawing.Normal, drawing.normal
)
truncated_normal = _in_parts(
    _for_all_rows(upstream.truncated_normal),
    drawing.Normal,
    drawing.truncated_normal,
)
uniform = _in_parts(
    _for_all_rows(upstream.uniform), drawing.Uniform, drawing.uniform
)


def dropout(inputs, rate, noise_shape=None, seed=None):
    """As Keras's; on shards, what one device drops."""
    context = current()
    if (
        context is None
        or rate in (0.0, 1.0)
        or not modes.calls
        or type(inputs) is GlobalTensor
    ):
        return released_dropout(inputs, rate, noise_shape, seed)
    batch = local = None
    if _draws_for_rows(context):
        batch = _batch(context)
        local = batch and _local_rows(batch, inputs.shape[0])
        if batch is None and _is_unseeded(seed) and noise_shape is None:
            # Torch's global generator must stay the same on all processes,
            # also where shards have different numbers of rows.
            seed = int(torch.randint(1 << 31, ()).item())
    if local:
        draw = functools.partial(_mask_of_all_rows, batch, local)
    elif isinstance(inputs, DTensor):
        draw = _mask
    else:
        return released_dropout(inputs, rate, noise_shape, seed)
    if not isinstance(inputs, DTensor):
        return inputs * draw(inputs, rate, noise_shape, seed)
    inputs = sharded.reduced(inputs)
    mask = draw(inputs, rate, noise_shape, seed)
    return inputs * storage.shard(mask, inputs.device_mesh, inputs.placements)


def _mask(like, rate, noise_shape, seed, rows=None):
    """What one device multiplies an activation with.

    Args:
        like: the activation, plain or a DTensor, of the global shape.
        rate, noise_shape, seed: as of `dropout`.
        rows: optional int, how many rows it is of in place of those of `like`.
    """
    shape = tuple(like.shape)
    if rows is not None:
        if noise_shape is not None and noise_shape[0] == shape[0]:
            noise_shape = (rows, *noise_shape[1:])
        shape = (rows, *shape[1:])
    ones = torch.ones(shape, dtype=like.dtype, device=like.device)
    return released_dropout(ones, rate, noise_shape, seed)


def _mask_of_all_rows(batch, local, like, rate, noise_shape, seed):
    """As `_mask`: drawn for the global batch, of which `local` rows are
    kept."""
    return _mask(like, rate, noise_shape, seed, batch.total)[local]


def _is_unseeded(seed):
    return seed is None or (
        isinstance(seed, SeedGenerator) and seed._initial_seed is None
    )
