"""Overlay: what runs on local shards, sharded classes, global moments."""

import functools
import inspect

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.config import standardize_data_format
from keras.src.backend.torch import nn as upstream
from keras.src.backend.torch.distribution.batch import statistics
from keras.src.backend.torch.distribution.global_rows import borders
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.ops import attention
from keras.src.backend.torch.distribution.ops import convolution
from keras.src.backend.torch.distribution.ops import cross_entropy
from keras.src.backend.torch.distribution.tensors import sharded

__all__ = [
    "adaptive_average_pool",
    "adaptive_max_pool",
    "average_pool",
    "conv",
    "conv_transpose",
    "depthwise_conv",
    "dot_product_attention",
    "max_pool",
    "moments",
    "sparse_categorical_crossentropy",
]

FORMAT = "data_format"

released_dot_product_attention = upstream.dot_product_attention
released_moments = upstream.moments
released_sparse_categorical_crossentropy = (
    upstream.sparse_categorical_crossentropy
)


def _sharded_convolution(released, letters_of):
    """A convolution that runs on local shards of its channels.

    Collective along the model axes if the input or the kernel is a DTensor:
    see `contraction`.
    """
    signature = inspect.signature(released)

    @functools.wraps(released)
    def function(inputs, kernel, *args, **kwargs):
        def convolve(x, kernel):
            if _fails_on_one_row(x, kernel):
                # A second row, that nothing is made of.
                x = torch.cat([x, x.detach()])
                return released(x, kernel, *args, **kwargs)[:1]
            return released(x, kernel, *args, **kwargs)

        if convolution.mesh_of(inputs, kernel) is None:
            return convolve(inputs, kernel)
        inputs = upstream.convert_to_tensor(inputs)
        kernel = upstream.convert_to_tensor(kernel)
        bound = signature.bind(inputs, kernel, *args, **kwargs)
        data_format = standardize_data_format(bound.arguments.get(FORMAT))
        return convolution.convolve(
            convolve,
            inputs,
            kernel,
            letters_of(inputs, kernel, data_format),
        )

    return function


def _fails_on_one_row(inputs, kernel):
    """Whether backward of a convolution fails on a data shard's only row.

    torch 2.13: of one row, on one thread, the CPU's plain kernel is taken,
    which refuses the gradient of a kernel of one channel, as Keras lays it out.
    """
    return (
        rows.get_current_rows() is not None
        and torch.is_tensor(inputs)
        and inputs.device.type == "cpu"
        and inputs.shape[0] == 1
        and 1 in kernel.shape[-2:]
        and torch.is_grad_enabled()
    )


def _of_rows(function, tensors):
    """A function that treats each entry of dim 0 alike, of the global batch as
    code in a step sees it.

    Args:
        function: a function of this file.
        tensors: int, how many of its first arguments have a dim for rows.
    """

    @functools.wraps(function)
    def on_rows(*args, **kwargs):
        first = args[:tensors]
        if (
            len(first) == tensors
            and is_rows(first[0])
            and all(getattr(x, "at", 0) == 0 for x in first)
            and not any(
                type(x) is GlobalTensor
                for x in (*args[tensors:], *kwargs.values())
            )
        ):
            return borders.on_rows_of(
                function, *args, tensors=tensors, **kwargs
            )
        return function(*args, **kwargs)

    return on_rows


def _on_channels(released):
    """A function of each row and each channel, on their shards.

    Collective along the model axes where the input is cut along another dim.
    """
    signature = inspect.signature(released)

    @functools.wraps(released)
    def function(inputs, *args, **kwargs):
        if not isinstance(inputs, DTensor):
            return released(inputs, *args, **kwargs)
        bound = signature.bind(inputs, *args, **kwargs)
        return convolution.on_channels(
            lambda x: released(x, *args, **kwargs),
            inputs,
            standardize_data_format(bound.arguments.get(FORMAT)),
        )

    return function


adaptive_average_pool, adaptive_max_pool, average_pool, max_pool = [
    _of_rows(_on_channels(released), 1)
    for released in (
        upstream.adaptive_average_pool,
        upstream.adaptive_max_pool,
        upstream.average_pool,
        upstream.max_pool,
    )
]
# A separable convolution is a depthwise one and a plain one.
conv, conv_transpose, depthwise_conv = [
    _of_rows(_sharded_convolution(released, letters_of), 1)
    for released, letters_of in (
        (upstream.conv, convolution.letters_of_convolution),
        (upstream.conv_transpose, convolution.letters_of_transposed),
        (upstream.depthwise_conv, convolution.letters_of_depthwise),
    )
]


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    scale=None,
    is_causal=False,
    flash_attention=None,
    attn_logits_soft_cap=None,
):
    """As Keras's; sharded heads (or rows) are computed where they are.

    torch has no sharding rule for attention on CPU. Heads need nothing of each
    other, so no rule is needed.

    Keras asks torch whether flash attention can be used with an object of C++,
    which breaks the graph of a compiled step at each attention, and with it
    those of all layers around. There torch itself takes the kernel that fits.

    Collective along the model axes if query, key and value are not sharded
    alike.

    Args:
        query, key, value: tensors of shape `(batch, length, heads, dim)`.
        bias, mask: optional tensors that broadcast to
            `(batch, heads, query length, key length)`.
    """
    if flash_attention is None and torch.compiler.is_compiling():
        flash_attention = False
    return attention.attend(
        released_dot_product_attention,
        (query, key, value),
        bias,
        mask,
        (scale, is_causal, flash_attention, attn_logits_soft_cap),
    )


def moments(x, axes, keepdims=False, synchronized=False):
    """As Keras's; in a step, over the rows of the global batch.

    With `synchronized`, which released Keras refuses here, so too outside of
    layers and of steps; on one process it changes nothing.

    Collective along the data axis if `axes` holds the batch dim and the call
    is a layer's in a step, or `synchronized`: every process of the axis calls
    it.
    """
    x = upstream.convert_to_tensor(x)
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if type(x) is GlobalTensor:
        return released_moments(x, axes, keepdims)
    context = statistics.context_over_rows(x, axes, synchronized)
    if context is None:
        return released_moments(x, axes, keepdims)
    dtype = x.dtype
    if dtype == torch.float16:
        x = x.to(torch.float32)
    # The variance is E[x^2] - E[x]^2, as released Keras has it.
    size = _size(x, axes)
    pair = torch.stack(
        [
            torch.sum(x, dim=axes, keepdim=True),
            torch.sum(torch.square(x), dim=axes, keepdim=True),
        ]
    )
    rows_now = rows.get_current_rows()
    if rows_now is not None:
        # Sums of the shards, over the size of the global batch.
        share = rows_now.share / max(size, 1)
        pair = statistics.sum_over_data(pair * share, context)
    else:
        total = torch.tensor([size], dtype=torch.int64)
        dist.all_reduce(total, group=context.data_group)
        pair = statistics.sum_over_data(pair / int(total), context)
    mean = pair[0]
    variance = pair[1] - torch.square(mean)
    if not keepdims:
        mean = torch.squeeze(mean, axes)
        variance = torch.squeeze(variance, axes)
    if dtype == torch.float16:
        limits = torch.finfo(dtype)
        mean = torch.clip(mean, limits.min, limits.max).to(dtype)
        variance = torch.clip(variance, limits.min, limits.max).to(dtype)
    return mean, variance


def _size(x, axes):
    size = 1
    for axis in axes:
        size *= x.shape[axis]
    return size


def sparse_categorical_crossentropy(target, output, from_logits=False, axis=-1):
    """As Keras's; logits whose classes are sharded are not gathered, and those
    whose classes come last are not copied.

    Collective along the model axes if `output` is a DTensor.
    """
    if not isinstance(output, DTensor):
        if is_rows(output) and isinstance(output.local, DTensor):
            output = activations.whole(output)
        if from_logits and _has_classes_last(target, output, axis):
            # Released Keras moves them to the second dim, where torch's
            # softmax takes copies of the logits, forward and backward.
            target = upstream.convert_to_tensor(target, torch.long)
            if modes.runs_backward_once and output.dtype == torch.float32:
                return cross_entropy.sparse_cross_entropy(
                    target.reshape(output.shape[:-1]), output
                )
            losses = torch.nn.functional.cross_entropy(
                output.flatten(0, -2), target.flatten(), reduction="none"
            )
            return losses.reshape(output.shape[:-1])
        return released_sparse_categorical_crossentropy(
            target, output, from_logits, axis
        )
    output = sharded.reduced(output)
    target = upstream.convert_to_tensor(sharded.whole(target), torch.long)
    if target.ndim == output.ndim and target.shape[axis] == 1:
        target = torch.squeeze(target, dim=axis)
    if (
        from_logits
        and axis % output.ndim == output.ndim - 1
        and target.shape == output.shape[:-1]
        and cross_entropy.class_axis_of(output) is not None
    ):
        return cross_entropy.sparse_cross_entropy(target, output)
    return released_sparse_categorical_crossentropy(
        target, sharded.whole(output), from_logits, axis
    )


def _has_classes_last(target, output, axis):
    """Whether targets are one for each of several rows of rows of logits."""
    return (
        type(output) is torch.Tensor
        and output.ndim > 1
        and axis in (-1, output.ndim - 1)
        and tuple(target.shape) in (output.shape[:-1], (*output.shape[:-1], 1))
    )
