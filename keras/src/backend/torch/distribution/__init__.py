"""What `keras.distribution` stands on with torch, in rooms of one job each.

Imports go downwards only; `rooms_test` holds them to it:

    seam
    checkpoints    report
    training
    layers
    variables
    ops
    global_rows    gradients
    batch
    tensors
    mesh
    modes          private

Nothing here imports a Keras layer, model or trainer when it is itself imported.
"""

__all__ = []
