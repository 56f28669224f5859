"""From what is stored of a weight to what a layer computes with.

Data axes are gathered, which is FSDP; model axes stay cut, which is tensor
parallelism. Backward is the reduce-scatter of the gradient.

As in torch's FSDP2, a weight is freed after use and gathered again in backward
(see `resharding`), the next one is on its way while a layer computes (see
`order`), and so is the reduction of the last gradients.
"""

import contextlib

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate

from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import in_flight
from keras.src.backend.torch.distribution.variables import order as order_lib
from keras.src.backend.torch.distribution.variables import resharding


def operand(value, context, variable=None):
    """What a layer computes with: whole on the data axes, our model shards.

    Autograd then gives what belongs to it: the reduce-scatter of the gradient
    over the data axes. FSDP when only these shard, tensor parallelism when only
    model axes do, and both at once.

    Collective along the data axes that shard the variable; backward along all
    of them, if one does.

    Args:
        value: the stored value, a DTensor on the whole mesh or plain.
        context: the `Context`.
        variable: whose value it is, perhaps cast. Without it, the whole value
            is kept until backward.

    Returns:
        Plain local tensor, and its placements on `context.model_mesh`.
    """
    if not isinstance(value, DTensor):
        return value, context.model_placements_whole
    if cuts.has_several_on_a_dim(value.placements):
        return _operand_of_several_cuts(value, context)
    placements = context.model_placements(value.placements)
    tracks = torch.is_grad_enabled() and value.requires_grad
    if (
        _is_unsharded(value, context)
        and _is_value_of(variable, value)
        and not torch.compiler.is_compiling()
    ):
        return _unsharded(value, variable, tracks, context), placements
    if tracks:
        return Unshard.apply(value, context), placements
    return _gathered(value, context), placements


def stored_or_operand(value, context, variable):
    """As `operand`, for a function that takes a weight as it is stored where
    no data axis cuts it, and gives its gradient as such (`ops.linear`)."""
    if (
        sharded.is_weight(value)
        and value.device_mesh == context.mesh
        and not context.cuts_data(value.placements)
    ):
        return value
    return operand(value, context, variable)[0]


def placements_of_operand(value, context):
    """The placements of `operand` on the model mesh, where no dim is cut twice.

    Does not communicate.
    """
    if not isinstance(value, DTensor):
        return context.model_placements_whole
    return context.model_placements(value.placements)


def _is_unsharded(value, context):
    """Whether a data axis cuts what is stored. (Where two do, of two dims, the
    weight is kept until backward.)"""
    return len(context.cuts_data(value.placements)) == 1


def _is_value_of(variable, value):
    """Whether a value is what a variable stores, perhaps cast."""
    if variable is None or not sharded.is_weight(variable._value):
        return False
    return value is variable._value or (
        value.dtype != variable._value.dtype and not in_stateless_scope()
    )


def _unsharded(value, variable, tracks, context):
    part = in_flight.part_of(variable._value, value.dtype, context)
    read = part, tracks

    def unshard(triples):
        return _unsharded_together(triples, context)

    if not resharding.is_met(modes.layer):
        return unshard([(read, variable, value)])[0]
    return modes.reads.read(read, variable, value, unshard)


def _unsharded_together(triples, context):
    """Whole weights, gathered at once; their gradients are reduced at once.

    Collective along the data axis.

    Args:
        triples: list of a read (of `resharding.Reads`), its variable, and its
            value, None for what the variable stores.
        context: the `Context`.
    """
    parts = tuple(part for (part, _), *_ in triples)
    order = order_of(context)
    wholes = order.take(parts, context)
    (_, tracks), variable, _ = triples[0]
    if tracks:
        values = [
            _value(part, variable, value)
            for (part, _), variable, value in triples
        ]
        reductions = []
        shards = Shards.apply(order, reductions, *values)
        private.run_last(shards[0].grad_fn)
        wholes = Whole.apply(
            (parts, wholes, reductions), order, context, *shards
        )
    if torch.is_grad_enabled() and modes.reads is not None:
        if all(resharding.is_wanted(p, v) for (p, _), v, _ in triples):
            resharding.Unsharded(parts, order, context).mark(wholes)
    return list(wholes)


def _value(part, variable, value):
    if value is None:
        value = part.weight
        if value is None:
            # Freed since: nobody reads it.
            value = torch.zeros(
                part.shard_shape, dtype=part.dtype, device=part.device
            )
        elif value.dtype != part.dtype:
            value = value.to(part.dtype)
    return value


class Shards(torch.autograd.Function):
    """Stored weights -> our shards of them.

    Backward gives the weights what `Whole` has begun to reduce. It runs when
    all the rest of backward is done (see `private.run_last`), so that what is
    reduced is on its way while other gradients are computed.
    """

    @staticmethod
    def forward(ctx, order, reductions, *values):
        ctx.set_materialize_grads(False)
        ctx.order, ctx.reductions = order, reductions
        ctx.layouts = [
            laid_out.layout_of(value) if isinstance(value, DTensor) else None
            for value in values
        ]
        shards = [getattr(value, "_local_tensor", value) for value in values]
        return tuple(shard.view_as(shard) for shard in shards)

    @staticmethod
    def backward(ctx, *grads):
        reductions = ctx.reductions[:]
        ctx.reductions.clear()
        ctx.order.finish(reductions)
        return (
            None,
            None,
            *(
                None if grad is None or layout is None else layout.carry(grad)
                for layout, grad in zip(ctx.layouts, grads)
            ),
        )


class Whole(torch.autograd.Function):
    """Our shards of weights -> the whole weights, which have been gathered.

    Backward: the weighted mean of the data shards' gradients, scattered, in
    one collective; begun, and left to `Shards` to wait for.

    Collective along the data axis in backward.
    """

    @staticmethod
    def forward(ctx, gathered, order, context, *shards):
        ctx.set_materialize_grads(False)
        ctx.order, ctx.context = order, context
        ctx.parts, wholes, ctx.reductions = gathered
        return tuple(wholes)

    @staticmethod
    def backward(ctx, *grads):
        grads = [
            None if grad is None else collectives.whole_gradient(grad)
            for grad in grads
        ]
        if torch.is_grad_enabled():
            shards = [
                None
                if grad is None
                else laid_out.scattered(grad, [part.cut], ctx.context)
                for part, grad in zip(ctx.parts, grads)
            ]
            return None, None, None, *shards
        reduction, shards = ctx.order.reduce(ctx.parts, grads, ctx.context)
        ctx.reductions.append(reduction)
        return None, None, None, *shards


def order_of(context):
    """The `Order` of a context."""
    if context.order is None:
        context.order = order_lib.Order()
    return context.order


NOTHING = contextlib.nullcontext()


def _may_unshard(context):
    """Whether a data axis may cut weights."""
    return context.has_layouts and bool(context.data_axes)


def forward_pass(context):
    """Within it, the outermost layer is called."""
    if not _may_unshard(context):
        return NOTHING
    return order_of(context).forward_pass()


def reading(layer, context):
    """Within it, a layer is called: what it unshards is freed after it, and
    noted for the next call. Nothing for what unshards nothing."""
    if (
        not _may_unshard(context)
        or torch.compiler.is_compiling()
        or not _reads(layer, context)
    ):
        return NOTHING
    return resharding.reading(layer)


def reading_again(context):
    """Within it, backward runs the code of the innermost layer again: what
    that unshards together it unshards together once more."""
    if modes.layer is None or modes.reads is not None:
        return NOTHING
    return reading(modes.layer, context)


def _reads(layer, context):
    """Whether a layer has unsharded weights, or has weights to unshard."""
    if marks.READS in layer.__dict__:
        return True
    own = layer._trainable_variables + layer._non_trainable_variables
    if not own:
        return False
    known = layer.__dict__.get(marks.READS_DECISION)
    if known is None or known[:2] != (context, len(own)):
        reads = any(
            is_laid_out_by(v._value, context)
            and _is_unsharded(v._value, context)
            and not cuts.has_several_on_a_dim(v._value.placements)
            for v in own
        )
        known = context, len(own), reads
        layer.__dict__[marks.READS_DECISION] = known
    return known[2]


def _operand_of_several_cuts(value, context):
    """As `operand`, where several axes cut one dim.

    The data axes, and what was cut after one of them, are gathered; then the
    model axes cut anew. Where their order is not that of the model mesh, they
    stay gathered.
    """
    placements = list(context.model_placements(value.placements))
    axes_of = {}
    for dim, axis, size in laid_out.levels(value):
        if context.mesh.size(axis) > 1:
            axes_of.setdefault(dim, []).append((axis, size))
    gathered, anew = [], []
    for dim, axes in axes_of.items():
        order = [axis for axis, _ in axes]
        model = [axis for axis in order if axis not in context.data_axes]
        again = model == sorted(model)
        data = [i for i, axis in enumerate(order) if axis in context.data_axes]
        first = 0
        if again:
            first = data[0] if data else len(order)
        gathered += [(dim, axis, size) for axis, size in axes[first:]]
        for axis in order[first:]:
            if axis in context.data_axes:
                continue
            if again:
                anew.append((dim, axis))
            else:
                placements[context.model_axes.index(axis)] = Replicate()
    layout = laid_out.layout_of(value)._replace(context=context)
    local = laid_out.Local.apply(value)
    local = laid_out.gather_shards(local, layout, gathered)
    for dim, axis in anew:
        group = context.mesh.get_group(axis)
        local = collectives.Slice.apply(local, dim, group)
    return local, tuple(placements)


def is_model_sharded(value, context):
    """Whether a stored value is sharded over an axis of the model mesh."""
    return is_laid_out_by(value, context) and any(
        cuts.is_cut(value.placements[axis]) for axis in context.model_axes
    )


def is_laid_out_by(value, context):
    """Whether a stored value is cut as a layout map says.

    A torch module's own DTensors, of a plan written by hand, are not: they lie
    on a mesh of that plan. (Meshes are compared by value: DTensor's caches may
    hand out an equal mesh in place of the one that went in.)
    """
    return isinstance(value, DTensor) and value.device_mesh == context.mesh


def _gathered(value, context):
    return laid_out.gather_levels(
        sharded.local_of(value), _data_cuts(value, context), context.mesh
    )


def _data_cuts(value, context):
    """Those of `laid_out.levels` that are of data axes, where each dim is cut
    once."""
    return [
        (
            value.placements[axis].dim,
            axis,
            value.shape[value.placements[axis].dim],
        )
        for axis in context.cuts_data(value.placements)
    ]


class Unshard(torch.autograd.Function):
    """Stored DTensor -> the local tensor that a layer computes with."""

    @staticmethod
    def forward(ctx, value, context):
        ctx.layout, ctx.context = laid_out.layout_of(value), context
        ctx.cuts = _data_cuts(value, context)
        local = _gathered(value, context)
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad):
        grad = collectives.whole_gradient(grad)
        if ctx.cuts:
            grad = laid_out.scattered(grad, ctx.cuts, ctx.context)
        return ctx.layout.carry(grad.contiguous()), None


def gather_model_axes(local, placements, shape, context):
    """The whole of an operand, from model shards.

    Collective along the model axes that cut it.
    """
    layout = laid_out.Layout(
        DTensor, context.model_mesh, tuple(placements), tuple(shape)
    )
    return laid_out.gather_shards(local, layout)
