"""Overlay: layers run by the style of their sharded variables."""

from keras.src.backend.torch import layer as upstream
from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.layers import execution
from keras.src.backend.torch.distribution.layers import released
from keras.src.backend.torch.distribution.mesh.context import current

__all__ = ["TorchLayer"]


class TorchLayer(upstream.TorchLayer):
    def forward(self, *args, **kwargs):
        context = current()
        if context is None:
            return released.call(self, args, kwargs)
        return execution.call(self, context, args, kwargs)

    def _post_build(self):
        super()._post_build()
        context = current()
        if context is not None and context.model_mesh is not None:
            context.distribution.parallelize(self)

    def _track_variables(self):
        with modes.stored_values():
            super()._track_variables()

    def _post_track_variable(self, variable):
        with modes.stored_values():
            super()._post_track_variable(variable)
