"""Convolutions and windows on local shards.

A convolution contracts channels with its kernel: sharded output channels are
columns, sharded input channels rows, and sharded groups both (see
`contraction`). Its window is never cut. What treats each channel by itself, as
pooling does, runs on shards of the batch and of the channels.
"""

from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate

from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.ops import contraction
from keras.src.backend.torch.distribution.tensors import sharded

WINDOW = "xyz"  # dims of the window; capital letters in the output


def mesh_of(*tensors):
    """The mesh of the first DTensor, None if all are plain."""
    for x in tensors:
        if isinstance(x, DTensor):
            return x.device_mesh
    return None


def convolve(function, inputs, kernel, letters):
    """`function(inputs, kernel)` on local shards.

    Collective along the model axes, as `contraction` says.

    Args:
        function: a convolution of plain tensors.
        inputs, kernel: tensors, one of them at least a DTensor.
        letters: the `Contraction`.

    Returns:
        Plain tensor, or a DTensor, as `activations.carry` gives it.
    """
    mesh = mesh_of(inputs, kernel)
    inputs, kernel = _one_axis_a_dim(inputs), _one_axis_a_dim(kernel)
    shape = tuple(kernel.shape)
    local_kernel, placements = activations.local(kernel, mesh)
    cut = contraction.operands(
        inputs, local_kernel, placements, shape, letters, mesh
    )
    y = cut.reduced(function(cut.x, cut.kernel))
    output_shape = letters.output_shape(inputs.shape, shape, y.shape)
    return activations.carry(y, mesh, cut.placements, output_shape)


def on_channels(function, inputs, data_format):
    """`function(inputs)`, which treats each row and each channel by itself.

    Collective along the model axes where `inputs` is cut along another dim.

    Args:
        function: function of a plain tensor, which keeps its batch and channel
            dims.
        inputs: DTensor of shape `(batch, ..., channels)`, or
            `(batch, channels, ...)` for `"channels_first"`.
        data_format: string.

    Returns:
        As `convolve`.
    """
    mesh = inputs.device_mesh
    channels = channel_dim(inputs.ndim, data_format)
    inputs = _one_axis_a_dim(inputs)
    if not isinstance(inputs, DTensor):
        return function(inputs)
    inputs = sharded.reduced(inputs)
    placements = tuple(
        p if contraction.dim_of(p) in (0, channels) else Replicate()
        for p in inputs.placements
    )
    if placements != tuple(inputs.placements):
        inputs = inputs.redistribute(placements=placements)
    y = function(sharded.Leave.apply(inputs))
    shape = list(y.shape)
    shape[0], shape[channels] = inputs.shape[0], inputs.shape[channels]
    return activations.carry(y, mesh, placements, tuple(shape))


def channel_dim(ndim, data_format):
    """The dim of the channels."""
    return ndim - 1 if data_format == "channels_last" else 1


def _one_axis_a_dim(x):
    placements = getattr(x, "placements", ())
    if cuts.has_several_on_a_dim(placements):
        return sharded.whole(x)
    return x


def letters_of_convolution(inputs, kernel, data_format):
    """Kernel `(window, channels / groups, outputs)`."""
    channels = inputs.shape[channel_dim(inputs.ndim, data_format)]
    groups = channels // max(kernel.shape[-2], 1)
    if groups == 1:
        return _letters("i", "io", "o", inputs.ndim, data_format)
    # Shards of whole groups: their inputs give their outputs.
    return _letters(
        "g", "ig", "g", inputs.ndim, data_format, "i", {"g": groups}
    )


def letters_of_transposed(inputs, kernel, data_format):
    """Kernel `(window, outputs, channels)`."""
    return _letters("i", "oi", "o", inputs.ndim, data_format)


def letters_of_depthwise(inputs, kernel, data_format):
    """Kernel `(window, channels, multiplier)`."""
    channels, multiplier = kernel.shape[-2:]
    return _letters(
        "c",
        "cm",
        "c",
        inputs.ndim,
        data_format,
        "m",
        {"c": channels},
        {"c": multiplier},
    )


def _letters(
    channels,
    kernel,
    outputs,
    ndim,
    data_format,
    uncut="",
    multiples=None,
    widths=None,
):
    window = WINDOW[: ndim - 2]
    inputs, output = window + channels, window.upper() + outputs
    if data_format == "channels_first":
        inputs, output = channels + window, outputs + window.upper()
    return contraction.Contraction(
        f"b{inputs},{window}{kernel}->b{output}",
        window + uncut,
        multiples,
        widths,
    )
