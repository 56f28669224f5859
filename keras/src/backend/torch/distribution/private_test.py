"""torch has what it has no public name for: see `private`."""

import pathlib
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import init_device_mesh

from keras.src.backend.torch.distribution import private

SOURCES = pathlib.Path(private.__file__).parents[3]


def test_a_name_that_is_gone():
    with pytest.raises(ImportError, match=r"no `torch._C.is_gone`.*torch>=2"):
        private._named("torch._C", "is_gone")
    with pytest.raises(ImportError, match="Install a version of torch"):
        private._named("torch.is_gone", "name")


def test_attributes_of_tensors(fake_world):
    fake_world(2)
    x = torch.ones(2)
    y = x[:1]
    y.add_(1)
    assert x._version == y._version == 1 and y._base is x and y._is_view()
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.register_hook(lambda grad: None)
    assert len(parameter._backward_hooks) == 1
    mesh = init_device_mesh("cpu", (2,))
    z = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    assert z._spec.placements == (Replicate(),) and z._spec.mesh is mesh
    assert z._spec.tensor_meta.shape == (2,)
    assert torch.equal(z._local_tensor, x)
    assert private.group_of(mesh._dim_group_names[0]) is mesh.get_group()
    private.forget_groups(mesh)


def test_backward():
    seen = []
    x = torch.ones(2, requires_grad=True)

    def hook(grad):
        private.at_end_of_backward(lambda: seen.append(x.grad.tolist()))
        seen.append(private.is_in_backward())

    x.register_hook(hook)
    assert not private.is_in_backward()
    (2 * x).sum().backward()
    assert seen == [True, [2.0, 2.0]]


def test_transformations():
    def function(x):
        seen = [private.is_in_transform()]
        with private.outside_of_transforms():
            seen.append(private.is_in_transform())
        assert seen == [True, False]
        return x

    assert not private.is_in_transform()
    torch.vmap(function)(torch.ones(2))


def test_no_other_file_asks_torch_for_private_names():
    modules = r"torch\._(?!_|C\b)|torch\._C\b|torch\.[a-z_.]+\._[a-z]"
    names = r"\b(_pg_registry|_execution_engine|_op_dispatcher|_StridedShard)\b"
    pattern = re.compile(f"{modules}|{names}|distributed_c10d")
    found = [
        f"{path.relative_to(SOURCES)}: {line.strip()}"
        for path in SOURCES.rglob("*.py")
        if not path.name.endswith("_test.py") and path.name != "private.py"
        for line in path.read_text().splitlines()
        if pattern.search(line.partition("#")[0])
    ]
    assert not found
    assert dist.is_available()
