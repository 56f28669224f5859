"""Layers under layouts give what they give on one device.

Forward, gradients and SGD steps, for each kind of layer. Every variable of a
model is sharded, biases and scales too, so that each layer meets sharded
weights, and sharded activations of the layer before.
"""

import functools
import re

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras import ops
from keras.src.activations import ALL_OBJECTS_DICT

ROWS = 7


class Layout:
    """Shards every variable of a model by the same rule.

    Args:
        shape, axes: sizes and names of the mesh axes.
        rule: function of the number of dims of a variable to its axis names.
    """

    def __init__(self, shape, rule, axes=("batch", "model")):
        self.shape, self.axes, self.rule = shape, axes, rule

    def distribution(self, shapes):
        """A `ModelParallel` for variables of these shapes, by path."""
        layouts = {
            re.escape(path): self.rule(len(shape))
            for path, shape in shapes.items()
        }
        return parity.model_parallel(self.shape, layouts, self.axes)


def on_last(axis):
    return lambda dims: (None,) * (dims - 1) + (axis,)


def on_first(axis):
    return lambda dims: (axis,) + (None,) * (dims - 1)


def on_both(first, last):
    """Vectors lie on the last dim's axis."""
    return lambda dims: (
        (first, *(None,) * (dims - 2), last) if dims > 1 else (last,)
    )


TWO = {
    "last": Layout((1, 2), on_last("model")),
    "data": Layout((2, 1), on_first("batch")),
}
# On models of several kinds of layers.
FOUR = {
    "last": Layout((1, 4), on_last("model")),
    "first": Layout((1, 4), on_first("model")),
    "data": Layout((4, 1), on_first("batch")),
    "model-first": Layout(
        (2, 2), on_both("model", "batch"), ("model", "batch")
    ),
    "three-axes": Layout(
        (1, 2, 2), on_both("extra", "model"), ("batch", "model", "extra")
    ),
}


def normal(*shape):
    rng = np.random.default_rng(len(shape) + sum(shape))
    return rng.standard_normal((ROWS, *shape)).astype("float32")


def tokens(length, size):
    rng = np.random.default_rng(length)
    return rng.integers(0, size, (ROWS, length)).astype("int32")


def sequential(x, *stack):
    return keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), *stack])


def dense():
    x = normal(6)
    return x, lambda: sequential(
        x,
        layers.Dense(8, "relu"),
        layers.Dense(6, use_bias=False),
        # Its dims cannot be cut into equal shards.
        layers.Dense(5, "softmax"),
        layers.Dense(4),
    )


def einsum_dots():
    x = normal(3, 6)
    return x, lambda: sequential(
        x,
        layers.EinsumDense("...x,xy->...y", (8,), bias_axes="y"),
        layers.EinsumDense("...x,xy->...y", (4,), activation="softmax"),
    )


def einsum_heads():
    x = normal(3, 4)
    return x, lambda: sequential(
        x,
        layers.EinsumDense("abc,cde->abde", (3, 4, 6), bias_axes="de"),
        layers.Activation("tanh"),
        layers.EinsumDense("abcd,cde->abe", (3, 8), bias_axes="e"),
    )


def einsum_shared():
    """The kernel's first dim is in the input and in the output."""
    x = normal(4, 3)
    return x, lambda: sequential(
        x,
        layers.EinsumDense("abc,bcd->abd", (4, 6), bias_axes="bd"),
        layers.Dense(2),
    )


def embedding():
    x = tokens(5, 8)
    x[0, :2] = -3, -8
    return x, lambda: sequential(x, layers.Embedding(8, 6))


def embedding_then_dense():
    x = tokens(5, 9)
    x[0, 0] = -9
    return x, lambda: sequential(
        x,
        layers.Embedding(9, 6, mask_zero=True),
        layers.Dense(4),
        # Reads the mask.
        layers.GlobalAveragePooling1D(),
    )


def layer_normalization():
    x = normal(3, 8)
    return x, lambda: sequential(
        x,
        layers.LayerNormalization(),
        layers.Dense(8),
        layers.LayerNormalization(axis=(1, 2)),
        layers.LayerNormalization(center=False),
    )


def rms_normalization():
    x = normal(3, 8)
    return x, lambda: sequential(
        x,
        layers.RMSNormalization(),
        layers.Dense(8),
        layers.RMSNormalization(),
    )


def batch_normalization():
    x = normal(3, 6)
    return x, lambda: sequential(
        x,
        layers.BatchNormalization(momentum=0.5),
        layers.Dense(8),
        layers.BatchNormalization(momentum=0.5),
        layers.Reshape((8, 3)),
        layers.BatchNormalization(axis=1, momentum=0.5, scale=False),
    )


def group_normalization():
    x = normal(9, 8)
    return x, lambda: sequential(
        x,
        layers.GroupNormalization(4),
        layers.Dense(8),
        layers.GroupNormalization(2),
        layers.Dense(8, "tanh"),
        # Instance normalization, and layer normalization.
        layers.GroupNormalization(-1, scale=False),
        layers.Dense(8, "tanh"),
        layers.GroupNormalization(1, center=False),
    )


def unit_normalization():
    x = normal(3, 6)
    return x, lambda: sequential(
        x,
        layers.Dense(8),
        layers.UnitNormalization(),
        layers.Dense(6),
        layers.UnitNormalization(axis=1),
    )


OVER_A_DIM = ("log_softmax", "softmax", "sparsemax")
# Keras has no right output shape for `glu`, and `threshold` no defaults.
ELEMENTWISE = sorted({*ALL_OBJECTS_DICT} - {*OVER_A_DIM, "glu", "threshold"})


def activations_of_dense():
    """A branch for each activation, whose kernel's gradient has its name."""
    x = 1.5 * normal(4)

    def make():
        inputs = keras.Input((4,))
        branches = [
            layers.Dense(4, name, name=f"{name}_dense")(inputs)
            for name in ELEMENTWISE
        ]
        return keras.Model(inputs, layers.Concatenate()(branches))

    return x, make


def activations_of_shards():
    """As layers of their own, after a sharded Dense."""
    x = 1.5 * normal(4)

    def make():
        inputs = keras.Input((4,))
        branches = [
            layers.Activation(name)(
                layers.Dense(4, name=f"{name}_dense")(inputs)
            )
            for name in ELEMENTWISE
        ]
        return keras.Model(inputs, layers.Concatenate()(branches))

    return x, make


def activations_over_a_dim():
    x = 2 * normal(3, 4)

    def make():
        inputs = keras.Input((3, 4))
        branches = []
        for name in OVER_A_DIM:
            branches.append(
                layers.Dense(4, name, name=f"{name}_in_dense")(inputs)
            )
            y = layers.Dense(4, name=f"{name}_after_dense")(inputs)
            branches.append(layers.Activation(name)(y))
        y = layers.Dense(4, name="softmax_of_rows")(inputs)
        branches.append(layers.Softmax(axis=1)(y))
        return keras.Model(inputs, layers.Concatenate()(branches))

    return x, make


def activation_layers():
    x = normal(3, 4)
    return x, lambda: sequential(
        x,
        layers.Dense(8),
        layers.PReLU("ones"),
        layers.Dense(8),
        layers.PReLU("ones", shared_axes=[1]),
        layers.LeakyReLU(),
        layers.ELU(),
        layers.Dense(6),
        layers.ReLU(2.0, 0.1, 0.1),
    )


def no_dropout():
    x = normal(3, 6)
    return x, lambda: sequential(
        x,
        layers.Dropout(0.0),
        layers.Dense(8),
        layers.Dropout(0.0),
        layers.SpatialDropout1D(0.0),
        layers.GaussianDropout(0.0),
        layers.Dense(4),
    )


def merges():
    x = normal(3, 4)

    def make():
        inputs = keras.Input((3, 4))

        def merge(name, layer, whole=True):
            # Sharded tensors, and a whole one.
            tensors = [
                layers.Dense(4, name=f"{name}_a")(inputs),
                layers.Dense(4, name=f"{name}_b")(inputs),
            ]
            return layers.Flatten()(layer(tensors + whole * [inputs]))

        merged = [
            merge("add", layers.Add()),
            merge("multiply", layers.Multiply()),
            merge("average", layers.Average()),
            merge("maximum", layers.Maximum()),
            merge("minimum", layers.Minimum()),
            merge("concatenate", layers.Concatenate()),
            merge("concatenate_rows", layers.Concatenate(axis=1)),
            merge("subtract", layers.Subtract(), whole=False),
            merge("dot", layers.Dot(2), whole=False),
            merge("cosine", layers.Dot(1, normalize=True), whole=False),
        ]
        return keras.Model(inputs, layers.Concatenate()(merged))

    return x, make


def shapes():
    x = normal(4, 6)
    return x, lambda: sequential(
        x,
        layers.Dense(8),
        layers.Reshape((4, 2, 4)),
        layers.Dense(4),
        layers.Permute((3, 1, 2)),
        layers.Dense(6),
        layers.Reshape((8, 12)),
        layers.Dense(4),
        layers.Flatten(),
        layers.Dense(6),
        layers.RepeatVector(3),
        layers.Dense(4),
        layers.ZeroPadding1D(1),
        layers.Cropping1D(1),
        layers.UpSampling1D(2),
    )


def self_attention(make_attention, mask=False, **call):
    x = tokens(5, 9)
    x[:, -1] = 0

    def make():
        inputs = keras.Input((5,), dtype="int32")
        h = layers.Embedding(9, 8, mask_zero=mask)(inputs)
        y = make_attention()(h, h, **call)
        return keras.Model(inputs, layers.Dense(3)(y))

    return x, make


def attention():
    return self_attention(lambda: layers.MultiHeadAttention(4, 2))


def causal_attention():
    return self_attention(
        lambda: layers.MultiHeadAttention(2, 4, use_gate=True, dropout=0.0),
        use_causal_mask=True,
    )


def padded_attention():
    return self_attention(lambda: layers.MultiHeadAttention(4, 2), mask=True)


def masked_attention():
    """Another mask for each row and head."""
    x = (normal(5, 8), normal(4, 5, 5) > 0.5)
    x[1][..., 0] = True

    def make():
        inputs = keras.Input((5, 8)), keras.Input((4, 5, 5), dtype="bool")
        attention = layers.MultiHeadAttention(4, 2)
        y = attention(inputs[0], inputs[0], attention_mask=inputs[1])
        return keras.Model(inputs, layers.Dense(3)(y))

    return x, make


def cross_attention():
    """Query, value and key are different."""
    x = (normal(5, 6), normal(3, 4), normal(3, 8))

    def make():
        inputs = [keras.Input(each.shape[1:]) for each in x]
        attention = layers.MultiHeadAttention(4, 2, value_dim=3, output_shape=6)
        return keras.Model(inputs, layers.Dense(4)(attention(*inputs)))

    return x, make


def attention_scores():
    x = normal(5, 6)

    def make():
        inputs = keras.Input((5, 6))
        attention = layers.MultiHeadAttention(4, 2)
        both = attention(inputs, inputs, return_attention_scores=True)
        both = [layers.Flatten()(each) for each in both]
        return keras.Model(inputs, layers.Concatenate()(both))

    return x, make


def grouped_attention():
    """Four query heads share two key and value heads."""
    return self_attention(
        lambda: layers.GroupQueryAttention(3, 4, 2), use_causal_mask=True
    )


def multi_query_attention():
    """Four query heads share one key and value head, which is not cut."""
    return self_attention(
        lambda: layers.GroupQueryAttention(2, 4, 1, use_gate=True), mask=True
    )


def transformer():
    x = tokens(5, 9)

    def make():
        inputs = keras.Input((5,), dtype="int32")
        x = layers.Embedding(9, 8)(inputs)
        h = layers.LayerNormalization()(x)
        h = layers.GroupQueryAttention(2, 4, 2)(h, h, use_causal_mask=True)
        x = layers.Add()([x, h])
        h = layers.RMSNormalization()(x)
        h = layers.Dense(16, "gelu")(h)
        x = layers.Add()([x, layers.Dense(8)(h)])
        return keras.Model(inputs, layers.Dense(9)(x))

    return x, make


def mixture():
    x = normal(4, 6)
    return x, lambda: sequential(
        x,
        layers.Dense(8, use_bias=False),
        layers.BatchNormalization(),
        layers.Activation("softmax"),
        layers.EinsumDense("abc,cde->abde", (4, 4, 6), bias_axes="de"),
        layers.EinsumDense("abcd,cde->abe", (4, 8), bias_axes="e"),
        layers.GroupNormalization(4),
        layers.Reshape((8, 4)),
        layers.PReLU("ones"),
        layers.Flatten(),
        layers.Dense(5),
    )


ATTENTION = [
    attention,
    causal_attention,
    padded_attention,
    masked_attention,
    cross_attention,
    attention_scores,
    grouped_attention,
    multi_query_attention,
]
CASES = [
    dense,
    einsum_dots,
    einsum_heads,
    einsum_shared,
    embedding,
    embedding_then_dense,
    layer_normalization,
    rms_normalization,
    batch_normalization,
    group_normalization,
    unit_normalization,
    activations_of_dense,
    activations_of_shards,
    activations_over_a_dim,
    activation_layers,
    no_dropout,
    merges,
    shapes,
    *ATTENTION,
]
MIXED = [transformer, mixture, attention, grouped_attention]


class Reference:
    """What a case gives on one device."""

    def __init__(self, case):
        self.x, self.make_model = case()
        model = self.make_model()
        rng = np.random.default_rng(1)
        shape = (ROWS, *model.outputs[0].shape[1:])
        self.y = rng.standard_normal(shape).astype("float32")
        self.results = self.train()
        self.shapes = {
            path: value.shape
            for path, value in self.results["weights"].items()
            if value.dtype == "float32"
        }

    def train(self, distribution=None):
        return parity.train(
            self.make_model, self.x, self.y, distribution=distribution
        )


reference = functools.cache(Reference)


def check(case, layout):
    expected = reference(case)
    actual = expected.train(layout.distribution(expected.shapes))
    parity.assert_same(actual, expected.results)


def named(functions):
    return pytest.mark.parametrize(
        "case", functions, ids=[each.__name__ for each in functions]
    )


@pytest.mark.world(2)
@pytest.mark.parametrize("layout", TWO)
@named(CASES)
def test_two_processes(case, layout):
    check(case, TWO[layout])


@pytest.mark.world(4)
@pytest.mark.parametrize("layout", FOUR)
@named(MIXED)
def test_four_processes(case, layout):
    check(case, FOUR[layout])


@pytest.mark.world(2, 4)
@named(ATTENTION)
def test_heads(case, world_size):
    """Heads lie on the model axis, where they can and where they cannot."""
    layouts = {
        ".*(query|key|value|gate)/kernel": (None, "model", None),
        ".*(query|key|value|gate)/bias": ("model", None),
        ".*attention_output/kernel": ("model", None, None),
    }
    expected = reference(case)
    mesh = parity.model_parallel((1, world_size), layouts)
    parity.assert_same(expected.train(mesh), expected.results)


@pytest.mark.world(2, 4)
@pytest.mark.parametrize("axes", [("model", None), (None, "model")], ids=str)
@pytest.mark.parametrize("index", [9, -10])
def test_index_out_of_range_raises_on_all_processes(index, axes, world_size):
    if keras.src.backend.torch.core.DEFAULT_DEVICE == "cuda":
        pytest.skip("an assertion on a GPU ends what a process can do there")
    layouts = {"table/embeddings": axes}
    with parity.model_parallel((1, world_size), layouts).scope():
        layer = layers.Embedding(9, 4, name="table")
        layer(ops.convert_to_tensor([[0, 8, -9]]))
        with pytest.raises(IndexError):
            layer(ops.convert_to_tensor([[0, index]]))


DROPOUTS = [
    lambda **k: layers.Dropout(0.3, **k),
    lambda **k: layers.Dropout(0.3, noise_shape=(None, 1, 8), **k),
    lambda **k: layers.SpatialDropout1D(0.3, **k),
    lambda **k: layers.GaussianDropout(0.3, **k),
    lambda **k: layers.GaussianNoise(0.3, **k),
    lambda **k: layers.AlphaDropout(0.3, **k),
]


@pytest.mark.world(2)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(
    "make_dropout",
    DROPOUTS,
    ids=["rate", "shape", "spatial", "gaussian", "noise", "alpha"],
)
def test_dropout_without_data_shards(make_dropout, seed):
    """The masks of one device, on whole and on sharded activations."""
    x = normal(3, 6)

    def make_model():
        return sequential(
            x,
            layers.Dense(8, name="whole"),
            make_dropout(seed=seed),
            layers.Dense(8, name="column"),
            make_dropout(seed=seed),
            layers.Dense(4, name="row"),
        )

    layouts = {
        "sequential/column/kernel": (None, "model"),
        "sequential/row/kernel": ("model", None),
    }
    parity.assert_parity(
        make_model,
        x,
        normal(3, 4),
        parity.model_parallel((1, 2), layouts),
        steps=3,
    )


@pytest.mark.world(4)
@pytest.mark.parametrize("seed", [None, 3])
def test_dropout_of_data_shards(seed):
    """Each data shard has its own mask, the processes of a shard the same."""
    with parity.model_parallel((2, 2), {".*kernel": (None, "model")}).scope():
        layer = layers.Dropout(0.5, seed=seed)
        for _ in range(2):
            y = layer(ops.ones((4, 16)), training=True)
            y = ops.convert_to_numpy(y)
            assert {*np.unique(y)} == {0.0, 2.0}
            first, second, third, fourth = everyone.gather(y)
            np.testing.assert_array_equal(first, second)
            np.testing.assert_array_equal(third, fourth)
            assert (first != third).any()


@pytest.mark.world(2, 4)
def test_moving_statistics_are_those_of_global_batches():
    """Of uneven batches too: of the last one, some shards have no row."""
    x = np.concatenate([normal(4), 3 * normal(4)[:1] + 1])

    def moving_statistics():
        layer = layers.BatchNormalization(momentum=0.5)
        model = keras.Sequential([keras.Input((4,)), layer])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, x, batch_size=7, epochs=2, shuffle=False, verbose=0)
        return ops.convert_to_numpy(
            ops.stack([layer.moving_mean, layer.moving_variance])
        )

    expected = moving_statistics()
    with keras.distribution.DataParallel().scope():
        actual = moving_statistics()
    parity.assert_same(actual, expected)
    for other in everyone.gather(actual):
        np.testing.assert_array_equal(other, actual)
