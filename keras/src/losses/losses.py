"""Overlay: losses of a batch as a whole are those of the global batch.

Dice and Tversky are ratios of sums over all rows, and Circle compares each row
with all others: no means over rows. Every data shard computes the global loss.
"""

from keras.src import backend
from keras.src import ops
from keras.src.distribution import processes
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
    if not _spans_rows(y_pred, axis):
        return released_dice(y_true, y_pred, axis)
    y_true = ops.cast(y_true, y_pred.dtype)
    both, true, predicted = _sums(axis, y_true * y_pred, y_true, y_pred)
    return 1 - 2.0 * both / (true + predicted + backend.epsilon())


def tversky(y_true, y_pred, alpha=0.5, beta=0.5, axis=None):
    """As Keras's; in a step, over the rows of all data shards.

    Collective in a step, if `axis` holds the batch dim: every process of the
    data axis calls it.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    if not _spans_rows(y_pred, axis):
        return released_tversky(y_true, y_pred, alpha, beta, axis)
    y_true = ops.cast(y_true, y_pred.dtype)
    # Which of the two `alpha` weighs is released Keras's choice.
    both, missed, wrong = _sums(
        axis,
        y_true * y_pred,
        y_true * (1 - y_pred),
        y_pred * (1 - y_true),
    )
    return 1 - both / (both + missed * alpha + wrong * beta + backend.epsilon())


def circle(
    y_true,
    y_pred,
    ref_labels=None,
    ref_embeddings=None,
    remove_diagonal=True,
    gamma=80,
    margin=0.4,
):
    """As Keras's; in a step, over the rows of all data shards.

    Collective in a step: every process of the data axis calls it.
    """
    y_pred = ops.convert_to_tensor(y_pred)
    settings = remove_diagonal, gamma, margin
    if not _spans_rows(y_pred, None) or ref_embeddings is not None:
        return released_circle(
            y_true, y_pred, ref_labels, ref_embeddings, *settings
        )
    y_true, y_pred = [
        processes.gather_rows(ops.convert_to_tensor(x))
        for x in (y_true, y_pred)
    ]
    losses = released_circle(y_true, y_pred, None, None, *settings)
    mask = backend.get_keras_mask(losses)
    losses = processes.own_rows(losses)
    backend.set_keras_mask(losses, processes.own_rows(mask))
    return losses


def _spans_rows(y_pred, axis):
    if processes.share_of_rows() is None:
        return False
    axes = (axis,) if isinstance(axis, int) else axis
    return processes.spans_rows(y_pred, axes, synchronized=True)


def _sums(axis, *values):
    return processes.sum_over_rows(
        ops.stack([ops.sum(x, axis=axis) for x in values])
    )
