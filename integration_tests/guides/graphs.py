"""Graphs and clouds of points."""

import numpy as np

import keras
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from keras import layers
from keras import ops

NODES = 6


def adjacency(*shape, seed=0):
    """Of graphs without directions; each node is its own neighbour."""
    links = integers(2, *shape, NODES, NODES, seed=seed)
    links = np.maximum(links, np.swapaxes(links, -1, -2))
    return np.maximum(links, np.eye(NODES, dtype="i4")).astype("float32")


class GraphConvolution(layers.Layer):
    """The mean of a node's neighbours, projected."""

    def __init__(self, units, activation=None, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.activation = keras.activations.get(activation)

    def build(self, x_shape, links_shape):
        self.kernel = self.add_weight(
            shape=(x_shape[-1], self.units), name="kernel"
        )

    def call(self, x, links):
        degree = ops.sum(links, axis=-1, keepdims=True)
        mixed = ops.matmul(links / degree, x)
        return self.activation(ops.matmul(mixed, self.kernel))


class NodePool(layers.Layer):
    """Keeps the nodes of the highest scores, as a graph of its own."""

    def __init__(self, keep, **kwargs):
        super().__init__(**kwargs)
        self.keep = keep

    def build(self, x_shape, links_shape):
        self.projection = self.add_weight(
            shape=(x_shape[-1],), name="projection"
        )

    def call(self, x, links):
        norm = ops.sqrt(ops.sum(ops.square(self.projection)))
        scores = ops.einsum("bnf,f->bn", x, self.projection) / norm
        scores, places = ops.top_k(scores, self.keep)
        x = ops.take_along_axis(x, places[..., None], axis=1)
        links = ops.take_along_axis(links, places[:, :, None], axis=1)
        links = ops.take_along_axis(links, places[:, None, :], axis=2)
        return x * ops.tanh(scores)[..., None], links


@program
def graph_pooling():
    """A graph a row; convolution, pooling, and the mean and maximum."""
    x, links = keras.Input((NODES, 4)), keras.Input((NODES, NODES))
    hidden = GraphConvolution(6, "tanh")(x, links)
    pooled, pooled_links = NodePool(3)(hidden, links)
    pooled = GraphConvolution(5, "tanh")(pooled, pooled_links)
    read = layers.Concatenate()(
        [ops.mean(pooled, axis=1), ops.max(pooled, axis=1)]
    )
    model = keras.Model([x, links], layers.Dense(1)(read))
    model.compile(sgd(0.1), "mse", metrics=["mae"])
    data, y = [normal(11, NODES, 4), adjacency(11)], normal(11, 1, seed=2)
    history = model.fit(data, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, predicted=model.predict(data, batch_size=4, verbose=0)
    )


class NodeClassifier(keras.Model):
    """A convolution over the one graph, whose nodes are asked for by number.

    What a batch has are numbers of nodes; the graph is the model's.
    """

    def __init__(self, features, links):
        super().__init__()
        self.features = ops.convert_to_tensor(features)
        self.links = ops.convert_to_tensor(links)
        self.first = GraphConvolution(6, "relu", name="first")
        self.second = GraphConvolution(5, "relu", name="second")
        self.head = layers.Dense(3, name="head")

    def call(self, nodes):
        x = self.first(self.features, self.links)
        x = x + 0.5 * ops.pad(self.second(x, self.links), ((0, 0), (0, 1)))
        return self.head(ops.take(x, nodes, axis=0))


@program
def graph_of_nodes():
    model = NodeClassifier(normal(NODES, 4), adjacency())
    model.compile(
        sgd(0.2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    nodes, y = integers(NODES, 11, seed=3), integers(3, 11)
    history = model.fit(nodes, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history,
        model,
        predicted=model.predict(np.arange(5), batch_size=3, verbose=0),
    )


class GraphAttention(layers.Layer):
    """Sums over edges, each weighed among those that end in one node."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, x_shape, edges_shape):
        self.kernel = self.add_weight(
            shape=(x_shape[-1], self.units), name="kernel"
        )
        self.attention = self.add_weight(
            shape=(self.units * 2, 1), name="attention"
        )

    def call(self, x, edges):
        x = ops.matmul(x, self.kernel)
        ends = ops.take(x, edges, axis=0)
        ends = ops.reshape(ends, (ops.shape(edges)[0], -1))
        scores = ops.leaky_relu(ops.matmul(ends, self.attention))[:, 0]
        scores = ops.exp(ops.clip(scores, -2, 2))
        total = ops.segment_sum(scores, edges[:, 0], num_segments=NODES)
        weights = scores / ops.take(total, edges[:, 0])
        sent = ops.take(x, edges[:, 1], axis=0) * weights[:, None]
        return ops.segment_sum(sent, edges[:, 0], num_segments=NODES)


class AttentiveNodes(keras.Model):
    """Steps that run the whole graph, and then take the batch's nodes."""

    def __init__(self, features, edges):
        super().__init__()
        self.features = ops.convert_to_tensor(features)
        self.edges = ops.convert_to_tensor(edges)
        self.heads = [GraphAttention(4) for _ in range(2)]
        self.head = layers.Dense(3)

    def whole_graph(self):
        x = [ops.elu(head(self.features, self.edges)) for head in self.heads]
        return self.head(ops.concatenate(x, axis=-1))

    def call(self, nodes):
        return ops.take(self.whole_graph(), nodes, axis=0)

    def of(self, nodes, y):
        y_pred = ops.take(self.whole_graph(), nodes, axis=0)
        return y_pred, self.compute_loss(y=y, y_pred=y_pred)

    def train_step(self, data):
        nodes, y = data
        self.zero_grad()
        y_pred, loss = self.of(nodes, y)
        loss.backward()
        gradients = [v.value.grad for v in self.trainable_weights]
        self.optimizer.apply(gradients, self.trainable_weights)
        self._loss_tracker.update_state(loss)
        return self.compute_metrics(nodes, y, y_pred)

    def test_step(self, data):
        nodes, y = data
        y_pred, loss = self.of(nodes, y)
        self._loss_tracker.update_state(loss)
        return self.compute_metrics(nodes, y, y_pred)

    def predict_step(self, data):
        outputs = ops.softmax(self.whole_graph())
        return ops.take(outputs, data, axis=0)


@program
def graph_attention():
    edges = np.argwhere(adjacency() > 0).astype("int32")
    model = AttentiveNodes(normal(NODES, 4), edges)
    model.compile(
        sgd(0.2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    nodes, y = integers(NODES, 9, seed=3), integers(3, 9)
    history = model.fit(nodes, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history,
        model,
        evaluated=model.evaluate(nodes, y, batch_size=4, verbose=0),
        predicted=model.predict(nodes, batch_size=4, verbose=0),
    )


class Orthogonal(keras.regularizers.Regularizer):
    """Of matrices that a layer's outputs are."""

    def __init__(self, side, factor=0.01):
        self.side = side
        self.factor = factor

    def __call__(self, x):
        x = ops.reshape(x, (-1, self.side, self.side))
        product = ops.matmul(x, ops.transpose(x, (0, 2, 1)))
        return ops.sum(self.factor * ops.square(product - ops.eye(self.side)))


def block(x, filters):
    x = layers.Conv1D(filters, 1)(x)
    return layers.Activation("relu")(layers.BatchNormalization()(x))


def transformed(inputs, side):
    """Points times a matrix that is read off from them."""
    x = layers.GlobalMaxPooling1D()(block(inputs, 6))
    x = layers.Dense(
        side * side,
        kernel_initializer="zeros",
        bias_initializer=keras.initializers.Constant(np.eye(side).flatten()),
        activity_regularizer=Orthogonal(side),
    )(x)
    return layers.Dot(axes=(2, 1))([inputs, layers.Reshape((side, side))(x)])


@program
def point_net():
    inputs = keras.Input((9, 3))
    x = block(transformed(inputs, 3), 4)
    x = block(transformed(x, 4), 6)
    x = layers.GlobalMaxPooling1D()(x)
    model = keras.Model(inputs, layers.Dense(3, "softmax")(x))
    model.compile(
        sgd(0.05),
        "sparse_categorical_crossentropy",
        metrics=["sparse_categorical_accuracy"],
    )
    x, y = normal(11, 9, 3), integers(3, 11)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, evaluated=model.evaluate(x, y, batch_size=4, verbose=0)
    )
