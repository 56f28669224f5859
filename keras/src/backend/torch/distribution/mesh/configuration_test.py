import numpy as np
import pytest

from keras.src import activations
from keras.src import layers
from keras.src import models
from keras.src import optimizers
from keras.src.backend.torch.distribution.mesh import configuration


def make_model(**dense):
    model = models.Sequential(
        [layers.Input((3,)), layers.Dense(2, name="dense", **dense)], name="m"
    )
    model.compile("sgd", "mse")
    return model


def test_facts_name_what_they_are_of():
    facts = configuration.facts_of_model(make_model(activation="tanh"))
    assert facts["number of variables"] == 2
    assert facts["layer m/dense"] == "Dense"
    assert facts["layer m/dense, activation"] == "tanh"
    assert facts["compile, optimizer"] == "SGD"
    assert facts["compile, loss"] == "mse"


def test_facts_are_those_of_now():
    model = make_model()
    before = configuration.facts_of_model(model)
    assert configuration.facts_of_model(model) == before
    model.optimizer.learning_rate = 0.5
    model.layers[0].activation = activations.relu
    after = configuration.facts_of_model(model)
    assert {name for name in after if after[name] != before.get(name)} == {
        "layer m/dense, activation",
        "compile, optimizer, learning_rate",
    }


def test_what_cannot_say_how_it_is_configured():
    class Silent(layers.Layer):
        def __init__(self, thing):
            super().__init__()
            self.thing = thing

        def call(self, x):
            return x

    class Failing(Silent):
        def get_config(self):
            raise OSError("no such file")

    for kind in (Silent, Failing):
        model = models.Sequential([layers.Input((3,)), kind(object())])
        facts = configuration.facts_of_model(model)
        assert kind.__name__ in facts.values()


@pytest.mark.parametrize(
    "value, expected",
    [
        ({"b": (1, 2.5), "a": None}, {"a": None, "b": [1, 2.5]}),
        ({"x", "y"}, ["'x'", "'y'"]),
        (np.arange(3), [0, 1, 2]),
        (object(), "object"),
        (optimizers.SGD, "type"),
    ],
)
def test_plain(value, expected):
    assert configuration.plain(value) == expected


def test_functions_are_told_apart_by_their_code():
    one, same, other = lambda x: x + 1, lambda x: x + 1, lambda x: x * 2
    assert configuration.plain(one) == configuration.plain(same)
    assert configuration.plain(one) != configuration.plain(other)


def test_what_holds_itself_ends():
    value = []
    value.append(value)
    assert configuration.plain(value)


def test_lambdas_that_keras_writes():
    def facts(function, activation):
        model = models.Sequential(
            [
                layers.Input((3,)),
                layers.Lambda(function, name="own"),
                layers.Dense(2, activation, name="dense"),
            ],
            name="m",
        )
        model.compile("sgd", lambda y, y_pred: y - y_pred)
        return configuration.facts_of_model(model)

    one = facts(lambda x: x + 1, lambda x: x * 2)
    same = facts(lambda x: x + 1, lambda x: x * 2)
    other = facts(lambda x: x * 3, lambda x: x - 2)
    assert "<lambda>, code" in str(one["compile, loss"])
    names = [n for n in one if "own, function" in n or "dense, activ" in n]
    assert len(names) == 2
    for name in names:
        assert one[name] == same[name] != other[name]
