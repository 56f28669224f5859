"""What a collective is for, and over which axes of the mesh it goes."""

import sys

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.gradients import reducer
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.training import logs
from keras.src.backend.torch.distribution.variables import in_flight

# What is communicated for: activations of a layer, weights that the data axis
# cuts and their gradients, other gradients, and what is none of these.
ACTIVATIONS, WEIGHTS, GRADIENTS, OTHERS = (
    "activations",
    "weights",
    "gradients",
    "others",
)
FILES = {
    in_flight.__file__: WEIGHTS,
    reducer.__file__: GRADIENTS,
    reducer.__file__.replace("reducer.py", "buckets.py"): GRADIENTS,
    logs.__file__: OTHERS,
}


def reason():
    """What this project communicates for, and the first of the weights."""
    frame = sys._getframe(3)
    for _ in range(40):
        if frame is None:
            break
        kind = FILES.get(frame.f_code.co_filename)
        if kind is WEIGHTS and "self" not in frame.f_locals:
            frame = frame.f_back
            continue
        if kind is not None:
            what = frame.f_locals.get("self")
            parts = getattr(what, "parts", getattr(what, "_parts", None))
            return kind, parts[0] if kind is WEIGHTS and parts else None
        frame = frame.f_back
    return None, None


def axes_of(name):
    """The size of a process group, and the names of its mesh axes."""
    size = private.group_of(name).size()
    context = context_lib.current()
    if context is None:
        return size, "all"
    if context.data_axes and context.data_group.group_name == name:
        return size, ", ".join(context.axis_names[i] for i in context.data_axes)
    for axis, axis_name in enumerate(context.axis_names):
        if context.mesh.get_group(axis).group_name == name:
            return size, axis_name
    return size, "all"
