"""The two models of the benchmark: their sizes, batches and layer names.

Nothing here knows how a model is trained. The torch models (`torch_models`)
and the Keras models (`keras_models`) are made from the same sizes and carry
the same layer names, so that one plan shards both.
"""

import dataclasses

# Megatron's cut: the first layer of each pair by its output (column), the
# second by its input (row).
COLUMN = ("l1", "l3", "q", "k", "v", "f1")
ROW = ("l2", "l4", "o", "f2")

# Keras adds epsilon before the correction of the bias, torch after it. At the
# defaults that shows in the losses of the first steps; at this one it does not.
ADAM_EPSILON = 1e-10


@dataclasses.dataclass(frozen=True)
class MLP:
    """Four dense layers, `width -> hidden -> width -> hidden -> output`."""

    batch: int
    width: int
    hidden: int
    output: int
    learning_rate: float = 1e-3


@dataclasses.dataclass(frozen=True)
class GPT:
    """Pre-norm transformer blocks around causal self-attention."""

    batch: int
    length: int
    width: int
    heads: int
    hidden: int
    vocabulary: int
    blocks: int
    learning_rate: float = 1e-4


WORKLOADS = {
    "mlp": MLP(batch=64, width=512, hidden=1024, output=512),
    "gpt": GPT(
        batch=8,
        length=128,
        width=256,
        heads=8,
        hidden=1024,
        vocabulary=8192,
        blocks=4,
    ),
    # So large that the parameters are what a process's memory is made of.
    "big_mlp": MLP(batch=8, width=2048, hidden=8192, output=2048),
    # So small that only Python's overhead is left. For trying things out.
    "tiny_mlp": MLP(batch=8, width=64, hidden=128, output=64),
    "tiny_gpt": GPT(
        batch=4,
        length=16,
        width=32,
        heads=4,
        hidden=64,
        vocabulary=128,
        blocks=2,
    ),
}
