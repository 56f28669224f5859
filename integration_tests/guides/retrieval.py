"""Recommenders, and bags of instances."""

import numpy as np

import keras
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from integration_tests.guides.guide import uniform
from keras import layers
from keras import ops


class TwoTowers(keras.Model):
    """Each user's item against all items of the batch."""

    def __init__(self, users, items, width=4):
        super().__init__()
        self.users = layers.Embedding(users, width, name="users")
        self.items = layers.Embedding(items, width, name="items")
        self.users.build(())
        self.items.build(())
        self.loss_function = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="sum"
        )

    def call(self, inputs):
        return {
            "user": self.users(inputs["user"]),
            "item": self.items(inputs["item"]),
        }

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        scores = ops.matmul(y_pred["user"], ops.transpose(y_pred["item"]))
        # An item that is in the batch twice is no wrong answer.
        same = ops.equal(x["item"][:, None], x["item"][None, :])
        same = ops.logical_and(
            same, ops.logical_not(ops.eye(ops.shape(scores)[0], dtype="bool"))
        )
        scores = ops.where(same, -1e3, scores)
        labels = ops.arange(ops.shape(scores)[0])
        return self.loss_function(labels, scores)


@program
def two_towers():
    model = TwoTowers(10, 12)
    model.compile(sgd(0.5))
    x = {"user": integers(10, 11), "item": integers(12, 11, seed=1)}
    history = model.fit(x, batch_size=4, epochs=2, verbose=0)
    found = model.predict(x, batch_size=4, verbose=0)
    return report(history, model, found=found)


class Cross(layers.Layer):
    """Products of the input with a projection of what came."""

    def build(self, first_shape, x_shape):
        width = x_shape[-1]
        self.kernel = self.add_weight(
            shape=(width, width), initializer="glorot_uniform"
        )
        self.bias = self.add_weight(shape=(width,), initializer="zeros")

    def call(self, first, x):
        return first * (ops.matmul(x, self.kernel) + self.bias) + x


@program
def deep_and_cross():
    """A dict of features, some of them categories."""
    inputs = {
        "age": keras.Input((1,), name="age"),
        "income": keras.Input((1,), name="income"),
        "place": keras.Input((), dtype="int32", name="place"),
    }
    place = layers.Embedding(5, 3, name="place_embedding")(inputs["place"])
    first = layers.Concatenate()([inputs["age"], inputs["income"], place])
    crossed = Cross()(first, Cross()(first, first))
    deep = layers.Dense(6, "relu")(first)
    deep = layers.LayerNormalization()(deep)
    merged = layers.Concatenate()([crossed, deep])
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(merged))
    model.compile(sgd(0.1), "binary_crossentropy", metrics=["auc"])
    x = {
        "age": normal(11, 1),
        "income": uniform(11, 1, seed=1),
        "place": integers(5, 11),
    }
    y = integers(2, 11, 1, seed=2).astype("float32")
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, predicted=model.predict(x, batch_size=4, verbose=0)
    )


class Ranking(keras.Model):
    """Cosine similarity with a table of candidates; the best ones in predict.

    The loss compares pairs of rows within the batch.
    """

    def __init__(self, candidates, **kwargs):
        super().__init__(**kwargs)
        self.query = layers.Dense(4, name="query")
        self.table = self.add_weight(
            shape=candidates.shape,
            initializer=keras.initializers.Constant(0.0),
            name="table",
        )
        self.table.assign(candidates)

    def call(self, x):
        query = ops.normalize(self.query(x), axis=-1)
        table = ops.normalize(self.table, axis=-1)
        return ops.matmul(query, ops.transpose(table))

    def predict_step(self, data):
        scores, places = ops.top_k(self(data), 2)
        return {"scores": scores, "places": places}


def pairwise(y, p):
    """Hinge of each pair of rows whose order is known."""
    p = ops.max(p, axis=-1)
    y = ops.reshape(y, (-1,))
    margin = p[:, None] - p[None, :]
    ordered = ops.cast(y[:, None] > y[None, :], "float32")
    lost = ordered * ops.relu(0.5 - margin)
    return ops.sum(lost) / (1.0 + ops.sum(ordered))


@program
def cosine_ranking():
    model = Ranking(normal(6, 4, seed=3))
    model.compile(sgd(0.1), pairwise)
    x, y = normal(11, 5), integers(4, 11, 1).astype("float32")
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, found=model.predict(x, batch_size=4, verbose=0)
    )


class InstanceAttention(layers.Layer):
    """Weights of the instances of a bag, that add up to 1."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, shapes):
        width = shapes[0][-1]
        self.v = self.add_weight(shape=(width, self.width), name="v")
        self.u = self.add_weight(shape=(width, self.width), name="u")
        self.w = self.add_weight(
            shape=(self.width, 1), name="w", regularizer="l2"
        )

    def score(self, x):
        gate = ops.sigmoid(ops.tensordot(x, self.u, axes=1))
        return ops.tensordot(
            ops.tanh(ops.tensordot(x, self.v, axes=1)) * gate, self.w, axes=1
        )

    def call(self, instances):
        scores = [self.score(x) for x in instances]
        weights = ops.softmax(ops.stack(scores), axis=0)
        return [weights[i] for i in range(weights.shape[0])]


@program
def multiple_instances():
    """A list of inputs through shared layers; attention as an output."""
    shared = layers.Dense(6, "relu", name="shared")
    inputs = [keras.Input((4, 2)) for _ in range(3)]
    embedded = [shared(layers.Flatten()(x)) for x in inputs]
    weights = InstanceAttention(5, name="alpha")(embedded)
    weighted = [layers.multiply([w, x]) for w, x in zip(weights, embedded)]
    outputs = layers.Dense(2, "softmax")(layers.concatenate(weighted))
    model = keras.Model(inputs, outputs)
    model.compile(
        sgd(0.2), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    x, y = [normal(11, 4, 2, seed=i) for i in range(3)], integers(2, 11)
    history = model.fit(
        x,
        y,
        class_weight={0: 1.0, 1: 3.0},
        batch_size=4,
        epochs=2,
        shuffle=False,
        verbose=0,
    )
    attention = keras.Model(inputs, model.get_layer("alpha").output)
    seen = attention.predict(x, batch_size=4, verbose=0)
    return report(history, model, seen=np.concatenate(seen, axis=1))
