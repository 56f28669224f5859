"""Sharded checkpoints: each process writes and reads its own shards."""

from keras.src.api_export import keras_export
from keras.src.distribution import processes


@keras_export("keras.distribution.save_checkpoint")
def save_checkpoint(
    model, directory, step=None, user=None, max_to_keep=None, weights_only=False
):
    """Saves a model, and all that its training goes on from, in shards.

    Each process writes what it stores, and what several store is written once:
    nothing is gathered. Beside weights there are the optimizer's variables,
    metrics, seeds and random states. `keras.callbacks.ShardedCheckpoint` saves
    while `fit` goes on, and its place in the data too.

    Collective under a distribution: every process calls it, with a directory
    that all of them see. If one fails, all raise, and the checkpoints that were
    there are whole.

    Args:
        model: a model that is built.
        directory: path-like; the checkpoint is a folder in it.
        step: int, by which the folder is named. Defaults to the optimizer's
            iterations.
        user: what the program keeps beside it, of which JSON can be made, such
            as `{"epoch": 3}`. `load_checkpoint` gives it back.
        max_to_keep: int, the number of checkpoints that the directory keeps;
            None for all.
        weights_only: whether to save the model's weights alone.

    Returns:
        `pathlib.Path` of the checkpoint.
    """
    checkpoints = processes.sharded_checkpoints()
    if step is None:
        optimizer = getattr(model, "optimizer", None)
        step = 0 if optimizer is None else int(optimizer.iterations)
    with processes.distribution_of(model):
        saver = checkpoints.Saver(directory, max_to_keep)
        checkpoints.save(
            saver, model, step, user=user, weights_only=weights_only
        )
        return saver.wait()


@keras_export("keras.distribution.load_checkpoint")
def load_checkpoint(model, path, weights_only=False):
    """Restores a model from a sharded checkpoint, on any mesh.

    Each process reads what it stores, whatever the mesh, the layouts and the
    number of processes were that the checkpoint was saved under. Nothing of it
    is unpickled.

    Collective under a distribution: every process calls it.

    Args:
        model: a model that is built, and compiled, as the one that was saved.
        path: path-like, of a checkpoint, or of a directory for its latest.
        weights_only: whether to restore the model's weights alone, and leave
            its optimizer and the random states.

    Returns:
        What `save_checkpoint` was handed as `user`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        OSError: if a part of it is missing, cut short or damaged.
        ValueError: if it is of another model.
    """
    restored = processes.sharded_checkpoints().restore(
        model, path, weights_only
    )
    if not weights_only:
        restored.restore_metrics()
    return restored.user
