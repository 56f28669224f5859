import threading
import types

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src.backend.common import global_state
from keras.src.backend.torch.distribution.mesh import context as context_lib
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.distribution import distribution_lib
from keras.src.distribution.distribution_lib import DeviceMesh
from keras.src.distribution.distribution_lib import LayoutMap
from keras.src.distribution.distribution_lib import TensorLayout

DEVICES = [f"cpu:{i}" for i in range(4)]


def placements(axes, shape=(8, 8), names=("batch", "model")):
    mesh = types.SimpleNamespace(mesh_dim_names=names, shape=(2,) * len(names))
    return context_lib.layout_placements(
        TensorLayout(axes), mesh, shape, "dense/kernel"
    )


@pytest.mark.parametrize(
    "axes, expected",
    [
        ((None, None), (Replicate(), Replicate())),
        ((None, "model"), (Replicate(), Shard(1))),
        (("model", None), (Replicate(), Shard(0))),
        (("batch", "model"), (Shard(0), Shard(1))),
        (("model", "batch"), (Shard(1), Shard(0))),
        # Several axes on a dim; in the order of the mesh, or in another.
        ((("batch", "model"), None), (Shard(0), Shard(0))),
        (
            (None, ("model", "batch")),
            cuts.to_placements([(1, 1), (1, 0)], (2, 2)),
        ),
        # Dims that the layout leaves out are not sharded.
        (("model",), (Replicate(), Shard(0))),
        ((), (Replicate(), Replicate())),
    ],
)
def test_layout_placements(axes, expected):
    assert placements(axes) == expected


def test_placements_are_ordered_by_mesh_axis():
    axes = (None, "model")
    assert placements(axes, names=("model", "batch")) == (
        Shard(1),
        Replicate(),
    )
    assert placements(axes, names=("a", "b", "model")) == (
        Replicate(),
        Replicate(),
        Shard(1),
    )


def test_layout_with_more_dims_than_the_tensor():
    with pytest.raises(
        ValueError, match=r"dense/kernel.*more dims.*2 > 1.*shape=\(8,\)"
    ):
        placements((None, "model"), shape=(8,))


def test_layout_with_an_unknown_axis():
    with pytest.raises(
        ValueError, match=r"dense/kernel.*'tensor'.*\['batch', 'model'\]"
    ):
        placements((None, "tensor"))


def test_layout_with_an_axis_twice():
    with pytest.raises(ValueError, match="dense/kernel.*'model' twice"):
        placements(("model", "model"))
    with pytest.raises(ValueError, match="dense/kernel.*'model' twice"):
        placements((("model", "batch", "model"), None))


def test_layout_of_another_mesh(fake_world):
    fake_world(4)
    mesh = DeviceMesh((2, 2), ["batch", "model"], DEVICES)
    equal = DeviceMesh((2, 2), ["batch", "model"], DEVICES)
    other = DeviceMesh((4, 1), ["batch", "model"], DEVICES)
    for layout_mesh in (mesh, equal, None):
        assert context_lib.layout_placements(
            TensorLayout(("model",), layout_mesh),
            mesh.backend_mesh,
            (8,),
            "v",
            mesh,
        ) == (Replicate(), Shard(0))
    with pytest.raises(ValueError, match=r"'v' belongs to another mesh"):
        context_lib.layout_placements(
            TensorLayout(("model",), other), mesh.backend_mesh, (8,), "v", mesh
        )


def model_parallel(shape, names, batch_dim_name):
    mesh = DeviceMesh(shape, names, DEVICES)
    return distribution_lib.ModelParallel(
        layout_map=LayoutMap(mesh), batch_dim_name=batch_dim_name
    )


@pytest.mark.parametrize("rank", range(4))
def test_data_axis_may_come_last(fake_world, rank):
    fake_world(4, rank)
    context = context_lib.Context(model_parallel((2, 2), ["m", "d"], "d"))
    assert (context.data_axes, context.model_axes) == ((1,), [0])
    assert (context.data_size, context.model_size) == (2, 2)
    assert context.data_index == rank % 2
    assert context.model_mesh.mesh_dim_names == ("m",)
    assert context.model_mesh.get_local_rank() == rank // 2
    assert context.reducer is None  # Until the distribution is set.
    assert context.model_placements([Shard(1), Shard(0)]) == (Shard(1),)


@pytest.mark.parametrize("rank", range(4))
def test_several_data_axes(fake_world, rank):
    fake_world(4, rank)
    names = ["d", "m", "e"]
    context = context_lib.Context(model_parallel((2, 1, 2), names, ("d", "e")))
    assert (context.data_axes, context.model_axes) == ((0, 2), [])
    assert (context.data_size, context.data_index) == (4, rank)
    assert context.data_ranks == context.shards == [0, 1, 2, 3]
    assert context.cuts_data([Shard(1), Shard(0), Replicate()]) == (0,)
    # Of size 1 it cuts nothing.
    context = context_lib.Context(model_parallel((2, 2, 1), names, ("d", "e")))
    assert (context.data_axes, context.model_axes) == ((0,), [1])
    assert (context.data_size, context.data_index) == (2, rank // 2)
    assert context.shards == [0, 0, 1, 1]


def test_data_axes_share_the_groups_of_a_mesh(fake_world):
    fake_world(4)
    contexts = [
        context_lib.Context(model_parallel((2, 2), ["d", "e"], ("d", "e")))
        for _ in range(2)
    ]
    assert contexts[0].data_group is contexts[1].data_group
    assert contexts[0].model_mesh is None


def test_data_axes_whose_processes_are_in_another_order(fake_world):
    fake_world(4)
    mesh = DeviceMesh((2, 2), ["d", "e"], [DEVICES[i] for i in (0, 2, 1, 3)])
    distribution = distribution_lib.ModelParallel(
        layout_map=LayoutMap(mesh), batch_dim_name=("d", "e")
    )
    with pytest.raises(ValueError, match=r"\['d', 'e'\].*\[0, 2, 1, 3\]"):
        context_lib.Context(distribution)


def test_model_axes_of_size_1_are_none(fake_world):
    fake_world(4)
    context = context_lib.Context(model_parallel((4, 1), ["d", "m"], "d"))
    assert context.model_axes == []
    assert context.model_mesh is None
    assert context.model_size == 1
    assert not context.is_sharded([Replicate(), Shard(0)])
    assert context.is_sharded([Shard(0), Replicate()])


def test_one_data_shard_reduces_nothing(fake_world):
    fake_world(4)
    context = context_lib.Context(
        model_parallel((1, 2, 2), ["d", "m", "n"], "d")
    )
    assert context.reducer is None
    assert context.data_group is None
    assert (context.model_axes, context.model_size) == ([1, 2], 4)
    assert context.model_mesh.mesh_dim_names == ("m", "n")


def test_shape_may_be_of_numpy_ints(fake_world):
    fake_world(4)
    shape = tuple(np.array([2, 2]))
    context = context_lib.Context(model_parallel(shape, ["d", "m"], "d"))
    assert type(context.data_size) is int


def test_current(fake_world):
    assert context_lib.current() is None
    fake_world(4)
    distribution = model_parallel((2, 2), ["d", "m"], "d")
    with distribution.scope():
        context = context_lib.current()
        assert context.distribution is distribution
    assert context_lib.current() is None
    with distribution.scope():
        assert context_lib.current() is context


def test_current_with_one_process_is_none(fake_world):
    fake_world(1)
    mesh = DeviceMesh((1, 1), ["d", "m"], ["cpu:0"])
    distribution = distribution_lib.ModelParallel(layout_map=LayoutMap(mesh))
    with distribution.scope():
        assert context_lib.current() is None


def seen_in_backward(in_thread):
    """What `current` gives in a backward pass, and outside of it."""
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(context_lib.current()))

    def run():
        (x * 2).sum().backward()
        seen.append(context_lib.current())

    if in_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    return seen


def test_current_in_a_backward_pass_of_another_thread(fake_world):
    fake_world(4)
    assert seen_in_backward(True) == [None, None]
    first = distribution_lib.DataParallel()
    with first.scope():
        context = context_lib.current()
        assert seen_in_backward(False) == [context, context]
        # Only there does autograd run what this thread has set up.
        assert seen_in_backward(True) == [context, None]
        with distribution_lib.DataParallel().scope():
            inner = context_lib.current()
            assert inner is not context
            assert seen_in_backward(True) == [inner, None]
        assert seen_in_backward(True) == [context, None]
    assert seen_in_backward(True) == [None, None]


@pytest.mark.parametrize("in_thread", [False, True])
def test_current_after_the_session_is_cleared(fake_world, in_thread):
    fake_world(4)
    distribution = distribution_lib.DataParallel()
    distribution_lib.set_distribution(distribution)
    global_state.clear_session(free_memory=False)
    assert seen_in_backward(in_thread) == [None, None]
