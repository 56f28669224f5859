import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.mesh import gloo_on_gpus


def test_it_gathers_as_torch_does(on_threads):
    def play(rank):
        name = dist.group.WORLD.group_name
        for shape in [(3,), (2, 3), (0, 3)]:
            x = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)) + rank
            x = x.expand(shape).to(torch.bfloat16)
            y = torch.ops._c10d_functional.all_gather_into_tensor(x, 2, name)
            expected = torch.ops._c10d_functional.wait_tensor(y)
            for group in (name, dist.group.WORLD):
                y = gloo_on_gpus.all_gather_into_tensor(x, 2, group)
                assert torch.equal(y, expected) and y.dtype == x.dtype

    on_threads(2, play)


def test_installed_and_taken_back():
    def has_kernel():
        return torch._C._dispatch_has_kernel_for_dispatch_key(
            "_c10d_functional::all_gather_into_tensor", "CUDA"
        )

    assert not has_kernel()
    gloo_on_gpus.install()
    gloo_on_gpus.install()
    try:
        assert has_kernel()
    finally:
        gloo_on_gpus.remove()
    assert not has_kernel()
