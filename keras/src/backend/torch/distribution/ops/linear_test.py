import pytest
import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.ops import contraction
from keras.src.backend.torch.distribution.ops import linear
from keras.src.backend.torch.distribution.tensors import collectives

WORLD = 2


@pytest.mark.parametrize(
    "equation, dims",
    [
        ("ab,bc->ac", 1),
        ("xyz,zc->xyc", 1),
        ("xyz,zcd->xycd", 1),
        ("xyab,abc->xyc", 2),
        ("xab,abcd->xcd", 2),
        ("xab,bac->xc", None),
        ("xab,ac->xbc", None),
        ("xab,xbc->xac", None),
        ("ab,bc->ca", None),
        ("ab,cb->ac", None),
    ],
)
def test_products(equation, dims):
    letters = contraction.Contraction(equation)
    assert linear.contracted_dims(letters) == dims


def gradients_twice(function, tensors):
    """What `function` gives, its gradients, and the gradients of these."""
    tensors = [x.double().requires_grad_() for x in tensors]
    y = function(*tensors)
    first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
    # Not of the bias's, which each process has all of.
    penalty = sum(x.square().sum() for x in first[:2])
    second = torch.autograd.grad(penalty, tensors, allow_unused=True)
    return [y, *first, *second]


@pytest.mark.parametrize("rows", [(), (3,), (5, 2), (0, 3)])
@pytest.mark.parametrize("contracted, outputs", [((4,), (3, 2)), ((3, 2), ())])
@pytest.mark.parametrize("has_bias", [True, False])
def test_is_torchs_on_one_process(rows, contracted, outputs, has_bias):
    torch.manual_seed(0)
    tensors = [torch.randn(*rows, *contracted)]
    tensors.append(torch.randn(*contracted, *outputs))
    if has_bias:
        tensors.append(torch.randn(outputs))
    n = len(contracted)

    def in_torch(x, kernel, bias=0.0):
        return torch.tensordot(x, kernel, n) + bias

    def at_once(x, kernel, bias=None):
        return linear.linear(x, kernel, bias, n, ())

    torch.testing.assert_close(
        gradients_twice(at_once, tensors), gradients_twice(in_torch, tensors)
    )


def test_rows_of_a_kernel(on_threads):
    """Each process holds some of what is summed over."""
    torch.manual_seed(0)
    x, kernel, bias = torch.randn(5, 7), torch.randn(7, 3), torch.randn(3)
    expected = gradients_twice(
        lambda x, kernel, bias: x @ kernel + bias, (x, kernel, bias)
    )

    def run(rank):
        start, stop = collectives.shard_range(7, WORLD, rank)

        def at_once(x, kernel, bias):
            return linear.linear(x, kernel, bias, 1, (dist.group.WORLD,))

        ours = x[:, start:stop], kernel[start:stop], bias
        return [x.detach() for x in gradients_twice(at_once, ours)]

    y, *grads = zip(*on_threads(WORLD, run))
    torch.testing.assert_close(y[0], expected[0])
    for parts, whole, dim in zip(grads, expected[1:], (1, 0, None) * 2):
        if dim is None:
            assert torch.equal(*parts)
            torch.testing.assert_close(parts[0], whole)
        else:
            torch.testing.assert_close(torch.cat(parts, dim), whole)


def test_gradient_of_a_gradient_is_summed_whole(on_threads):
    """The kernel's makes a gradient of the input too."""
    torch.manual_seed(0)
    x, kernel = torch.randn(5, 4), torch.randn(4, 7)

    def gradient_of_both(loss_of, x, kernel):
        x, kernel = (each.clone().requires_grad_() for each in (x, kernel))
        loss = loss_of(x, kernel)
        (grad,) = torch.autograd.grad(loss, kernel, create_graph=True)
        return torch.autograd.grad(loss + grad.square().sum(), x)[0]

    def run(rank):
        start, stop = collectives.shard_range(7, WORLD, rank)

        def loss_of(x, kernel):
            column, due = contraction.column_input(
                x, x, (0,), (dist.group.WORLD,)
            )
            y = linear.linear(column, kernel, None, 1, (), due)
            return y.square().sum()

        return gradient_of_both(loss_of, x, kernel[:, start:stop])

    expected = gradient_of_both(
        lambda x, kernel: (x @ kernel).square().sum(), x, kernel
    )
    for grad in on_threads(WORLD, run):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("users", [1, 2])
def test_gradient_of_an_input_is_summed_while_another_is_computed(
    on_threads, monkeypatch, users
):
    """Each process holds some of the outputs; several layers may share x."""
    torch.manual_seed(0)
    x, kernel = torch.randn(5, 4), torch.randn(users, 4, 7)
    sums = []
    all_reduce = dist.all_reduce

    def count(tensor, *args, async_op=False, **kwargs):
        sums.append(async_op)
        return all_reduce(tensor, *args, async_op=async_op, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", count)

    def run(rank):
        start, stop = collectives.shard_range(7, WORLD, rank)
        inputs = x.clone().requires_grad_()
        kernels = kernel[..., start:stop].clone().requires_grad_()
        results = []
        for _ in range(2):
            whole, due = inputs * 1, None
            loss = 0.0
            for i in range(users):
                column, due = contraction.column_input(
                    whole, whole, (0,), (dist.group.WORLD,)
                )
                y = linear.linear(column, kernels[i], None, 1, (), due)
                loss = loss + y.square().sum()
            # The kernels' alone, then all: what has been summed early in one
            # pass is no excuse for the next.
            torch.autograd.grad(loss, kernels, retain_graph=True)
            for _ in range(2):
                results += torch.autograd.grad(
                    loss, (inputs, kernels), retain_graph=True
                )
        return results

    x.requires_grad_()
    kernel.requires_grad_()
    loss = (x @ kernel).square().sum()
    grad_x, grad_kernel = torch.autograd.grad(loss, (x, kernel))
    for rank, results in enumerate(on_threads(WORLD, run)):
        start, stop = collectives.shard_range(7, WORLD, rank)
        for i in range(0, 8, 2):
            torch.testing.assert_close(results[i], grad_x)
            torch.testing.assert_close(
                results[i + 1], grad_kernel[..., start:stop]
            )
    assert all(sums) == (users == 1)
    if users == 2:
        assert not any(sums) and len(sums) == 4 * WORLD
