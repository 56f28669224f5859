import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Partial
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded


@pytest.fixture(params=range(2))
def mesh(request, fake_world):
    fake_world(2, rank=request.param)
    return init_device_mesh("cpu", (2,), mesh_dim_names=("model",))


def ours(x, dim, mesh):
    return collectives.shard_of(x, dim, mesh.get_group()).contiguous()


@pytest.mark.parametrize("shape", [(4, 6), (3, 6), (4, 5), (4, 0)])
@pytest.mark.parametrize("dim", [0, 1])
def test_wrap_is_what_from_local_gives(mesh, shape, dim):
    x = torch.randn(shape)
    local = ours(x, dim, mesh)
    actual = sharded.wrap(local, mesh, [Shard(dim)], shape)
    expected = DTensor.from_local(
        local, mesh, [Shard(dim)], shape=x.shape, stride=x.stride()
    )
    assert actual.shape == expected.shape == shape
    assert actual.stride() == expected.stride()
    assert actual.placements == expected.placements
    assert actual.dtype == expected.dtype
    assert actual.device_mesh is expected.device_mesh
    assert sharded.local_of(actual).data_ptr() == local.data_ptr()


@pytest.mark.parametrize("form", ["plain", "replicated", "sharded"])
def test_gradients_enter_in_any_form(mesh, form):
    grad = torch.arange(12.0).reshape(3, 4)
    x = torch.zeros(ours(grad, 1, mesh).shape, requires_grad=True)
    y = sharded.Enter.apply(x, mesh, (Shard(1),), (3, 4))
    arriving = {
        "plain": grad,
        "replicated": sharded.wrap(grad, mesh, [Replicate()], (3, 4)),
        "sharded": sharded.wrap(ours(grad, 1, mesh), mesh, [Shard(1)], (3, 4)),
    }[form]
    # What autograd hands to the border, whatever the layer's code was.
    context = type("Context", (), {})()
    context.mesh, context.placements = mesh, (Shard(1),)
    result = sharded.Enter.backward(context, arriving)[0]
    assert not isinstance(result, DTensor)
    assert torch.equal(result, ours(grad, 1, mesh))
    assert isinstance(y, DTensor) and y.requires_grad


@pytest.mark.parametrize("form", ["plain", "replicated", "sharded"])
def test_gradients_leave_in_any_form(mesh, form):
    grad = torch.arange(12.0).reshape(3, 4)
    context = type("Context", (), {})()
    context.mesh, context.placements = mesh, (Shard(1),)
    context.shape = (3, 4)
    arriving = {
        "plain": ours(grad, 1, mesh),
        "replicated": sharded.wrap(grad, mesh, [Replicate()], (3, 4)),
        "sharded": sharded.wrap(ours(grad, 1, mesh), mesh, [Shard(1)], (3, 4)),
    }[form]
    result = sharded.Leave.backward(context, arriving)
    assert result.placements == (Shard(1),)
    assert result.shape == (3, 4)
    assert torch.equal(sharded.local_of(result), ours(grad, 1, mesh))


def test_enter_and_leave_are_differentiable(mesh):
    x = torch.arange(6.0).reshape(3, 2).requires_grad_()
    y = sharded.Enter.apply(x, mesh, (Shard(0),), (6, 2))
    z = sharded.Leave.apply(torch.square(y))
    assert torch.equal(z, x**2)
    z.sum().backward()
    assert torch.equal(x.grad, 2 * x)
    assert not isinstance(x.grad, DTensor)


def test_what_enters_and_leaves_may_be_written_into(mesh):
    x = torch.ones(2, requires_grad=True)
    y = sharded.Leave.apply(sharded.Enter.apply(x, mesh, (Replicate(),), (2,)))
    y *= 3.0
    y.sum().backward()
    assert torch.equal(x, torch.ones(2))
    assert torch.equal(x.grad, torch.full((2,), 3.0))


def test_is_whole(mesh):
    x = torch.zeros(4)
    assert sharded.is_whole(sharded.wrap(x, mesh, [Replicate()], (4,)))
    assert not sharded.is_whole(sharded.wrap(x, mesh, [Shard(0)], (8,)))
    assert not sharded.is_whole(sharded.wrap(x, mesh, [Partial()], (4,)))


def test_reduced_is_not_partial(mesh):
    x = torch.ones(4)
    y = sharded.reduced(sharded.wrap(x, mesh, [Partial()], (4,)))
    assert y.placements == (Replicate(),)
    z = sharded.wrap(x, mesh, [Shard(0)], (8,))
    assert sharded.reduced(z) is z


def test_whole(mesh):
    for x in (None, 1.0, torch.ones(2)):
        assert sharded.whole(x) is x
    y = sharded.whole(sharded.wrap(torch.ones(4), mesh, [Shard(0)], (7,)))
    assert type(y) is torch.Tensor
    assert y.shape == (7,)


def test_allow_implicit_replication(mesh):
    x = sharded.wrap(torch.ones(2), mesh, [Replicate()], (2,))
    with pytest.raises(RuntimeError, match="mixed"):
        x + torch.ones(2)
    private.allow_implicit_replication(True)
    try:
        assert sharded.local_of(x + torch.ones(2)).tolist() == [2, 2]
    finally:
        private.allow_implicit_replication(False)
    with pytest.raises(RuntimeError, match="mixed"):
        x + torch.ones(2)
