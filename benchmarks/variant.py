"""A variant: one way to train one workload."""

import contextlib
import time

import torch
import torch.distributed as dist
import torch_models
import workloads
from torch.distributed.tensor import DTensor


class Variant:
    """One way to train.

    Subclasses define `step`, and `parameters` and `optimizer_tensors` as they
    are stored on this process.

    Args:
        splits_rows: whether each process trains on its own rows only, so that
            the loss of the batch is the mean over the processes.
    """

    def __init__(self, splits_rows=False):
        self.splits_rows = splits_rows

    def step(self):
        """Trains on the global batch once; returns the loss, a tensor."""
        raise NotImplementedError

    def parameters(self):
        raise NotImplementedError

    def optimizer_tensors(self):
        raise NotImplementedError

    def scope(self):
        """The context in which steps run."""
        return contextlib.nullcontext()

    def run(self, steps):
        """Seconds that this process takes for `steps` steps."""
        with self.scope():
            start = time.perf_counter()
            for _ in range(steps):
                self.step()
            return time.perf_counter() - start

    def loss(self):
        """One step; returns the loss of the global batch, a float."""
        with self.scope():
            loss = whole(self.step())
        if self.splits_rows:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return float(loss)

    def gradient_norm(self):
        """L2 norm over the whole gradients of the last step."""
        squares = [
            whole(p.grad).square().sum()
            for p in self.parameters()
            if p.grad is not None
        ]
        return float(sum(squares).sqrt())


class TorchStep(Variant):
    """Forward, backward, update, as one writes it by hand in torch.

    Args:
        sizes: of `workloads`.
        model: maps the input batch to predictions.
        optimizer: has `step` and `state`.
        parameters: list of `nn.Parameter`s. Defaults to the model's own.
        batch: `(x, y)` that this process trains on. Defaults to the global
            batch.
        loss_function: Defaults to the workload's.
        context: makes the context manager around forward and backward.
    """

    def __init__(
        self,
        sizes,
        model,
        optimizer,
        parameters=None,
        batch=None,
        loss_function=None,
        context=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.model = model
        self.optimizer = optimizer
        self._parameters = list(parameters or model.parameters())
        self.x, self.y = batch or torch_models.make_batch(sizes)
        self.loss_function = loss_function or torch_models.loss_function(sizes)
        self.context = context

    def step(self):
        for parameter in self._parameters:
            parameter.grad = None
        if self.context is None:
            loss = self.forward_backward()
        else:
            with self.context():
                loss = self.forward_backward()
        self.optimizer.step()
        return loss.detach()

    def forward_backward(self):
        loss = self.loss_function(self.model(self.x), self.y)
        loss.backward()
        return loss

    def parameters(self):
        return self._parameters

    def optimizer_tensors(self):
        return [
            value
            for slots in self.optimizer.state.values()
            for value in slots.values()
            if isinstance(value, torch.Tensor)
        ]


class LocalAdam:
    """Fused Adam on the local shards of sharded parameters.

    Adam works element by element, so a process updates its shard by itself,
    and DTensor need not dispatch the update of each parameter.
    """

    def __init__(self, sizes, parameters):
        self.parameters = list(parameters)
        self.shards = [
            p.detach().to_local().requires_grad_()
            if isinstance(p, DTensor)
            else p
            for p in self.parameters
        ]
        self.adam = fused_adam(sizes, self.shards)

    @property
    def state(self):
        return self.adam.state

    def step(self):
        for parameter, shard in zip(self.parameters, self.shards):
            if shard is parameter:
                continue
            gradient = parameter.grad
            if gradient.placements != parameter.placements:
                gradient = gradient.redistribute(
                    placements=parameter.placements
                )
            shard.grad = gradient.to_local()
        self.adam.step()
        # Or two steps' gradients would be alive in the next backward.
        for parameter, shard in zip(self.parameters, self.shards):
            if shard is not parameter:
                shard.grad = None


def fused_adam(sizes, parameters):
    return torch.optim.Adam(
        parameters,
        lr=sizes.learning_rate,
        eps=workloads.ADAM_EPSILON,
        fused=True,
    )


def whole(tensor):
    """The global value of a tensor that may be a DTensor, detached.

    Collective for a DTensor: every process of its mesh calls it.
    """
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
