"""Overlay: the distribution API finds its torch backend here.

It is for all backends: another one does with it what it does with Keras's own.
"""

import math
import re
import warnings

from keras.src import backend
from keras.src.distribution import distribution_lib as upstream

if backend.backend() == "torch":
    # Released Keras sets `keras.src.backend.distribution_lib` to None there.
    from keras.src.backend.torch import distribution_lib
else:
    from keras.src.backend import distribution_lib

__all__ = [
    "DataParallel",
    "DeviceMesh",
    "Distribution",
    "LayoutMap",
    "ModelParallel",
    "TensorLayout",
    "distribution_lib",
    "initialize",
    "set_distribution",
]

# On torch each device has a process, which cuts the batches it is handed and
# prepares what a distribution needs. Other backends do neither.
HAS_A_PROCESS_A_DEVICE = hasattr(distribution_lib, "activate")

released_initialize = upstream.initialize
released_set_distribution = upstream.set_distribution


def initialize(
    job_addresses=None, num_processes=None, process_id=None, timeout=None
):
    """Initialize the distribution system for multi-host/process setting.

    As Keras's own, which says more of the first three, with a limit to waits.

    Args:
        job_addresses: string, the addresses of all processes, separated by
            commas. Defaults to `KERAS_DISTRIBUTION_JOB_ADDRESSES`, or to what
            the launcher says.
        num_processes: int. Defaults to `KERAS_DISTRIBUTION_NUM_PROCESSES`.
        process_id: int. Defaults to `KERAS_DISTRIBUTION_PROCESS_ID`.
        timeout: number of seconds, on the torch backend alone: a wait for
            other processes that takes longer, once all have joined, is an
            error that says what each of them does. Defaults to
            `KERAS_DISTRIBUTION_TIMEOUT`, and that to torch's own: half an hour
            on gloo, ten minutes on NCCL.
    """
    if timeout is not None:
        if not hasattr(distribution_lib, "set_timeout"):
            raise ValueError(
                "`timeout` is of the torch backend. Received: "
                f"timeout={timeout} on the {backend.backend()} backend"
            )
        distribution_lib.set_timeout(timeout)
    released_initialize(job_addresses, num_processes, process_id)


class DeviceMesh(upstream.DeviceMesh):
    __doc__ = upstream.DeviceMesh.__doc__

    def __init__(self, shape, axis_names, devices=None):
        if axis_names and len(set(axis_names)) < len(axis_names):
            raise ValueError(
                "Each axis of a mesh needs a name of its own. Received: "
                f"axis_names={axis_names}, shape={shape}"
            )
        super().__init__(shape, axis_names, devices)


class LayoutMap(upstream.LayoutMap):
    __doc__ = upstream.LayoutMap.__doc__

    def __init__(self, device_mesh):
        super().__init__(device_mesh)
        # Keys by the paths that were asked for, and those that were warned of.
        self._keys, self._warned = {}, set()
        self.lays_out_outputs = False

    @classmethod
    def auto(
        cls,
        model,
        mesh,
        batch_size=None,
        budget=None,
        x=None,
        batch_dim_name=None,
    ):
        """A layout map that is found for a model: no key has to be written.

        The model is called once, on tensors without memory; nothing is
        communicated. What can be cut is told by its code: column and row in
        turn, heads as a unit, and so on. To print the result's `code` gives a
        program to paste, its `explanation` what was decided. Whatever it is,
        a model trains to the same numbers.

        ```python
        layout_map = keras.distribution.LayoutMap.auto(make_model, mesh, 64)
        print(layout_map.code)
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layout_map)
        )
        model = make_model()
        ```

        Args:
            model: a function without arguments that makes a model; or a built
                model.
            mesh: `DeviceMesh`. Weights are cut over all axes that do not split
                batches. Where several of them cost less as one, the layout map
                is of another mesh, its `device_mesh`: of the same devices, with
                these axes joined to one.
            batch_size: int, rows of a global batch.
            budget: int, bytes that a process may hold of weights, gradients
                and slots. While it holds more, the largest weights are cut by
                the data axis too (FSDP).
            x: a global batch, where its shape is not known from the model.
            batch_dim_name: name of the axis that splits batches, or a tuple.
                Defaults to the first of the mesh.

        Returns:
            A `LayoutMap`, with two strings beside: `code` and `explanation`.
        """
        from keras.src.distribution import auto_layout

        found = auto_layout.find(
            model, mesh, batch_size, budget, x, batch_dim_name
        )
        layout_map = cls(found.mesh)
        for key, axes in found.keys.items():
            layout_map[key] = axes
        layout_map.code = found.code
        layout_map.explanation = found.explanation
        return layout_map

    def __setitem__(self, key, layout):
        if not isinstance(key, str):
            raise TypeError(
                "A key of a layout map is a string, the regular expression of "
                f"a path. Received: key={key!r} of type "
                f"{type(key).__name__}, layout={layout}"
            )
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(
                "A key of a layout map is a regular expression, and this is "
                f"none: {error}. Received: key={key!r}, layout={layout}"
            ) from error
        super().__setitem__(key, layout)
        self._have_changed()

    def __delitem__(self, key):
        super().__delitem__(key)
        self._have_changed()

    def _have_changed(self):
        self._keys.clear()
        # Whether a key is of an output, that a program may be handed cut.
        self.lays_out_outputs = any(key.endswith("/output") for key in self)

    def __str__(self):
        # Of one that was found: the program that makes it.
        return getattr(self, "code", None) or super().__str__()

    def key_of(self, path):
        """The key that a path matches, None if there is none.

        Raises:
            ValueError: if there are several.
        """
        if path not in self._keys:
            key = None
            if self[path] is not None:
                keys = [key for key in self if re.fullmatch(key, path)]
                key = path if path in self._layout_map else keys[0]
            self._keys[path] = key
        return self._keys[path]

    def use(self, path):
        """The layout of a path, None if it matches no key."""
        key = self.key_of(path)
        return None if key is None else self[key]

    def without_use(self, outputs):
        """Keys that no path has matched so far, each only the first time.

        Args:
            outputs: bool, whether keys of outputs, or all others.
        """
        used = set(self._keys.values())
        keys = [
            key
            for key in self
            if key.endswith("/output") == outputs
            and key not in used
            and key not in self._warned
        ]
        self._warned.update(keys)
        return keys


class TensorLayout(upstream.TensorLayout):
    """A layout to apply to a tensor.

    Args:
        axes: tuple, for each dim the name of the mesh axis that cuts it, a
            tuple of names (the first cuts the whole dim, the next each of its
            chunks), or `None`.
        device_mesh: optional `DeviceMesh` that the names belong to.

    Raises:
        ValueError: if the mesh lacks an axis.
    """

    def _validate_axes(self):
        if self._device_mesh is None:
            return
        valid = list(self._device_mesh.axis_names)
        for axis in self._axes:
            names = axis if isinstance(axis, (tuple, list)) else (axis,)
            if any(n is not None and n not in valid for n in names):
                raise ValueError(
                    "Invalid axis names for Layout. Valid axis names: "
                    f"{valid}. Received: axes={self._axes}"
                )


class DataLayout(TensorLayout):
    """How the rows of a batch are split: by `fit` and its like, not before.

    `distribute_tensor` leaves a batch as it is, whole on every process, so
    that any operation can follow, also outside of layers.
    """

    is_of_rows = True


class Distribution(upstream.Distribution):
    # In `fit`, `train_on_batch` and the like: whether each data shard draws
    # what layers draw for rows (dropout, noise, augmentation) for the whole
    # global batch, and keeps what is for its own rows. Then the numbers of one
    # device come out on any mesh, for the time that drawing them all takes.
    # It holds for draws whose first dim is the rows: a draw whose first dim is
    # one and means all rows is taken for such, where a data shard has one row.
    draw_global_batch = False
    # Whether weights that the data axis cuts (FSDP) are freed after a layer has
    # computed with them, and gathered again in backward. False keeps them until
    # then: one gather less, and the memory of all weights. A dict says it by
    # the path of a variable: `{".*embeddings": False}`; those whose path
    # matches no key are freed. (As `reshard_after_forward` of torch's FSDP2.)
    reshard_after_forward = True

    @property
    def batch_axis_names(self):
        """Tuple of the names of the axes that batches are split over."""
        names = self.batch_dim_name
        return (names,) if isinstance(names, str) else tuple(names)

    @property
    def num_model_replicas(self):
        """Number of data shards."""
        names = list(self.device_mesh.axis_names)
        return math.prod(
            int(self.device_mesh.shape[names.index(name)])
            for name in self.batch_axis_names
        )

    @property
    def data_shard_id(self):
        """Coordinate of this process on the axis that batches are split over.

        Whichever axis that is: processes are numbered by the whole mesh. Of
        several axes, the coordinate on the first counts most.
        """
        if not HAS_A_PROCESS_A_DEVICE:
            return super().data_shard_id
        index = 0
        if self.num_processes == 1:
            return index
        mesh = self.device_mesh.backend_mesh
        for name in self.batch_axis_names:
            axis = list(self.device_mesh.axis_names).index(name)
            index = index * mesh.size(axis) + mesh.get_local_rank(axis)
        return index

    def get_data_layout(self, data_shape):
        layout = super().get_data_layout(data_shape)
        return DataLayout(layout.axes, layout.device_mesh)

    def distribute_dataset(self, dataset):
        if not HAS_A_PROCESS_A_DEVICE:
            return super().distribute_dataset(dataset)
        # `fit` cuts the batches of any source itself.
        return dataset

    def activate(self):
        """Prepares what variables, layers and training ask for.

        Collective the first time: every process calls it.
        """
        if HAS_A_PROCESS_A_DEVICE:
            distribution_lib.activate(self)


class DataParallel(Distribution, upstream.DataParallel):
    __doc__ = upstream.DataParallel.__doc__


class ModelParallel(Distribution, upstream.ModelParallel):
    __doc__ = (upstream.ModelParallel.__doc__ or "").replace(
        "(of the `layout_map` object)\n",
        "(of the `layout_map` object), or a tuple of names in the order of\n"
        "            the mesh, of which the first splits rows first,\n",
    )

    def __init__(self, *, layout_map=None, batch_dim_name=None, **kwargs):
        if batch_dim_name and isinstance(layout_map, upstream.LayoutMap):
            batch_dim_name = _batch_axes(
                batch_dim_name, list(layout_map.device_mesh.axis_names)
            )
        super().__init__(
            layout_map=layout_map, batch_dim_name=batch_dim_name, **kwargs
        )
        mesh = kwargs.get("device_mesh")
        if mesh is not None and mesh is not layout_map.device_mesh:
            raise ValueError(
                "The layout map was made for another mesh. Received: "
                f"device_mesh={mesh}, layout_map.device_mesh="
                f"{layout_map.device_mesh}"
            )

    def parallelize(self, layer):
        """Gives a layer that was just built the style of its variables."""
        if HAS_A_PROCESS_A_DEVICE:
            distribution_lib.parallelize_layer(layer, self, self._layout_map)

    def get_variable_layout(self, variable):
        layout = self._layout_map.use(variable.path)
        if layout is None or getattr(variable, "_layout", None) is not None:
            return super().get_variable_layout(variable)
        return layout

    def key_of(self, path):
        """The key of the layout map that a path matches, None without one."""
        return self._layout_map.key_of(path)

    def get_tensor_layout(self, path):
        return self._layout_map.use(path)

    @property
    def lays_out_outputs(self):
        """Whether what a layer returns may reach the program cut."""
        return self._layout_map.lays_out_outputs

    def warn_of_unmatched_keys(self, paths):
        """Says which keys of the layout map have matched no variable.

        Args:
            paths: list, of the model that is about to be trained.
        """
        for path in paths:
            self._layout_map.use(path)
        for key in self._layout_map.without_use(outputs=False):
            hint = ""
            if any(re.search(key, path) for path in paths):
                hint = f" A key must match a whole path: '.*{key}.*' would."
            warnings.warn(
                f"The key '{key}' of the layout map matches no variable of "
                f"the model.{hint} The first paths are: {list(paths)[:5]}",
                stacklevel=3,
            )

    def warn_of_unmatched_outputs(self):
        """Says which keys of outputs have matched no layer that was called."""
        for key in self._layout_map.without_use(outputs=True):
            warnings.warn(
                f"The key '{key}' of the layout map has no effect: no layer "
                "that was called has such an output. It must match a layer's "
                "whole path and '/output', as '.*head/output' does.",
                stacklevel=3,
            )


def _batch_axes(batch_dim_name, names):
    """A name, or several as a tuple, of axes of a mesh with these names."""
    if isinstance(batch_dim_name, str):
        given = (batch_dim_name,)
    else:
        given = tuple(batch_dim_name)
    if any(name not in names for name in given):
        raise ValueError(
            "`batch_dim_name` must name an axis of the mesh, or be a tuple of "
            f"names. Received: batch_dim_name={batch_dim_name!r}, mesh "
            f"axes={names}"
        )
    if list(given) != [name for name in names if name in given]:
        raise ValueError(
            "`batch_dim_name` must name each axis once, in the order of the "
            f"mesh. Received: batch_dim_name={batch_dim_name!r}, mesh "
            f"axes={names}"
        )
    return given if len(given) > 1 else given[0]


def set_distribution(value):
    """Set the distribution as the global distribution setting.

    Collective the first time for a distribution: every process calls it.

    Args:
        value: a `Distribution` instance, or None.
    """
    if hasattr(value, "activate"):
        value.activate()
    released_set_distribution(value)
    if HAS_A_PROCESS_A_DEVICE:
        distribution_lib.distribution_was_set(value)
