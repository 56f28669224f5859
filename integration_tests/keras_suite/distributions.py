"""The distribution that every test runs under."""

import functools
import sys

NAMES = ("none", "data", "model")


def create(name):
    """A distribution over all processes, or None.

    Args:
        name: `"data"` for `DataParallel`; `"model"` for a `ModelParallel` that
            cuts the last dim of every variable where it divides; `"none"`.
    """
    import keras

    if name == "none":
        return None
    if name == "data":
        return keras.distribution.DataParallel()
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh(
        (1, len(devices)), ("batch", "model"), devices
    )
    return _cut_last_dims()(
        layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name="batch"
    )


def _cut_last_dims():
    import keras

    class CutLastDims(keras.distribution.ModelParallel):
        def get_variable_layout(self, variable):
            if getattr(variable, "_layout", None) is not None:
                return variable._layout
            axes = [None] * len(variable.shape)
            if axes and variable.shape[-1] % self.device_mesh.shape[1] == 0:
                axes[-1] = "model"
            return keras.distribution.TensorLayout(axes, self.device_mesh)

    return CutLastDims


def keep(distribution):
    """Has the distribution set again by whatever resets it.

    Call it before the tests are imported, which take the functions by name.
    """
    from keras.src.backend.common import global_state
    from keras.src.distribution import distribution_lib

    clear_session = global_state.clear_session
    set_distribution = distribution_lib.set_distribution

    @functools.wraps(clear_session)
    def clear_and_set(*args, **kwargs):
        clear_session(*args, **kwargs)
        set_distribution(distribution)

    @functools.wraps(set_distribution)
    def set_or_keep(value):
        set_distribution(distribution if value is None else value)

    _replace(clear_session, clear_and_set)
    _replace(set_distribution, set_or_keep)


def _replace(function, other):
    """Puts another function in the place of one, where tests find it.

    Not in the module that the patch takes `set_distribution` from.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "keras" or name.endswith(
            ".distribution_lib"
        ):
            continue
        for key, value in list(vars(module).items()):
            if value is function:
                setattr(module, key, other)
