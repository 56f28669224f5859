"""Parallel training as an expert writes it by hand in torch.

Each function makes one `Variant`. All start from the same seed-0 weights and
train on the same global batch.
"""

import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch_models
import workloads
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.distributed.tensor.parallel import RowwiseParallel
from torch.distributed.tensor.parallel import loss_parallel
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from variant import LocalAdam
from variant import TorchStep
from variant import fused_adam


def single(sizes, mesh=None):
    """Plain torch on one process: the base of all ratios."""
    model = torch_models.make_model(sizes)
    return TorchStep(sizes, model, fused_adam(sizes, model.parameters()))


def tensor_parallel(sizes, mesh, local_adam=False):
    """`parallelize_module`, and a loss on sharded logits for the GPT.

    Args:
        sizes: of `workloads`.
        mesh: 1-D torch mesh of all processes.
        local_adam: whether Adam updates local shards rather than DTensors.
    """
    model = torch_models.make_model(sizes)
    plan, context = {}, None
    for path, _ in model.named_modules():
        name = path.split(".")[-1]
        if name in workloads.COLUMN:
            plan[path] = ColwiseParallel()
        if name in workloads.ROW:
            plan[path] = RowwiseParallel()
    if isinstance(sizes, workloads.GPT):
        plan["emb"] = RowwiseParallel(input_layouts=Replicate())
        plan["head"] = ColwiseParallel(use_local_output=False)
        context = loss_parallel
    parallelize_module(model, mesh, plan)
    make_optimizer = LocalAdam if local_adam else MixedAdam
    optimizer = make_optimizer(sizes, list(model.parameters()))
    return TorchStep(sizes, model, optimizer, context=context)


def tensor_parallel_local_adam(sizes, mesh):
    return tensor_parallel(sizes, mesh, local_adam=True)


class MixedAdam:
    """Fused Adam on DTensors, and another on the parameters left plain.

    A fused optimizer takes no mix of the two.
    """

    def __init__(self, sizes, parameters):
        sharded = [p for p in parameters if isinstance(p, DTensor)]
        plain = [p for p in parameters if not isinstance(p, DTensor)]
        self.adams = [fused_adam(sizes, ps) for ps in (sharded, plain) if ps]

    @property
    def state(self):
        return {p: s for adam in self.adams for p, s in adam.state.items()}

    def step(self):
        for adam in self.adams:
            adam.step()


def step_on_local_rows(sizes, model):
    return TorchStep(
        sizes,
        model,
        fused_adam(sizes, model.parameters()),
        batch=local_batch(sizes),
        splits_rows=True,
    )


def distributed_data_parallel(sizes, mesh):
    model = DistributedDataParallel(
        torch_models.make_model(sizes), gradient_as_bucket_view=True
    )
    return step_on_local_rows(sizes, model)


def fully_sharded(sizes, mesh):
    """FSDP2, each transformer block gathered by itself."""
    # It warns of in-place operators on the output, of which there are none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    model = torch_models.make_model(sizes)
    for block in getattr(model, "blocks", []):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return step_on_local_rows(sizes, model)


def fully_sharded_layers(sizes, mesh):
    """FSDP2, each layer gathered by itself, as Keras does."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    model = torch_models.make_model(sizes)
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return step_on_local_rows(sizes, model)


def fully_sharded_two_axes(sizes, mesh):
    """FSDP2 on one axis, `parallelize_module` on the other."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh("cpu", two_axes(), mesh_dim_names=("data", "model"))
    model = torch_models.make_model(sizes)
    plan = {}
    for path, _ in model.named_modules():
        name = path.split(".")[-1]
        if name in workloads.COLUMN:
            plan[path] = ColwiseParallel()
        if name in workloads.ROW:
            plan[path] = RowwiseParallel()
    if isinstance(sizes, workloads.GPT):
        plan["emb"] = RowwiseParallel(input_layouts=Replicate())
        plan["head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh["model"], plan)
    for block in getattr(model, "blocks", []):
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return TorchStep(
        sizes,
        model,
        MixedAdam(sizes, list(model.parameters())),
        batch=local_batch(sizes, mesh["data"].size()),
        splits_rows=True,
    )


def two_axes():
    """The shape of a mesh with two model shards."""
    return dist.get_world_size() // 2, 2


def local_batch(sizes, data_shards=None):
    """This process's rows of the global batch.

    Args:
        sizes: of `workloads`.
        data_shards: into how many the batch is cut; a row of processes has
            the same. Defaults to the number of processes.
    """
    shards = data_shards or dist.get_world_size()
    index = dist.get_rank() * shards // dist.get_world_size()
    return tuple(
        t.chunk(shards)[index].contiguous()
        for t in torch_models.make_batch(sizes)
    )


def raw_tensor_parallel(sizes, mesh):
    """Megatron's collectives inside autograd functions, no DTensor."""
    model = torch_models.make_model(sizes)
    sharded = shard_modules(model)
    if isinstance(sizes, workloads.MLP):
        forward, loss_function = raw_mlp(model), None
    else:
        forward = raw_gpt(model)
        start = dist.get_rank() * model.head.weight.shape[0]
        loss_function = lambda logits, targets: ShardedCrossEntropy.apply(
            logits.flatten(0, 1), targets.flatten(), start
        )
    return RawStep(
        sizes,
        forward,
        fused_adam(sizes, model.parameters()),
        parameters=model.parameters(),
        loss_function=loss_function,
        sharded=sharded,
    )


class RawStep(TorchStep):
    """A step whose sharded parameters are plain local tensors.

    Args:
        sharded: list of the parameters that hold this process's shard only.
    """

    def __init__(self, *args, sharded, **kwargs):
        super().__init__(*args, **kwargs)
        self.sharded = set(sharded)

    def gradient_norm(self):
        squares = torch.zeros(2)
        for p in self.parameters():
            squares[int(p in self.sharded)] += p.grad.square().sum()
        dist.all_reduce(squares[1:])
        return float(squares.sum().sqrt())


def raw_mlp(model):
    def forward(x):
        x = F.relu(model.l2(F.relu(model.l1(x))))
        return model.l4(F.relu(model.l3(EnterColumn.apply(x))))

    return forward


def raw_gpt(model):
    def forward(tokens):
        x = model.emb(tokens) + model.pos(torch.arange(tokens.shape[1]))
        for block in model.blocks:
            x = x + block.o(block.attend(EnterColumn.apply(block.ln1(x))))
            hidden = block.f1(EnterColumn.apply(block.ln2(x)))
            x = x + block.f2(F.gelu(hidden))
        return model.head(EnterColumn.apply(model.lnf(x)))

    return forward


def shard_modules(model):
    """Cuts the weights in place; returns the parameters that were cut."""
    sharded = []

    def cut(module, name, dim):
        piece = getattr(module, name).data.chunk(dist.get_world_size(), dim)
        piece = piece[dist.get_rank()].clone().contiguous()
        setattr(module, name, nn.Parameter(piece))
        sharded.append(getattr(module, name))

    for path, module in model.named_modules():
        name = path.split(".")[-1]
        # torch's weights are (out, in).
        if name in workloads.COLUMN or name == "head":
            cut(module, "weight", 0)
            cut(module, "bias", 0)
        elif name in workloads.ROW:
            cut(module, "weight", 1)
            module.__class__ = RowLinear
        elif name == "emb":
            cut(module, "weight", 0)
            module.__class__ = VocabularyEmbedding
    return sharded


class EnterColumn(torch.autograd.Function):
    """Identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient


class LeaveRow(torch.autograd.Function):
    """All-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class RowLinear(nn.Linear):
    def forward(self, x):
        return LeaveRow.apply(F.linear(x, self.weight)) + self.bias


class VocabularyEmbedding(nn.Embedding):
    def forward(self, tokens):
        rows = self.weight.shape[0]
        tokens = tokens - dist.get_rank() * rows
        outside = (tokens < 0) | (tokens >= rows)
        x = F.embedding(tokens.masked_fill(outside, 0), self.weight)
        return LeaveRow.apply(x.masked_fill(outside[..., None], 0.0))


class ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits that are sharded on the vocabulary.

    Two all-reduces: one number a token for the maximum, two for the sum of
    exponentials and the target's logit.
    """

    @staticmethod
    def forward(ctx, logits, targets, start):
        maximum = logits.amax(1)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        exponentials = (logits - maximum[:, None]).exp_()
        index = targets - start
        inside = (index >= 0) & (index < logits.shape[1])
        index = index.masked_fill(~inside, 0)
        at_target = logits.gather(1, index[:, None])[:, 0]
        sums = torch.stack(
            [exponentials.sum(1), at_target.masked_fill(~inside, 0.0)]
        )
        dist.all_reduce(sums)
        ctx.save_for_backward(exponentials, sums[0], inside, index)
        return (sums[0].log() + maximum - sums[1]).mean()

    @staticmethod
    def backward(ctx, gradient):
        # d loss / d logits = (softmax - one_hot) / tokens
        exponentials, total, inside, index = ctx.saved_tensors
        scale = gradient / total.shape[0]
        exponentials.mul_((scale / total)[:, None])
        rows = torch.arange(total.shape[0])
        exponentials[rows, index] -= inside.to(exponentials.dtype) * scale
        return exponentials, None, None
