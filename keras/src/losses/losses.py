"""Overlay: losses of a batch as a whole are those of the global batch.

Dice and Tversky are ratios of sums over all rows, and Circle compares each row
with all others: no means over rows. Every data shard computes the global loss.
"""

from keras.src import backend
from keras.src import ops
from keras.src.backend.torch.distribution.batch import gathers
from keras.src.backend.torch.distribution.batch import statistics
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.losses import losses as upstream

__all__ = ["circle", "dice", "tversky"]

released_circle = upstream.circle
released_dice = upstream.dice
released_tversky = upstream.tversky


def dice(y_true, y_pred, axis=None):
    """As Keras's; in a step, over the rows of all data shards.

    Collective in a step, if `axis` holds the batch dim: every process of the
    data axis calls it.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    context = _context(y_pred, axis)
    if context is None:
        return released_dice(y_true, y_pred, axis)
    y_true = ops.cast(y_true, y_pred.dtype)
    both, true, predicted = _sums(
        context, axis, y_true * y_pred, y_true, y_pred
    )
    return 1 - 2.0 * both / (true + predicted + backend.epsilon())


def tversky(y_true, y_pred, alpha=0.5, beta=0.5, axis=None):
    """As Keras's; in a step, over the rows of all data shards.

    Collective in a step, if `axis` holds the batch dim: every process of the
    data axis calls it.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    context = _context(y_pred, axis)
    if context is None:
        return released_tversky(y_true, y_pred, alpha, beta, axis)
    y_true = ops.cast(y_true, y_pred.dtype)
    # Which of the two `alpha` weighs is released Keras's choice.
    both, missed, wrong = _sums(
        context,
        axis,
        y_true * y_pred,
        y_true * (1 - y_pred),
        y_pred * (1 - y_true),
    )
    return 1 - both / (both + missed * alpha + wrong * beta + backend.epsilon())


def circle(
    y_true, y_pred, ref_labels=None, ref_embeddings=None, *args, **kwargs
):
    """As Keras's; in a step, over the rows of all data shards.

    Collective in a step: every process of the data axis calls it.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    context = _context(y_pred, None)
    if context is None or ref_embeddings is not None:
        return released_circle(
            y_true, y_pred, ref_labels, ref_embeddings, *args, **kwargs
        )
    y_true, y_pred = [
        gathers.GatherForLoss.apply(ops.convert_to_tensor(x), context)
        for x in (y_true, y_pred)
    ]
    losses = released_circle(y_true, y_pred, None, None, *args, **kwargs)
    mask = backend.get_keras_mask(losses)
    ours = slice(*rows.get_current_rows().ranges()[context.data_index])
    losses = losses[ours]
    backend.set_keras_mask(losses, mask[ours])
    return losses


def _context(y_pred, axis):
    if rows.get_current_rows() is None:
        return None
    axes = (axis,) if isinstance(axis, int) else axis
    return statistics.context_over_rows(y_pred, axes, synchronized=True)


def _sums(context, axis, *values):
    sums = ops.stack([ops.sum(x, axis=axis) for x in values])
    return statistics.sum_over_data(sums, context)
