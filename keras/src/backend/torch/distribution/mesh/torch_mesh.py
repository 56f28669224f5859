"""Keras's `DeviceMesh` as a torch mesh: one for each configuration."""

import math
import weakref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.mesh import meeting
from keras.src.backend.torch.distribution.mesh import process_group

# Configuration -> torch mesh, of the process group `_GROUP[0]` refers to. Every
# torch mesh makes process groups, so equal configurations share one, and all
# are dropped with the process group that they were made in.
_MESHES = {}
_GROUP = [lambda: None]


def to_torch_mesh(device_mesh):
    """The torch mesh of a `keras.distribution.DeviceMesh`.

    Collective on the first call for a configuration (shape, axis names,
    device order, device type, process group): every process calls it.

    Args:
        device_mesh: `keras.distribution.DeviceMesh`, one device for each
            process.

    Returns:
        `torch.distributed.device_mesh.DeviceMesh` with Keras's axis names.

    Raises:
        ValueError: if the mesh does not hold every process exactly once.
    """
    process_group.ensure_running()
    if _GROUP[0]() is not dist.group.WORLD:
        _MESHES.clear()
        _GROUP[0] = weakref.ref(dist.group.WORLD)
        meeting.open_group(process_group.limit)
        process_group.before_leaving(release_groups)
    key = configuration(device_mesh)
    if key not in _MESHES:
        shape, names, ranks, device_type = key
        _MESHES[key] = DeviceMesh(
            device_type,
            torch.tensor(ranks, dtype=torch.int).view(shape),
            mesh_dim_names=names,
        )
        _limit(_MESHES[key])
    return _MESHES[key]


def _limit(mesh):
    for axis in range(mesh.ndim):
        process_group.limit(mesh.get_group(axis))


def joined(mesh, axes):
    """The torch mesh in which several axes of another one are one.

    Collective on the first call for a mesh and axes: every process calls it.

    Args:
        mesh: torch mesh of `to_torch_mesh`.
        axes: tuple of indices of its axes, the one that varies slowest first.

    Returns:
        Torch mesh whose first axis numbers the coordinates on `axes`. What has
        the same ones lies along its second axis, if there is one.

    Raises:
        ValueError: if this order of processes is not that of their ranks.
    """
    key = mesh, axes
    if key not in _MESHES:
        size = math.prod(mesh.size(axis) for axis in axes)
        others = [axis for axis in range(mesh.ndim) if axis not in axes]
        ranks = mesh.mesh.permute(*axes, *others).reshape(size, -1)
        if (ranks.diff(dim=0) < 0).any():
            names = [mesh.mesh_dim_names[axis] for axis in axes]
            raise ValueError(
                f"Rows that are split over the axes {names} would belong to "
                f"the processes {ranks[:, 0].tolist()}, in this order, and "
                "torch numbers them in ascending order. Name the axes in the "
                f"order of the mesh, which is {list(mesh.mesh_dim_names)}, and "
                "give it the devices of `keras.distribution.list_devices()`."
            )
        names = "joined", "others"
        if ranks.shape[1] == 1:
            ranks, names = ranks[:, 0], names[:1]
        _MESHES[key] = DeviceMesh(
            mesh.device_type, ranks.clone(), mesh_dim_names=names
        )
        _limit(_MESHES[key])
    return _MESHES[key]


def release_groups():
    """Drops what the meshes hold of process groups, so that these can end.

    The meshes themselves stay, in variables that the user keeps.
    """
    for mesh in _MESHES.values():
        private.forget_groups(mesh)
    _MESHES.clear()


def configuration(device_mesh):
    """What makes two meshes the same: shape, names, ranks and device type."""
    devices = [str(d) for d in device_mesh.devices.flatten()]
    shape = tuple(int(n) for n in device_mesh.shape)
    world = process_group.num_processes()
    # Too many devices are a mesh that is too large, not unknown devices.
    ranks = ()
    if len(devices) == world:
        types = available_types()
        ranks = tuple(_index(d, world, types) for d in devices)
    if sorted(ranks) != list(range(world)):
        product = " x ".join(
            f"{name} {n}" for name, n in zip(device_mesh.axis_names, shape)
        )
        raise ValueError(
            "A mesh needs one device for each process: "
            f"{product} = {math.prod(shape)}, while the number of processes "
            f"is {world}. Start the script with `torchrun --nproc-per-node "
            f"{math.prod(shape)}`, or change the shape of the mesh. "
            f"Received: devices={devices}"
        )
    types = {device_type_of(d) for d in devices}
    if len(types) > 1:
        raise ValueError(
            "The devices of a mesh must all be of one type. Received: "
            f"devices={devices}"
        )
    ranks = ascending(torch.tensor(ranks).view(shape)).flatten().tolist()
    return shape, tuple(device_mesh.axis_names), tuple(ranks), types.pop()


def ascending(ranks):
    """The ranks of a mesh, in ascending order along each of its axes.

    torch 2.13 numbers the processes of a group by their ranks, and DTensor
    numbers shards by the mesh: in another order shards would be permuted when
    they are gathered. Which process has which shard changes no result.

    Args:
        ranks: tensor of the mesh's shape.

    Returns:
        Tensor of that shape, with the same groups of processes.

    Raises:
        ValueError: if no order of rows and columns is ascending everywhere.
    """
    ordered = ranks
    for axis in range(ranks.ndim):
        line = ordered.movedim(axis, 0).reshape(ranks.shape[axis], -1)[:, 0]
        ordered = ordered.index_select(axis, line.argsort())
    if any((ordered.diff(dim=axis) < 0).any() for axis in range(ranks.ndim)):
        raise ValueError(
            "All rows of a mesh must have their processes in one order, and "
            "all columns too. Received: devices of the processes "
            f"{ranks.tolist()}. Pass `keras.distribution.list_devices()`, or "
            "a permutation of whole rows and columns."
        )
    return ordered


def device_type_of(device):
    """Torch's name (`"cuda"`) for the type of a Keras device (`"gpu:0"`)."""
    name = str(device).lower().partition(":")[0]
    return "cuda" if name == "gpu" else name


def device_index(device):
    """The process that a device such as `"cpu:1"` belongs to.

    Raises:
        ValueError: if there is no such device.
    """
    return _index(device, process_group.num_processes(), available_types())


def _index(device, world, types):
    kind, _, index = str(device).lower().partition(":")
    kind = "cuda" if kind == "gpu" else kind
    index = index or "0"
    if kind not in types or not index.isdigit():
        raise ValueError(
            f"Device not found: {device}. Available types: {types}. "
            f"Received: device_name={device}"
        )
    if int(index) >= world:
        raise ValueError(
            f"Device not found: {device}. There is one device for each "
            f"process, and the number of processes is {world}, so that "
            f"the last one is '{kind.replace('cuda', 'gpu')}:{world - 1}'."
        )
    return int(index)


def available_types():
    """The types of devices here, as torch names them."""
    types = ["cpu"]
    if torch.cuda.is_available():
        types.append("cuda")
    return types
