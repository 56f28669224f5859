"""The models of `workloads` in plain torch, for every hand-written peer."""

import torch
import torch.nn.functional as F
import workloads
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import local_map


class MLP(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.l1 = nn.Linear(sizes.width, sizes.hidden)
        self.l2 = nn.Linear(sizes.hidden, sizes.width)
        self.l3 = nn.Linear(sizes.width, sizes.hidden)
        self.l4 = nn.Linear(sizes.hidden, sizes.output)

    def forward(self, x):
        x = F.relu(self.l2(F.relu(self.l1(x))))
        return self.l4(F.relu(self.l3(x)))


class Block(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        width = sizes.width
        self.head_width = width // sizes.heads
        self.ln1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.ln2 = nn.LayerNorm(width)
        self.f1 = nn.Linear(width, sizes.hidden)
        self.f2 = nn.Linear(sizes.hidden, width)

    def attend(self, x):
        """Causal attention over the heads that this process holds."""
        batch, length = x.shape[:2]
        q, k, v = (
            layer(x).view(batch, length, -1, self.head_width).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        x = causal_attention(q, k, v).transpose(1, 2)
        return x.reshape(batch, length, -1)

    def forward(self, x):
        x = x + self.o(self.attend(self.ln1(x)))
        return x + self.f2(F.gelu(self.f1(self.ln2(x))))


class GPT(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.emb = nn.Embedding(sizes.vocabulary, sizes.width)
        self.pos = nn.Embedding(sizes.length, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.blocks))
        self.lnf = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary)

    def forward(self, tokens):
        x = self.emb(tokens) + self.pos(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.lnf(x))


def causal_attention(q, k, v):
    # On CPU, DTensor has no rule for this operator. Heads are independent:
    # each process attends with its own.
    attention = F.scaled_dot_product_attention
    if isinstance(q, DTensor):
        placements = list(q.placements)
        attention = local_map(
            attention,
            in_placements=(placements,) * 3,
            out_placements=placements,
            device_mesh=q.device_mesh,
        )
    return attention(q, k, v, is_causal=True)


def make_model(sizes):
    """The same seed-0 weights on every process and in every variant."""
    torch.manual_seed(0)
    if isinstance(sizes, workloads.MLP):
        return MLP(sizes)
    return GPT(sizes)


def make_batch(sizes):
    """The one global batch that every step of every variant trains on.

    Returns:
        `(x, y)`: float `(batch, width)` and `(batch, output)` for the MLP,
        int64 `(batch, length)` tokens and next tokens for the GPT.
    """
    generator = torch.Generator().manual_seed(1)
    if isinstance(sizes, workloads.MLP):
        x = torch.randn(sizes.batch, sizes.width, generator=generator)
        y = torch.randn(sizes.batch, sizes.output, generator=generator)
        return x, y
    shape = (sizes.batch, sizes.length + 1)
    tokens = torch.randint(0, sizes.vocabulary, shape, generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_function(sizes):
    """The loss of the torch peers and of the bare Keras steps."""
    if isinstance(sizes, workloads.MLP):
        return F.mse_loss
    return cross_entropy


def cross_entropy(logits, targets):
    """Mean over all tokens; `logits` may be sharded on the vocabulary."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))
