"""What is written on objects that are not of this package: the name of each
attribute, whose it is, and what it means.

It lives as long as what it is written on, so that nothing has to be freed. No
other file makes up such a name.
"""

# ---- on a `keras.distribution.Distribution`

CONTEXT = "_torch_context"  # its `mesh.context.Context`

# ---- on a model

MADE_UNDER = "_torch_made_under"  # the `Context` in which it was made
CHECKED = "_keras_checked_for"  # the `Context` in which its layout was checked
POSITION = "_keras_position"  # where its `fit` is: `training.position`
PREEMPTION = "_keras_preemption"  # whether its `fit` was asked to end
LOOP = "_keras_loop"  # Keras's own loop runs, which hands logs to callbacks
STOP = "_keras_stop"  # who asks its `fit` to stop: `training.stopping`

# ---- on a layer

STYLE = "_parallel_style"  # the style that a user has put on it
STYLE_DECISION = "_keras_style_decision"  # how it runs, in which `Context`
PLAN = "_keras_plan"  # how it projects: its last `projection.Plan`
CONTRACTIONS = "_keras_contractions"  # dict: ndim of inputs -> `Contraction`
READS_DECISION = "_keras_reads_decision"  # whether it owns what is unsharded
READS = "_keras_reads"  # what its calls have unsharded: `resharding.Reads`

# ---- on a variable of a metric

METRIC_STATE = "_keras_metric_state"  # what it holds between steps

# ---- on an exception

FAILED_FIRST = "_keras_failed_first"  # what another process has failed with

# ---- on a parameter, a leaf of autograd's, or a node of its graph

REDUCED = "_keras_is_reduced"  # its gradient is reduced by hooks: a bool
TAKEN = "_keras_variable_of"  # a torch module's, and a Keras variable too

# ---- on a weight as it is stored

NAME = "_keras_name"  # what all processes call it; on a layer too
PARTS = "_keras_parts"  # dict: dtype -> `in_flight.Part`, and
HANDED_OUT = "_keras_handed_out"  # in it, where there has been a `.data`

# ---- on the memory of a tensor

UNSHARDED = "_keras_unsharded"  # its `resharding.Unsharded`, and its index

# ---- on a tensor

REQUESTED = "_keras_requested_layout"  # a program asked for this layout
DUE = "_keras_due"  # `GradientSum`: what the gradient of a tensor is due for
COLUMN_INPUT = "_keras_column_input"  # weak dict: what column layers share
GRADIENT = "_keras_gradient"  # its gradient and its rows, read as global rows
FOLLOWED = "_keras_followed"  # `GlobalTensor`s that share its memory
BOX = "_keras_box"  # keeps the `GlobalTensor` alive whose gathered rows it is
