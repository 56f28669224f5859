"""Utilities for distribution strategy with the PyTorch backend.

One process is one device: `torchrun` starts them. Devices are numbered by
process, over all hosts.
"""

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.common import global_state
from keras.src.backend.torch.core import convert_to_tensor
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import seam
from keras.src.backend.torch.distribution.batch import gathers
from keras.src.backend.torch.distribution.global_rows import borders
from keras.src.backend.torch.distribution.global_rows import entry_points
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.gradients.reducer import Reducer
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.mesh import torch_mesh as mesh_lib
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.variables import storage
from keras.src.backend.torch.distribution.variables import weights

__all__ = [
    "list_devices",
    "get_device_count",
    "distribute_tensor",
    "distribute_variable",
    "distribute_data_input",
    "initialize_rng",
    "initialize",
    "set_timeout",
    "num_processes",
    "process_id",
    "create_tp_plan_from_layout_map",
    "parallelize_torch_module",
    "activate",
    "distribution_was_set",
    "parallelize_layer",
    # What `keras.src.distribution.processes` asks.
    *seam.__all__,
]

globals().update({name: getattr(seam, name) for name in seam.__all__})

ENTRY_POINTS = "torch_entry_points"
REPLICATION = "torch_implicit_replication"


def list_devices(device_type=None):
    """Return all the available devices based on the device type.

    One for each process of the job, on all hosts. Under a launcher such as
    `torchrun` the first call joins the job.

    Args:
        device_type: string of `"cpu"` or `"gpu"`. Defaults to `"gpu"` if
            available when `device_type` is not provided. Otherwise will return
            the `"cpu"` devices.

    Return:
        List of strings such as `"cpu:0"`, the devices that are available for
        distributed computation.
    """
    kind = (device_type or process_group.device_type()).lower()
    kind = "gpu" if kind == "cuda" else kind
    torch_kind = "cuda" if kind == "gpu" else kind
    if torch_kind not in mesh_lib.available_types():
        raise ValueError(
            f"There is no device of type '{kind}' here. Available: "
            f"{mesh_lib.available_types()}. Received: "
            f"device_type={device_type}"
        )
    return [f"{kind}:{i}" for i in range(num_processes())]


def get_device_count(device_type=None):
    """Returns the number of available devices: one for each process.

    Args:
        device_type: Optional device type to count (`"cpu"` or `"gpu"`). If
            `None`, it defaults to counting "gpu" devices if available,
            otherwise it counts "cpu" devices.

    Returns:
        int: The total number of devices for the specified type.
    """
    return len(list_devices(device_type))


def distribute_tensor(tensor, layout):
    """Distribute the tensor based on the layout.

    Outside of layers `tensor` is a global value, equal on all processes, and
    becomes a DTensor on the whole mesh. Inside a layer's call it is an
    activation, whose rows are those of this data shard already: it becomes a
    DTensor on the model axes, and what the layout says of the data axis is
    already true. With one process it stays what it is, and so does a batch
    whose layout is a distribution's `get_data_layout`: any operation may follow
    on it, and rows are cut where layers are trained.

    Collective if `tensor` is a DTensor with another layout.

    Args:
        tensor: `torch.Tensor` that needs to be distributed.
        layout: `TensorLayout`, or what `_to_backend_layout` gives for one.
            None, as `get_tensor_layout` gives where no key matches, leaves
            `tensor` as it is.

    Returns:
        A DTensor that shows the whole shape (`weights.ShardedTensor`): what is
        computed from it is computed from its whole value. Or `tensor` with one
        process.
    """
    layout = getattr(layout, "tensor_layout", layout)
    tensor = convert_to_tensor(tensor)
    if layout is None or getattr(layout, "is_of_rows", False):
        return tensor
    context = context_lib.current()
    is_activation = modes.calls or storage.is_in_layer()
    if type(tensor) is GlobalTensor:
        if is_activation and context is not None:
            return activations.map_rows(
                tensor, _relayout_activation, layout, context
            )
        return tensor
    if is_activation and context is not None:
        return _relayout_activation(tensor, layout, context)
    if context is None and process_group.num_processes() == 1:
        # Released layers run then, on plain tensors.
        return tensor
    placements = _placements(layout, tensor.shape)
    mesh = layout.device_mesh.backend_mesh
    layout = laid_out.Layout(
        weights.ShardedTensor,
        mesh,
        placements,
        tuple(tensor.shape),
        _context_of(mesh),
    )
    if sharded.is_weight(tensor) and layout.is_laid_out(tensor):
        return tensor
    return layout.carry(laid_out.sliced(sharded.whole(tensor), layout))


def distribute_variable(value, layout, trainable=None):
    """Distribute the value of a variable based on the layout.

    Every process passes the same value and keeps its part of it. Integers and
    booleans never ask for a gradient.

    Args:
        value: `torch.Tensor`, array or `keras.Variable`, of any dtype.
        layout: `TensorLayout` for the variable, or what `_to_backend_layout`
            gives for one. With None every process keeps the whole value.
        trainable: whether a floating-point value asks for a gradient. Defaults
            to what `value` says of itself, or True.

    Returns:
        `torch.nn.Parameter` around a DTensor on the layout's mesh, as variables
        store it. Around a plain tensor without a layout.
    """
    if trainable is None:
        trainable = getattr(value, "trainable", None)
    if trainable is None:
        trainable = not isinstance(value, torch.nn.Parameter) or (
            value.requires_grad
        )
    tensor = sharded.whole(convert_to_tensor(value)).detach()
    asks = tensor.is_floating_point() or tensor.is_complex()
    layout = getattr(layout, "tensor_layout", layout)
    if layout is None:
        value = tensor.clone()
    else:
        placements = _placements(layout, tensor.shape)
        mesh = layout.device_mesh.backend_mesh
        value = storage.shard(tensor, mesh, placements)
        value = weights.stored(value, _context_of(mesh))
    return torch.nn.Parameter(value, requires_grad=bool(trainable and asks))


def distribute_data_input(per_process_batch, layout, batch_dim_name=None):
    """Distribute the input data with the corresponding layout.

    Under a distribution that splits batches over this axis, the result is the
    global batch for a program outside of `fit`: its shape is global, each
    process holds its rows, and what models, losses and torch functions compute
    from it is one device's. Otherwise it is a DTensor.

    Collective: every process of the layout's mesh calls it.

    Args:
        per_process_batch: `torch.Tensor` that is already sharded to a local
            process size: the rows of this data shard, whole in other dims.
        layout: `TensorLayout` for the distribution information.
        batch_dim_name: optional name of the mesh axis that splits rows, or a
            tuple of names, of which the first splits first. Defaults to those
            of the layout's first dim.

    Returns:
        A global batch distributed according to `layout`: a `torch.Tensor` of
        the global shape. What is one already is returned as it is; a DTensor
        of another layout is laid out anew.
    """
    if type(per_process_batch) is GlobalTensor:
        return per_process_batch
    layout = getattr(layout, "tensor_layout", layout)
    batch = convert_to_tensor(per_process_batch)
    if layout is None:
        return batch
    placements = _placements(layout, batch.shape)
    mesh = layout.device_mesh.backend_mesh
    if isinstance(batch, DTensor):
        if batch.device_mesh == mesh and batch.placements == placements:
            return batch
        return distribute_tensor(batch, layout)
    named = batch_dim_name or layout.axes[0]
    if named is None:
        return storage.shard(batch, mesh, placements)
    names = list(layout.device_mesh.axis_names)
    axes = [
        names.index(n) for n in ((named,) if isinstance(named, str) else named)
    ]
    axes = tuple(axis for axis in axes if mesh.size(axis) > 1)
    context = context_lib.current()
    if (
        context is not None
        and axes
        and context.data_axes == axes
        and context.mesh == mesh
        and all(
            cuts.is_cut(placement) == (axis in axes)
            for axis, placement in enumerate(placements)
            if mesh.size(axis) > 1
        )
    ):
        # Kept beside the distribution, as `clear_session` drops both.
        if global_state.get_global_attribute(ENTRY_POINTS) is None:
            global_state.set_global_attribute(ENTRY_POINTS, entry_points.Kept())
        counts = rows.counts(batch.shape[0], context.data_group)
        return borders.Step(context).enter(batch, rows.Rows(counts, 0))
    return gathers.assemble(batch, mesh, axes, placements)


def initialize_rng():
    """Initializes the global random number generator across processes.

    This is required for consistent initialization in multi-host settings.

    Collective: every process of the job calls it.
    """
    process_group.ensure_running()
    process_group.agree_on_seed()


def initialize(job_addresses=None, num_processes=None, process_id=None):
    """Joins the processes of a job, and agrees on a random seed.

    Arguments win over the variables that `torchrun` sets. Without either, a
    world of one process is made. GPUs talk through NCCL, CPUs through gloo.

    Collective: every process of the job calls it.

    Args:
        job_addresses: optional string, `"host:port"` of process 0, or of all
            processes, separated by commas (`"[::1]:1234"` for IPv6).
        num_processes: optional int, the number of processes.
        process_id: optional int, from 0 to `num_processes - 1`.
    """
    process_group.start(job_addresses, num_processes, process_id)


def set_timeout(seconds):
    """Sets how long a process waits for others: `initialize(timeout=)`."""
    process_group.set_timeout(seconds)


def num_processes():
    """Return the number of processes for the current distribution setting."""
    return process_group.num_processes()


def process_id():
    """Return the current process ID for the distribution setting."""
    return process_group.process_id()


def create_tp_plan_from_layout_map(module, layout_map):
    """Translates a layout map into a plan for torch's `parallelize_module`.

    Args:
        module: a Keras layer or model, or any `torch.nn.Module`.
        layout_map: `keras.distribution.LayoutMap`. Its keys match Keras's
            variable paths (`".*dense.*kernel"`), or the names of a torch
            module's parameters with slashes (`".*linear/weight"`).

    Returns:
        Dict `{module name: ParallelStyle}` of the modules with a parameter
        that the layout map shards.
    """
    from keras.src.backend.torch.distribution.layers import plan

    return plan.create(module, layout_map)


def parallelize_torch_module(module, device_mesh, plan):
    """Applies a parallel plan to a torch module, in place.

    `ModelParallel` calls it for each layer that is built.

    Collective: every process of `device_mesh` calls it.

    Args:
        module: a Keras layer or model, or any `torch.nn.Module`.
        device_mesh: `keras.distribution.DeviceMesh`, or a torch mesh.
        plan: `{module name: ParallelStyle}`, from
            `create_tp_plan_from_layout_map` or written by hand.

    Returns:
        `module`.
    """
    from keras.src.backend.torch.distribution.layers.plan import parallelize

    mesh = getattr(device_mesh, "backend_mesh", device_mesh)
    return parallelize(module, mesh, plan)


def _to_backend_device(device_name):
    if isinstance(device_name, torch.device):
        return device_name
    kind = mesh_lib.device_type_of(device_name)
    index = mesh_lib.device_index(device_name)
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, process_group.local_rank(index))


def _to_backend_mesh(device_mesh):
    """Convert the DeviceMesh to PyTorch backend specific Mesh.

    Collective on the first call for a configuration: every process calls it.

    Args:
        device_mesh: DeviceMesh instance to convert.

    Returns:
        A `torch.distributed.device_mesh.DeviceMesh` instance.
    """
    return mesh_lib.to_torch_mesh(device_mesh)


class TorchLayout:
    """A `TensorLayout` as torch has it.

    Attributes:
        tensor_layout: the `keras.distribution.TensorLayout`.
        device_mesh: the torch mesh.
        placements: tuple, a `Shard` or `Replicate` for each mesh axis.
    """

    def __init__(self, tensor_layout):
        self.tensor_layout = tensor_layout
        self.device_mesh = tensor_layout.device_mesh.backend_mesh
        self.placements = _placements(
            tensor_layout, [None] * len(tensor_layout.axes)
        )


def _to_backend_layout(tensor_layout):
    """Convert the TensorLayout to mesh and placements.

    Args:
        tensor_layout: TensorLayout instance to convert.

    Returns:
        A `TorchLayout`. None of None, and what is a `TorchLayout` already is
        returned as it is.
    """
    if tensor_layout is None or isinstance(tensor_layout, TorchLayout):
        return tensor_layout
    if tensor_layout.device_mesh is None:
        raise ValueError(
            "Cannot create sharding when device mesh is not set "
            "for TensorLayout."
        )
    return TorchLayout(tensor_layout)


def _placements(layout, shape):
    layout = getattr(layout, "tensor_layout", layout)
    if layout.device_mesh is None:
        raise ValueError(
            "The device mesh of the layout is not set. Received: "
            f"layout={layout}"
        )
    mesh = layout.device_mesh.backend_mesh
    return context_lib.layout_placements(layout, mesh, shape, "tensor")


def _context_of(mesh):
    """The current `Context`, None if it is of another mesh."""
    context = context_lib.current()
    return context if context is not None and context.mesh == mesh else None


def _relayout_activation(tensor, layout, context):
    if context.model_mesh is None:
        return tensor
    placements = context.model_placements(
        context.placements(layout, tensor.shape, "activation")
    )
    if not isinstance(tensor, DTensor):
        tensor = sharded.Enter.apply(
            tensor,
            context.model_mesh,
            context.model_placements_whole,
            tuple(tensor.shape),
        )
    if tuple(tensor.placements) != placements:
        tensor = tensor.redistribute(placements=placements)
    if sharded.is_whole(tensor):
        return sharded.Leave.apply(tensor)
    setattr(tensor, marks.REQUESTED, True)
    return tensor


def activate(distribution):
    """Prepares what variables, layers and training ask of a distribution.

    Collective the first time: every process calls it.
    """
    if process_group.num_processes() == 1:
        # Errors of the mesh are errors on one device too.
        distribution.device_mesh.backend_mesh
        return
    if not hasattr(distribution, marks.CONTEXT):
        context = context_lib.Context(distribution)
        if context.data_size > 1:
            context.reducer = Reducer(context)
        setattr(distribution, marks.CONTEXT, context)


def distribution_was_set(distribution):
    """To be called with each distribution that was set, and with None."""
    context_lib.set_last(distribution)
    context = context_lib.current()
    # Kept beside the distribution, as `clear_session` drops both.
    global_state.set_global_attribute(REPLICATION, None)
    global_state.set_global_attribute(ENTRY_POINTS, None)
    if context is not None and context.model_mesh is not None:
        global_state.set_global_attribute(
            REPLICATION, sharded.ImplicitReplication()
        )


def parallelize_layer(layer, distribution, layout_map):
    """Gives a layer that was just built the style of its variables."""
    plan = create_tp_plan_from_layout_map(layer, layout_map)
    if plan:
        mesh = getattr(distribution, marks.CONTEXT).mesh
        parallelize_torch_module(layer, mesh, plan)
