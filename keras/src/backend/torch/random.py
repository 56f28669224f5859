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
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import drawing
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


def _part_of_batch(context, shape):
    """The `drawing.Part` of what is drawn for a global batch that is for our
    rows, None where it is not drawn for that."""
    batch = _batch(context)
    local = batch and len(shape) and _local_rows(batch, shape[0])
    if not local:
        return None
    ranges = [(local.start, local.stop), *((0, size) for size in shape[1:])]
    return drawing.Part((batch.total, *shape[1:]), ranges)


def _is_of_rows(parameter):
    """Whether a parameter of a draw may have an entry for each row."""
    return getattr(parameter, "ndim", 0) > 0


beta = _for_all_rows(upstream.beta)
binomial = _for_all_rows(upstream.binomial)
gamma = _for_all_rows(upstream.gamma)
randint = _for_all_rows(upstream.randint)


def _in_parts(function, numbers, draw):
    """A function that draws a shape: our part, where that is of a variable
    that is sharded, or of a batch that all draw for, and can be drawn without
    the whole.

    Args:
        function: of a shape, two parameters, a dtype and a seed.
        numbers: class of `drawing`, what it draws by.
        draw: function of `drawing`, by which a part is drawn.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def draw_part(*args, **kwargs):
        context = current()
        part = modes.part
        is_of_rows = part is None and _draws_for_rows(context)
        if part is None and not is_of_rows:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        shape, *parameters, dtype, seed = bound.arguments.values()
        dtype = to_torch_dtype(dtype or floatx())
        if is_of_rows:
            part = _part_of_batch(context, shape)
        elif tuple(shape) != part.shape:
            part = None
        if (
            part is None
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
    if not local and not isinstance(inputs, DTensor):
        return released_dropout(inputs, rate, noise_shape, seed)
    shape = list(inputs.shape)
    ranges = [(0, size) for size in shape]
    if isinstance(inputs, DTensor):
        inputs = sharded.reduced(inputs)
        ranges = laid_out.ranges(laid_out.layout_of(inputs))
    if local:
        if noise_shape is not None and noise_shape[0] == shape[0]:
            noise_shape = (batch.total, *noise_shape[1:])
        shape[0] = batch.total
        ranges[0] = tuple(local.start + i for i in ranges[0])
    part = drawing.Part(shape, ranges)
    mask = _own_mask(part, inputs, rate, noise_shape, seed)
    if isinstance(inputs, DTensor):
        mask = sharded.wrap(
            mask, inputs.device_mesh, inputs.placements, tuple(inputs.shape)
        )
    return inputs * mask


def _own_mask(part, like, rate, noise_shape, seed):
    """Our part of what one device multiplies an activation with.

    Drawn without the rest on the host, if it is large; else of the whole.

    Args:
        part: the `drawing.Part` of the whole activation that we have.
        like: the activation, for its dtype and device.
        rate, noise_shape, seed: as of `dropout`.
    """
    is_drawn = _is_unseeded(seed) and noise_shape is None
    noise = _part_of_noise(part, noise_shape)
    if (
        noise is not None
        and like.device.type == torch.device(get_device()).type == "cpu"
        and drawing.can_drop(noise, not is_drawn)
    ):
        generator = None if is_drawn else upstream.torch_seed_generator(seed)
        mask = drawing.dropout(generator, noise, like.dtype, rate)
        return mask.expand(part.local_shape)
    ones = torch.ones(part.shape, dtype=like.dtype, device=like.device)
    mask = released_dropout(ones, rate, noise_shape, seed)
    # A copy: a view would keep the whole until backward.
    return mask[tuple(slice(*pair) for pair in part.ranges)].clone(
        memory_format=torch.contiguous_format
    )


def _part_of_noise(part, noise_shape):
    """The `drawing.Part` of what is drawn for ours, None if it is not known."""
    if noise_shape is None:
        return part
    if len(noise_shape) != len(part.shape):
        return None
    shape, ranges = [], []
    for size, whole, pair in zip(noise_shape, part.shape, part.ranges):
        shape.append(whole if size is None else size)
        ranges.append(pair if shape[-1] == whole else (0, shape[-1]))
    return drawing.Part(shape, ranges)


def _is_unseeded(seed):
    return seed is None or (
        isinstance(seed, SeedGenerator) and seed._initial_seed is None
    )
