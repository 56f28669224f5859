"""A layer that is called at once gives what Keras's way gives."""

import numpy as np
import pytest
import torch

import keras
from keras import layers
from keras import ops
from keras_torch_distribution.src.layers import layer as overlay


@pytest.fixture
def ways(monkeypatch):
    """A list of the names of layers that were called at once."""
    names = []
    released = overlay.Layer._call_at_once

    def call(self, x, kwargs):
        names.append(self.name)
        return released(self, x, kwargs)

    monkeypatch.setattr(overlay.Layer, "_call_at_once", call)
    return names


def both_ways(layer, *args, **kwargs):
    """What a layer returns at once, and by Keras's way."""
    at_once = layer(*args, **kwargs)
    return at_once, overlay.ReleasedLayer.__call__(layer, *args, **kwargs)


class Notes(layers.Layer):
    """Notes what its code is handed."""

    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.seen = inner, []

    def call(self, x, training=False, mask=None, scale=2.0):
        self.seen.append((training, mask, scale, type(x)))
        return x * scale if self.inner is None else self.inner(x)


class NotesNoTraining(layers.Layer):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(x)


def test_layer_is_called_at_once_when_it_is_built(ways):
    layer = layers.Dense(3, name="dense")
    x = torch.randn(2, 5)
    layer(x)
    assert ways == []
    at_once, released = both_ways(layer, x)
    assert ways == ["dense"]
    assert torch.equal(at_once, released)


@pytest.mark.parametrize("training", ["no", None, True, False])
def test_training_is_what_released_keras_says(ways, training):
    inner = Notes(name="inner")
    passed = {} if training == "no" else {"training": training}
    for outer in (Notes(inner), NotesNoTraining(inner)):
        outer(torch.ones(2, 3))
        inner.seen.clear()
        both_ways(outer, torch.ones(2, 3), **passed)
        at_once, released = inner.seen
        assert at_once == released


@pytest.mark.parametrize(
    "layer, x",
    [
        (layers.Embedding(7, 3), torch.tensor([[1, 2], [6, 0]])),
        (layers.Embedding(7, 3, mask_zero=True), torch.tensor([[1, 0]])),
        (layers.Add(), [torch.ones(2, 3), torch.full((2, 3), 2.0)]),
        (layers.Concatenate(), (torch.ones(2, 3), torch.ones(2, 1))),
        (layers.LayerNormalization(), torch.randn(4, 5)),
        (layers.Conv2D(3, 2), torch.randn(2, 4, 4, 3)),
        (layers.Masking(), torch.tensor([[[0.0], [1.0]]])),
        (layers.BatchNormalization(), torch.randn(4, 5)),
        (layers.Dropout(0.5), torch.randn(4, 5)),
        (layers.Dense(2, dtype="float64"), torch.randn(4, 5).double()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_results_and_masks_are_released_keras_s(ways, layer, x):
    layer(x)
    at_once, released = both_ways(layer, x)
    assert ways == [layer.name]
    assert torch.equal(at_once, released)
    masks = [keras.src.backend.get_keras_mask(y) for y in (at_once, released)]
    assert (masks[0] is None) == (masks[1] is None)
    assert masks[0] is None or torch.equal(*masks)


def test_what_call_does_with_a_list_it_does_with_its_own(ways):
    class Eats(layers.Layer):
        def call(self, inputs):
            return inputs.pop() + inputs.pop()

    layer = Eats(name="eats")
    tensors = [torch.ones(2), torch.ones(2)]
    layer(list(tensors))
    layer(tensors)
    assert ways == ["eats"] and len(tensors) == 2


def by_another_policy():
    layer = layers.Dense(2, dtype="mixed_float16")
    return layer, torch.randn(3, 4)


def by_another_dtype():
    return layers.Dense(2), torch.randn(3, 4).double()


def by_an_array():
    return layers.Dense(2), np.ones((3, 4), "float32")


def by_a_regularizer():
    return layers.Dense(2, activity_regularizer="l2"), torch.randn(3, 4)


def by_a_mask():
    x = torch.randn(3, 4, 5)
    keras.src.backend.set_keras_mask(x, torch.ones(3, 4, dtype=torch.bool))
    return layers.Dense(2), x


def by_a_list_with_a_mask():
    x = torch.randn(3, 4)
    keras.src.backend.set_keras_mask(x, torch.ones(3, dtype=torch.bool))
    return layers.Add(), [torch.ones(3, 4), x]


def by_a_context_argument():
    layer = layers.Dense(2)
    layer._register_call_context_args("mode")
    return layer, torch.randn(3, 4)


def by_a_step_of_its_own():
    class Checks(layers.Layer):
        def _assert_input_compatibility(self, x):
            self.asked = True

        def call(self, x):
            return x

    return Checks(), torch.randn(3, 4)


@pytest.mark.parametrize(
    "make",
    [
        by_another_policy,
        by_another_dtype,
        by_an_array,
        by_a_regularizer,
        by_a_mask,
        by_a_list_with_a_mask,
        by_a_context_argument,
        by_a_step_of_its_own,
    ],
)
def test_all_else_goes_keras_s_way(ways, make):
    layer, x = make()
    layer(x)
    layer(x)
    assert ways == []


def test_wrong_shape_is_said_in_keras_s_words(ways):
    layer = layers.Dense(2, name="only")
    layer(torch.ones(3, 4))
    with pytest.raises(ValueError, match="expected axis -1 of input shape"):
        layer(torch.ones(3, 5))
    with pytest.raises(ValueError, match="expected min_ndim=2, found ndim=1"):
        layer(torch.ones(4))
    assert ways == []


def test_error_of_a_layer_says_what_it_was_called_with():
    class Fails(layers.Layer):
        def call(self, x, factor=3):
            if self._called and float(x[0, 0]) == 1:
                raise KeyError("never")
            return x

    layer = Fails()
    layer(torch.zeros(2, 3))
    with pytest.raises(KeyError) as at_once:
        layer(torch.ones(2, 3))
    with pytest.raises(KeyError) as released:
        overlay.ReleasedLayer.__call__(layer, torch.ones(2, 3))
    message = str(at_once.value)
    assert message == str(released.value)
    assert "calling Fails.call()" in message
    assert "x=torch.Tensor(shape=torch.Size([2, 3])" in message
    assert "factor=3" in message


def test_weights_of_a_mixed_model_are_cast_as_its_scope_says(ways):
    model = keras.Sequential(
        [layers.Dense(3, dtype="mixed_bfloat16", name=n) for n in "ab"]
    )
    x = torch.randn(2, 4)
    first = model(x)
    ways.clear()
    assert torch.equal(model(x), first)
    # Within the functional model that it is, whose scope is the outermost.
    assert first.dtype == torch.bfloat16


def test_losses_of_an_outer_call_are_cleared_once():
    class Adds(layers.Layer):
        def call(self, x):
            self.add_loss(ops.sum(x))
            return x

    model = keras.Sequential([Adds(), Adds()])
    for _ in range(3):
        model(torch.ones(2, 3))
        assert len(model.losses) == 2
    layer = Adds()
    for _ in range(3):
        layer(torch.ones(2, 3))
        assert len(layer.losses) == 1
