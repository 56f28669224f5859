"""What the current distribution means for this process."""

import contextlib
import functools
import logging
import math
import threading
import weakref

import torch.distributed as dist
from torch.distributed.tensor import Replicate

from keras.src.backend.common import global_state
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.mesh import torch_mesh as mesh_lib

logger = logging.getLogger("keras.distribution")


class _Set:
    """A distribution that is set, for as long as Keras's state keeps this."""

    def __init__(self, distribution):
        self.distribution = distribution


# A weak reference to what was set last, by whichever thread, or None.
_last = [None]


def set_last(distribution):
    """To be called with each distribution that is set, and with None."""
    kept = None if distribution is None else _Set(distribution)
    # Beside the distribution, as `clear_session` drops both.
    global_state.set_global_attribute("_torch_set", kept)
    _last[0] = None if kept is None else weakref.ref(kept)


def current():
    """The `Context` of the current distribution, None without one.

    It is None as well with one process: then nothing is distributed, and
    everything is left to released Keras.
    """
    distribution = global_state.get_global_attribute("distribution")
    if distribution is None:
        # Keras keeps a distribution for the thread that set it. Backward of
        # what lies on a GPU runs in a thread of autograd's, and may run layers
        # again there (activation checkpointing).
        kept = None if _last[0] is None else _last[0]()
        if kept is None or not private.is_in_backward():
            return None
        distribution = kept.distribution
    return getattr(distribution, marks.CONTEXT, None)


def own_distribution(model):
    """A scope of the distribution that a model was built under.

    It does nothing where a distribution is set, without several processes, and
    outside of the main thread: another thread may be of one process alone.
    """
    if (
        global_state.get_global_attribute("distribution") is not None
        or not process_group.is_running()
        or dist.get_world_size() == 1
        or threading.current_thread() is not threading.main_thread()
    ):
        return contextlib.nullcontext()
    contexts = [getattr(v, "_context", None) for v in model.variables]
    contexts = [c for c in contexts if c is not None]
    # Where it has no variables yet.
    contexts.append(model.__dict__.get(marks.MADE_UNDER))
    if contexts[0] is None:
        return contextlib.nullcontext()
    return contexts[0].distribution.scope()


class Context:
    """The mesh of a distribution, seen from this process.

    Collective: every process constructs it (the mesh makes process groups).

    Attributes:
        mesh: torch mesh of all axes.
        data_axes: tuple of the indices in `mesh` of the axes of size > 1 that
            batches are split over. The first splits rows first.
        data_size, data_index: number of data shards, and that of this process.
        data_group: process group along all data axes, None if there are none.
        data_ranks: ranks of the processes of that group, in its order.
        model_axes: indices in `mesh` of the other axes of size > 1.
        model_mesh: torch mesh of these axes, None if there are none.
        reducer: the `Reducer` of gradients, None with one data shard.
        order: the `Order` in which weights are gathered, None before the first.
        has_unlike_shards: whether layers were called in another order on some
            data shard than on others.
    """

    def __init__(self, distribution):
        device_mesh = distribution.device_mesh
        self.distribution = distribution
        self.has_unlike_shards = False
        self.mesh = mesh_lib.to_torch_mesh(device_mesh)
        names = list(device_mesh.axis_names)
        sizes = [int(n) for n in device_mesh.shape]
        self.axis_names = names
        batch_axes = [names.index(n) for n in distribution.batch_axis_names]
        self.data_axes = tuple(i for i in batch_axes if sizes[i] > 1)
        self.data_size = math.prod(sizes[i] for i in self.data_axes)
        self._data_mesh, self._data_axis = self.mesh, None
        self.data_index, self.data_ranks = 0, [dist.get_rank()]
        if self.data_axes:
            self._data_axis = self.data_axes[0]
            if len(self.data_axes) > 1:
                self._data_mesh = mesh_lib.joined(self.mesh, self.data_axes)
                self._data_axis = 0
            # Data shards are numbered as their group has them, which need not
            # be the order of the mesh: what a group gathers comes that way.
            self.data_index = dist.get_rank(self.data_group)
            self.data_ranks = dist.get_process_group_ranks(self.data_group)
        self.model_axes = [
            i
            for i, size in enumerate(sizes)
            if size > 1 and i not in self.data_axes
        ]
        self.model_mesh = None
        self.model_size = 1
        if self.model_axes:
            self.model_mesh = self.mesh[
                tuple(names[i] for i in self.model_axes)
            ]
        for i in self.model_axes:
            self.model_size *= sizes[i]
        self.model_placements_whole = (Replicate(),) * len(self.model_axes)
        self.reducer = None
        self.order = None
        self._said = set()

    @property
    def data_group(self):
        # Looked up, not kept: a group that is kept never ends.
        if not self.data_axes:
            return None
        return self._data_mesh.get_group(self._data_axis)

    @functools.cached_property
    def shards(self):
        """The data shard of each process, by rank."""
        first = range(len(self.data_axes))
        ranks = self.mesh.mesh.movedim(self.data_axes, tuple(first))
        ranks = ranks.reshape(self.data_size, -1).tolist()
        shard_of = {r: i for i, shard in enumerate(ranks) for r in shard}
        return [shard_of[rank] for rank in range(dist.get_world_size())]

    def says_first(self, *key):
        """Whether something is said for the first time; then it is not again,
        as long as the distribution lives."""
        if key in self._said:
            return False
        self._said.add(key)
        return True

    @property
    def has_layouts(self):
        """Whether variables may be sharded."""
        return hasattr(self.distribution, "_layout_map")

    @property
    def auto_shard(self):
        return self.distribution.auto_shard_dataset

    def placements(self, layout, shape, path):
        """One placement for each axis of the mesh.

        Args:
            layout: `TensorLayout`, an axis name, a tuple of them, or None for
                each dim; dims that it leaves out are not sharded.
            shape: the global shape of the tensor.
            path: the tensor's name, for errors.

        Raises:
            ValueError: if the layout has more dims than the tensor, names an
                axis twice, or belongs to another mesh.
        """
        return layout_placements(
            layout, self.mesh, shape, path, self.distribution.device_mesh
        )

    def cuts_data(self, placements):
        """The data axes that cut what has these placements on `mesh`.

        What none of them cuts, each data shard has whole, with a gradient of
        its own loss. What some of them cut has one gradient for all.
        """
        return tuple(i for i in self.data_axes if cuts.is_cut(placements[i]))

    def model_placements(self, placements):
        """Those of `placements` that belong to `model_mesh`, in its order."""
        own = [placements[i] for i in self.model_axes]
        if not own or not cuts.has_several_on_a_dim(placements):
            return tuple(own)
        pairs = cuts.from_placements(tuple(placements), tuple(self.mesh.shape))
        return cuts.to_placements(
            [
                (dim, self.model_axes.index(axis))
                for dim, axis in pairs
                if axis in self.model_axes
            ],
            tuple(self.model_mesh.shape),
        )

    def is_sharded(self, placements):
        """Whether any axis of size > 1 shards."""
        return any(
            cuts.is_cut(p) and self.mesh.size(i) > 1
            for i, p in enumerate(placements)
        )


def layout_placements(layout, mesh, shape, path, device_mesh=None):
    """Tensor dims -> axis names becomes mesh axes -> placements."""
    axis_names = list(mesh.mesh_dim_names)
    axes = tuple(layout.axes)
    if len(axes) > len(shape):
        raise ValueError(
            f"The layout of '{path}' has more dims than the tensor: "
            f"{len(axes)} > {len(shape)}. Received: layout axes={axes}, "
            f"shape={tuple(shape)}"
        )
    if device_mesh is not None and layout.device_mesh is not None:
        if layout.device_mesh is not device_mesh and (
            mesh_lib.configuration(layout.device_mesh)
            != mesh_lib.configuration(device_mesh)
        ):
            raise ValueError(
                f"The layout of '{path}' belongs to another mesh than the "
                f"distribution. Received: {layout.device_mesh}, expected "
                f"{device_mesh}"
            )
    pairs = []
    for dim, names in enumerate(axes):
        if names is None:
            continue
        for name in (names,) if isinstance(names, str) else names:
            if name not in axis_names:
                raise ValueError(
                    f"The layout of '{path}' names an axis that the mesh "
                    f"lacks. Received: axis '{name}', mesh axes={axis_names}"
                )
            axis = axis_names.index(name)
            if any(axis == other for _, other in pairs):
                raise ValueError(
                    f"The layout of '{path}' uses the axis '{name}' twice. "
                    f"Received: layout axes={axes}"
                )
            pairs.append((dim, axis))
    return cuts.to_placements(pairs, tuple(mesh.shape))
