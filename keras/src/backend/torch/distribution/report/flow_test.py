"""Labels go where a cut goes: held to what torch computes of shards."""

import numpy as np
import pytest
import torch

import keras
from keras import layers
from keras import ops
from keras.src.backend.torch.distribution.report import factors
from keras.src.backend.torch.distribution.report import tracing
from keras.src.backend.torch.distribution.report.flow import Flow

A, B = frozenset([("a", 0)]), frozenset([("b", 0)])
NONE = frozenset()


@pytest.mark.parametrize(
    "dims, shape, new, expected, lost",
    [
        ([((4, A),), ()], (4, 6), (24,), [((4, A), (6, NONE))], NONE),
        ([(), ((4, A),)], (6, 4), (24,), [((6, NONE), (4, A))], NONE),
        ([((24, A),)], (24,), (4, 6), [((4, A),), ()], NONE),
        ([((24, A),)], (24,), (3, 8), [(), ()], A),
        ([((6, NONE), (4, A))], (24,), (2, 3, 4), [(), (), ((4, A),)], NONE),
        ([((6, NONE), (4, A))], (24,), (8, 3), [(), ()], A),
        ([((4, A),), ()], (4, 1), (1, 4), [(), ((4, A),)], NONE),
    ],
)
def test_dims_that_are_joined_and_split(dims, shape, new, expected, lost):
    assert factors.regroup(dims, shape, new, 2) == (expected, lost)


def test_dims_beside_each_other():
    joined = ((4, A), (6, NONE))
    assert factors.pairs(joined, (), 24, 2) == (
        [(4, A, NONE), (6, NONE, NONE)],
        NONE,
    )
    assert factors.pairs(joined, joined, 24, 2)[0] == [
        (4, A, A),
        (6, NONE, NONE),
    ]
    found, lost = factors.pairs(((24, A),), ((4, B), (6, NONE)), 24, 2)
    assert found[0] == (4, A, B) and not lost
    found, lost = factors.pairs(((24, A),), ((3, NONE), (8, B)), 24, 2)
    assert lost == A
    assert factors.pairs(((6, A),), ((4, B),), 6, 2)[1] == A | B


def trace(function, *shapes):
    """The `Flow` of a function of weights, and its result."""
    flow = Flow(2)
    weights = [torch.empty(shape, device="meta") for shape in shapes]
    for i, x in enumerate(weights):
        flow.add_weight(i, x)
    with torch.no_grad(), flow:
        return flow, function(*weights)


def kinds(flow):
    return {e["kind"] for e in flow.events}


def test_a_column_and_a_row():
    x = torch.empty(3, 8, device="meta")

    def function(up, bias, down):
        return torch.relu(x @ up + bias) @ down

    flow, out = trace(function, (8, 12), (12,), (12, 8))
    contracts = [e for e in flow.events if e["kind"] == "contract"]
    assert (contracts[1]["labels"], contracts[1]["others"]) == (
        {(0, 1)},
        {(2, 0)},
    )
    assert flow.follows == {(1, 0): {frozenset([(0, 1)])}}
    (column,) = [e for e in flow.events if e["kind"] == "column"]
    assert column["labels"] == {(2, 1)} and column["bytes"] == 3 * 12 * 4
    assert flow.dims(out)[1] == ((8, frozenset([(2, 1)])),)


def test_heads_go_through_attention():
    layer = layers.MultiHeadAttention(4, 6)
    model = keras.Sequential([keras.Input((5, 8))])
    x = keras.Input((5, 8))
    model = keras.Model(x, layer(x, x))
    weights, flow = model.variables, tracing.trace(model, 2, 3)
    index = {
        v.path.split("/")[-2]: i for i, v in enumerate(weights) if v.ndim > 2
    }
    heads = {(index[name], 1) for name in ("query", "key", "value")}
    output = index["attention_output"]
    met = [
        e["labels"]
        for e in flow.events
        if e["kind"] == "contract" and (output, 0) in e["others"]
    ]
    assert met == [heads]
    ended = [e["labels"] for e in flow.events if e["kind"] == "gather"]
    assert not any(labels & heads for labels in ended)


def test_where_labels_end():
    def norm(w):
        return torch.nn.functional.layer_norm(w, (8,))

    flow, out = trace(norm, (4, 8))
    assert flow.events[0]["labels"] == {(0, 1)} and kinds(flow) == {"gather"}
    assert flow.dims(out) == [((4, frozenset([(0, 0)])),), ()]

    def unknown(w):
        return torch.linalg.inv(w)

    flow, out = trace(unknown, (4, 4))
    assert kinds(flow) == {"gather"} and flow.dims(out) in ([(), ()], None)

    def residual(a, b):
        x = torch.empty(3, 4, device="meta")
        return x @ a + x @ b

    flow, out = trace(residual, (4, 8), (4, 8))
    assert flow.dims(out) == [(), ()] and "gather" in kinds(flow)

    def gated(a, b):
        x = torch.empty(3, 4, device="meta")
        return (x @ a) * (x @ b)

    flow, out = trace(gated, (4, 8), (4, 8))
    assert factors.labels_of(flow.dims(out)[1]) == {(0, 1), (1, 1)}
    assert "meet" in kinds(flow) and "gather" not in kinds(flow)


def test_what_is_handed_to_several_is_known():
    x = torch.empty(3, 4, device="meta")

    def function(first, a, b):
        y = x @ first
        return (y @ a) * (y.view(3, 8).clone() @ b)

    flow, _ = trace(function, (4, 8), (8, 6), (8, 6))
    origins = [e["origin"] for e in flow.events if e["kind"] == "column"]
    assert len(origins) == 2 and origins[0] == origins[1]


def test_rules_agree_with_shards():
    """Half of a cut weight gives half of a result, where a label says so."""

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = layers.Embedding(8, 8)
            self.up = layers.Dense(16)
            self.conv = layers.Conv1D(12, 3, padding="same")

        def call(self, x):
            y = self.conv(ops.gelu(self.up(self.table(x))))
            y = ops.reshape(y, (-1, 4, 6, 2))
            return ops.transpose(y, (0, 2, 1, 3))

    model = Net()
    x = np.array([[1, 2, 3, 4], [5, 6, 7, 0]])
    whole = model(x)
    weights, flow = model.variables, tracing.trace(model, 2, 2, x)
    (index,) = [
        i for i, v in enumerate(weights) if v.path.endswith("v1d/kernel")
    ]
    dim, place = 2, None
    for e in flow.events:
        if e["kind"] == "gather" and (index, dim) in e["labels"]:
            place = e
    assert place is not None  # The model's output has it.
    kernel = weights[index]
    changed = ops.convert_to_numpy(kernel).copy()
    changed[..., 6:] = 0
    kernel.assign(changed)
    bias = [v for v in weights if v.path.endswith("v1d/bias")][0]
    assert not np.any(ops.convert_to_numpy(bias))
    halved = ops.convert_to_numpy(model(x))
    same = np.isclose(halved, ops.convert_to_numpy(whole))
    assert same[:, :3].all() and (halved[:, 3:] == 0).all()
