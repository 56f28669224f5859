"""The ways to run a layer give the same numbers, and what each communicates.

Layers that the patch knows (Dense, EinsumDense, Embedding) compute on local
shards. Any layer can run on DTensors, and on whole weights.
"""

import numpy as np
import pytest

import keras
from integration_tests.harness import parity
from keras import layers
from keras import ops
from keras.src.backend.torch.distribution.layers import lookup
from keras.src.backend.torch.distribution.layers import plan
from keras.src.backend.torch.distribution.layers import projection
from keras.src.backend.torch.distribution.layers import styles
from keras.src.backend.torch.distribution.report.collectives import (
    CollectiveCounter,
)

ROWS = 7

LAYOUTS = {
    "columns and rows": {
        ".*table/embeddings": ("model", None),
        ".*column/kernel": (None, "model"),
        ".*column/bias": ("model",),
        ".*heads/kernel": (None, "model", None),
        ".*heads/bias": ("model", None),
        ".*merge/kernel": ("model", None, None),
        ".*row/kernel": ("model", None),
        ".*row/bias": ("model",),
    },
    "the other way": {
        ".*table/embeddings": (None, "model"),
        ".*column/kernel": ("model", None),
        ".*heads/kernel": ("model", None, None),
        ".*heads/bias": (None, "model"),
        ".*merge/kernel": (None, None, "model"),
        ".*merge/bias": ("model",),
        ".*row/kernel": (None, "model"),
    },
    "both axes": {
        ".*table/embeddings": ("model", "batch"),
        ".*column/kernel": ("batch", "model"),
        ".*column/bias": ("batch",),
        ".*heads/kernel": ("batch", None, "model"),
        ".*merge/kernel": (None, "model", "batch"),
        ".*row/kernel": ("model", "batch"),
        ".*row/bias": ("batch",),
    },
}


class WholeStyle(styles.ShardedStyle):
    def call(self, layer, context, args, kwargs):
        return self.call_whole(layer, args, kwargs)


def make_model():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 8, name="table")(inputs)
    h = layers.Dense(12, "gelu", name="column")(x)
    x = layers.Add()([x, layers.Dense(8, name="row")(h)])
    h = layers.EinsumDense(
        "abc,cde->abde", (5, 4, 2), bias_axes="de", name="heads"
    )(x)
    x = layers.EinsumDense(
        "abcd,cde->abe", (5, 6), "softmax", bias_axes="e", name="merge"
    )(h)
    return keras.Model(inputs, x)


@pytest.mark.world(2, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["shards", "dtensors", "whole"])
def test_ways_agree(way, layout, world_size, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (ROWS, 5))
    y = rng.standard_normal((ROWS, 5, 6)).astype("float32")
    expected = parity.train(make_model, x, y)
    ran = []
    for module, name in ((projection, "project"), (lookup, "look_up")):
        monkeypatch.setattr(
            module,
            name,
            lambda *args, run=getattr(module, name): (
                ran.append("shards") or run(*args)
            ),
        )
    call_whole = styles.ShardedStyle.call_whole
    monkeypatch.setattr(
        styles.ShardedStyle,
        "call_whole",
        lambda *args: ran.append("whole") or call_whole(*args),
    )
    other = {"dtensors": styles.ShardedStyle, "whole": WholeStyle}
    if way in other:
        monkeypatch.setattr(plan, "style_class", lambda layer: other[way])
    mesh = parity.model_parallel((world_size // 2, 2), LAYOUTS[layout])
    actual = parity.train(make_model, x, y, distribution=mesh)
    parity.assert_same(actual, expected)
    # Nothing has taken another way than it should.
    assert set(ran) == ({way} if way != "dtensors" else set())


class Counted:
    """The collectives of a forward and a backward pass of a model.

    Collective: every process calls it.
    """

    def __init__(self, model, *inputs):
        inputs = [ops.convert_to_tensor(x) for x in inputs]
        # What happens once (checks of the model, first uses) is not counted.
        ops.sum(model(*inputs)).backward()
        model.zero_grad()
        with CollectiveCounter() as forward:
            outputs = model(*inputs)
        with CollectiveCounter() as backward:
            ops.sum(outputs).backward()
        self.forward, self.backward = dict(forward.calls), dict(backward.calls)
        self.forward_bytes = dict(forward.bytes)
        self.backward_bytes = dict(backward.bytes)


def normal(*shape):
    return np.random.default_rng(0).normal(size=(ROWS, *shape)).astype("f")


def scope(shape, **kernels):
    """A scope that shards kernels or embeddings by the names of layers.

    Biases lie as the outputs of their kernel.
    """
    layouts = {}
    for name, axes in kernels.items():
        layouts[f".*{name}/(kernel|embeddings)"] = axes
        if any(axes[1:]):
            # A convolution's has but its channels.
            layouts[f".*{name}/bias"] = axes[1:] if len(axes) < 4 else axes[3:]
    return parity.model_parallel(shape, layouts).scope()


COLUMN, ROW = (None, "model"), ("model", None)


def column_activation_row(first=()):
    return keras.Sequential(
        [
            keras.Input((4,)),
            *first,
            layers.Dense(6, "relu", name="column"),
            layers.Activation("tanh"),
            layers.Dropout(0.1),
            layers.Dense(5, name="row"),
        ]
    )


@pytest.mark.world(2)
def test_column_row_reduces_once_each_way():
    with scope((1, 2), column=COLUMN, row=ROW):
        # Something before it asks for a gradient.
        model = column_activation_row([layers.Dense(4, name="whole")])
        counted = Counted(model, normal(4))
    assert counted.forward == {"all_reduce": 1}
    assert counted.backward == {"all_reduce": 1}
    assert counted.forward_bytes == {"all_reduce": 4 * ROWS * 5}
    assert counted.backward_bytes == {"all_reduce": 4 * ROWS * 4}


@pytest.mark.world(2)
def test_convolutions_reduce_once_each_way():
    """Channels stay cut through what treats each of them by itself."""
    columns, rows = (None, None, None, "model"), (None, None, "model", None)
    with scope((1, 2), column=columns, row=rows):
        model = keras.Sequential(
            [
                keras.Input((6, 5, 3)),
                layers.Conv2D(4, 1, name="whole"),
                layers.Conv2D(8, 3, activation="relu", name="column"),
                layers.MaxPooling2D(2),
                layers.DepthwiseConv2D(1, name="each"),
                layers.Activation("gelu"),
                layers.Conv2D(5, 1, name="row"),
            ]
        )
        counted = Counted(model, normal(6, 5, 3))
    assert counted.forward == {"all_reduce": 1}
    assert counted.forward_bytes == {"all_reduce": 4 * ROWS * 2 * 5}
    # The kernel and the bias of the layer between are whole: each process
    # has the gradient of its channels.
    assert counted.backward.pop("all_reduce") == 1
    assert set(counted.backward) <= {"all_gather"}


@pytest.mark.world(2)
def test_sequence_parallelism_scatters_what_it_sums():
    """What a row layer and a lookup sum is handed on in shards: no more bytes
    than an all-reduce, which is both halves of it (Korthikanti et al., 2022).
    """
    layouts = {
        ".*(tokens|row)/(kernel|embeddings)": ROW,
        ".*column/kernel": COLUMN,
        ".*column/bias": ("model",),
        ".*(tokens|norm|row)/output": ("batch", "model", None),
    }
    with parity.model_parallel((1, 2), layouts).scope():
        model = keras.Sequential(
            [
                keras.Input((6,), dtype="int32"),
                layers.Embedding(8, 4, name="tokens"),
                layers.LayerNormalization(name="norm"),
                layers.Dense(6, "relu", name="column"),
                layers.Dense(5, name="row"),
            ]
        )
        counted = Counted(model, np.arange(ROWS * 6).reshape(ROWS, 6) % 8)
    tokens = ROWS * 6
    # The tokens and the row layer; the column layer.
    assert counted.forward == {"reduce_scatter": 2, "all_gather": 1}
    assert counted.forward_bytes["reduce_scatter"] == 4 * tokens * (4 + 5)
    # Of the two reductions, and what the column layer has gathered, again: it
    # is not kept. As it is half, of the column layer; and the gradients of
    # weights that all shards of the sequence use.
    assert counted.backward["all_gather"] == 3
    assert counted.backward["reduce_scatter"] == 1
    assert counted.backward_bytes["reduce_scatter"] == 4 * tokens * 4
    weights = 4 + 4 + 5  # of the norm, and the bias of the row layer
    assert counted.backward_bytes["all_reduce"] == 4 * weights


@pytest.mark.world(2)
def test_no_gradient_of_inputs_is_reduced_for_nobody():
    with scope((1, 2), column=COLUMN, row=ROW):
        counted = Counted(column_activation_row(), normal(4))
    assert counted.forward == {"all_reduce": 1}
    assert counted.backward == {}


@pytest.mark.world(2)
def test_layers_that_share_an_input_reduce_its_gradient_once():
    with scope((1, 2), query=COLUMN, key=COLUMN, value=COLUMN, row=ROW):
        inputs = keras.Input((4,))
        x = layers.Dense(4, name="whole")(inputs)
        q, k, v = (
            layers.Dense(6, name=name)(x) for name in ("query", "key", "value")
        )
        x = layers.Add()([layers.Multiply()([q, k]), v])
        model = keras.Model(inputs, layers.Dense(5, name="row")(x))
        counted = Counted(model, normal(4))
    assert counted.forward == {"all_reduce": 1}
    assert counted.backward == {"all_reduce": 1}


@pytest.mark.world(2)
@pytest.mark.parametrize("name", ["multi_head", "grouped_query"])
def test_attention_on_heads_reduces_once_each_way(name):
    heads = (None, "model", None)
    with scope(
        (1, 2),
        query=heads,
        key=heads,
        value=heads,
        attention_output=("model", None, None),
    ):
        inputs = keras.Input((5, 8))
        x = layers.Dense(8, name="whole")(inputs)
        if name == "multi_head":
            attention = layers.MultiHeadAttention(4, 2)
        else:
            attention = layers.GroupQueryAttention(2, 4, 2)
        model = keras.Model(inputs, attention(x, x, use_causal_mask=True))
        counted = Counted(model, normal(5, 8))
    assert counted.forward == {"all_reduce": 1}
    assert counted.backward == {"all_reduce": 1}


@pytest.mark.world(2)
def test_vocabulary_shards_reduce_once():
    with scope((1, 2), table=ROW):
        model = keras.Sequential(
            [keras.Input((5,)), layers.Embedding(9, 4, name="table")]
        )
        counted = Counted(model, np.arange(5)[None])
    assert counted.forward == {"all_reduce": 1}
    assert counted.backward == {}


@pytest.mark.world(2)
def test_hidden_shards_of_an_embedding_are_handed_on():
    with scope((1, 2), table=COLUMN, row=ROW):
        model = keras.Sequential(
            [
                keras.Input((5,)),
                layers.Embedding(9, 4, name="table"),
                layers.Dense(3, name="row"),
            ]
        )
        counted = Counted(model, np.arange(5)[None])
    assert counted.forward == {"all_reduce": 1}
    assert counted.backward == {}


@pytest.mark.world(2)
def test_data_shards_of_weights_gather_and_scatter_once_a_use():
    with scope((2, 1), first=("batch", None), second=(None, "batch")):
        first = layers.Dense(4, "tanh", use_bias=False, name="first")
        second = layers.Dense(4, use_bias=False, name="second")
        inputs = keras.Input((4,))
        model = keras.Model(inputs, first(second(first(inputs))))
        counted = Counted(model, normal(4))
    # The first layer is used twice. Small weights that follow are gathered, and
    # gradients reduced, together. (gloo's reduce-scatter is an all-reduce.)
    assert counted.forward == {"all_gather": 2}
    assert counted.forward_bytes == {"all_gather": 3 * 4 * 8}
    # What is used last is kept; what is used first has no gradient of inputs.
    assert counted.backward == {"all_gather": 1, "all_reduce": 1}
    assert counted.backward_bytes == {
        "all_gather": 4 * 8,
        "all_reduce": 3 * 4 * 16,
    }


@pytest.mark.world(4)
def test_both_axes():
    with scope(
        (2, 2),
        whole=("batch", None),
        column=("batch", "model"),
        row=("model", "batch"),
    ):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(4, use_bias=False, name="whole"),
                layers.Dense(6, "relu", use_bias=False, name="column"),
                layers.Dense(4, use_bias=False, name="row"),
            ]
        )
        counted = Counted(model, normal(4))
    # Gathered are shards over the data axis of 8, 6 and 6 numbers, the last two
    # together; activations are summed over the model axis.
    activations = ROWS * 4 * 4
    assert counted.forward == {"all_gather": 2, "all_reduce": 1}
    assert counted.forward_bytes == {
        "all_gather": 4 * (8 + 6 + 6),
        "all_reduce": activations,
    }
    # The last is kept, and the gradients are reduced together.
    assert counted.backward == {"all_gather": 1, "all_reduce": 2}
    assert counted.backward_bytes == {
        "all_gather": 4 * 6,
        "all_reduce": activations + 2 * 4 * (8 + 6 + 6),
    }


@pytest.mark.world(2)
def test_gradients_of_data_shards_are_reduced_together():
    with keras.distribution.DataParallel().scope():
        model = column_activation_row([layers.Dense(4) for _ in range(5)])
        counted = Counted(model, normal(4))
    assert counted.forward == {}
    # All gradients, and a number: whether all have met what was predicted.
    assert counted.backward == {"all_reduce": 1}
    assert counted.backward_bytes == {
        "all_reduce": 4 * (model.count_params() + 1)
    }
