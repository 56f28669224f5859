"""What `keras.distribution` stands on with torch: one noun a file.

Imports go downwards only, in this order: process_group, mesh, operators,
context, modes, rows, collectives, sharded, gradients, storage, execution,
styles, plan, feeding, logs. Nothing here imports a Keras layer, model or
trainer when it is itself imported.
"""

__all__ = []
