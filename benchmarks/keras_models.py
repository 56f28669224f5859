"""The models of `workloads` in Keras, with their weights and layouts."""

import re

import torch_models
import workloads

import keras
from keras import layers
from keras import ops


class SelfAttention(layers.Layer):
    """Dense q, k, v and o around causal `ops.dot_product_attention`."""

    def __init__(self, width, heads, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads
        self.head_width = width // heads
        self.q = layers.Dense(width, name="q")
        self.k = layers.Dense(width, name="k")
        self.v = layers.Dense(width, name="v")
        self.o = layers.Dense(width, name="o")

    def build(self, input_shape):
        for layer in (self.q, self.k, self.v, self.o):
            layer.build(input_shape)

    def call(self, x):
        _, length, width = x.shape
        q, k, v = (
            ops.reshape(layer(x), (-1, length, self.heads, self.head_width))
            for layer in (self.q, self.k, self.v)
        )
        x = ops.dot_product_attention(q, k, v, is_causal=True)
        return self.o(ops.reshape(x, (-1, length, width)))


class Positions(layers.Layer):
    """Adds one learned vector for each position."""

    def build(self, input_shape):
        self.positions = self.add_weight(
            shape=input_shape[1:], initializer="normal", name="positions"
        )

    def call(self, x):
        return x + self.positions


def make_model(sizes, attention="dense"):
    """Builds the Keras model under the distribution that is in scope.

    Args:
        sizes: of `workloads`.
        attention: `"dense"` for `SelfAttention`, `"mha"` for Keras's
            `MultiHeadAttention`.
    """
    if isinstance(sizes, workloads.MLP):
        return make_mlp(sizes)
    return make_gpt(sizes, attention)


def make_mlp(sizes):
    inputs = keras.Input((sizes.width,))
    x = layers.Dense(sizes.hidden, activation="relu", name="l1")(inputs)
    x = layers.Dense(sizes.width, activation="relu", name="l2")(x)
    x = layers.Dense(sizes.hidden, activation="relu", name="l3")(x)
    x = layers.Dense(sizes.output, name="l4")(x)
    return keras.Model(inputs, x)


def make_gpt(sizes, attention):
    # torch's default, which is not Keras's.
    normalization = lambda name: layers.LayerNormalization(
        epsilon=1e-5, name=name
    )
    inputs = keras.Input((sizes.length,), dtype="int32")
    x = layers.Embedding(sizes.vocabulary, sizes.width, name="emb")(inputs)
    x = Positions(name="pos")(x)
    for index in range(sizes.blocks):
        name = f"block{index}"
        residual = x
        x = normalization(f"{name}_ln1")(x)
        if attention == "mha":
            x = layers.MultiHeadAttention(
                sizes.heads, sizes.width // sizes.heads, name=f"{name}_mha"
            )(x, x, use_causal_mask=True)
        else:
            x = SelfAttention(sizes.width, sizes.heads, name=f"{name}_att")(x)
        x = layers.Add()([residual, x])
        residual = x
        x = normalization(f"{name}_ln2")(x)
        x = layers.Dense(sizes.hidden, activation="gelu", name=f"{name}_f1")(x)
        x = layers.Dense(sizes.width, name=f"{name}_f2")(x)
        x = layers.Add()([residual, x])
    x = normalization("lnf")(x)
    x = layers.Dense(sizes.vocabulary, name="head")(x)
    return keras.Model(inputs, x)


def copy_torch_weights(model, sizes):
    """Gives a Keras model the seed-0 weights of the torch model."""
    weights = torch_models.make_model(sizes).state_dict()
    for variable in model.variables:
        value = weights[torch_name(variable.path)]
        if variable.path.endswith("kernel"):
            value = value.T  # torch's weights are (out, in).
        variable.assign(value.reshape(variable.shape).numpy())


def torch_name(path):
    """`"block0_att/q/kernel"` is `"blocks.0.q.weight"` in torch."""
    renames = {
        r"^block(\d+)_": r"blocks.\1.",
        r"(att|mha)/": "",
        "query/": "q/",
        "key/": "k/",
        "value/": "v/",
        "attention_output/": "o/",
        "/(kernel|gamma|embeddings|positions)$": ".weight",
        "/(bias|beta)$": ".bias",
    }
    for pattern, name in renames.items():
        path = re.sub(pattern, name, path)
    return path


def make_layout_map(mesh, sizes, sharded_output=False, attention="dense"):
    """Megatron's cut. Keras's kernels are (in, out).

    Args:
        mesh: `keras.distribution.DeviceMesh` with an axis `"model"`.
        sizes: of `workloads`.
        sharded_output: whether the GPT's logits stay sharded on the
            vocabulary when they leave the model.
        attention: of `make_model`.
    """
    column = "|".join(workloads.COLUMN)
    row = "|".join(workloads.ROW)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[f"(.*[_/])?({column})/kernel"] = (None, "model")
    layouts[f"(.*[_/])?({column})/bias"] = ("model",)
    layouts[f"(.*[_/])?({row})/kernel"] = ("model", None)
    if isinstance(sizes, workloads.MLP):
        return layouts
    layouts["emb/embeddings"] = ("model", None)
    layouts["head/kernel"] = (None, "model")
    layouts["head/bias"] = ("model",)
    if sharded_output:
        layouts[".*head/output"] = (None, None, "model")
    if attention == "mha":
        # (in, head, head's width), and the reverse.
        layouts[".*/(query|key|value)/kernel"] = (None, "model", None)
        layouts[".*/(query|key|value)/bias"] = ("model", None)
        layouts[".*/attention_output/kernel"] = ("model", None, None)
    return layouts


def model_parallel(sizes, **kwargs):
    """ModelParallel over all processes, one data shard.

    Args:
        sizes: of `workloads`.
        **kwargs: of `make_layout_map`.
    """
    keras.distribution.initialize()
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh(
        (1, len(devices)), ["batch", "model"], devices
    )
    return keras.distribution.ModelParallel(
        layout_map=make_layout_map(mesh, sizes, **kwargs),
        batch_dim_name="batch",
    )


def data_parallel():
    keras.distribution.initialize()
    return keras.distribution.DataParallel()


def fully_sharded(sizes=None, shape=None):
    """FSDP: the batch axis cuts each matrix.

    Args:
        sizes: of `workloads`; with it, tensor parallelism too.
        shape: of the mesh, (batch, model). Defaults to one model shard.
    """
    keras.distribution.initialize()
    devices = keras.distribution.list_devices()
    shape = shape or (len(devices), 1)
    mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], devices)
    layouts = keras.distribution.LayoutMap(mesh)
    every = {
        ".*kernel": ("batch", None),
        ".*(embeddings|positions)": ("batch", None),
    }
    if sizes is not None:
        every = {
            f"(.*[_/])?({'|'.join(workloads.COLUMN)}|head)/kernel": (
                "batch",
                "model",
            ),
            f"(.*[_/])?({'|'.join(workloads.COLUMN)}|head)/bias": ("model",),
            f"(.*[_/])?({'|'.join(workloads.ROW)})/kernel": ("model", "batch"),
            ".*embeddings": ("model", "batch"),
        }
        if isinstance(sizes, workloads.MLP):
            every.pop(".*embeddings")
    for path, axes in every.items():
        layouts[path] = axes
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )
