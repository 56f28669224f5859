"""Embeddings that are learned by comparing the rows of a batch."""

import torch

import keras
from integration_tests.guides.guide import descend
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import normal
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from keras import layers
from keras import ops

FEATURES, WIDTH = 6, 4


def encoder(name="encoder"):
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(8, "tanh"),
            layers.Dense(WIDTH),
        ],
        name=name,
    )


class SimClr(keras.Model):
    """Two noisy views of each row, against all other rows; and a probe."""

    def __init__(self, temperature=0.5):
        super().__init__()
        self.temperature = temperature
        self.encoder = encoder()
        self.probe = keras.Sequential(
            [keras.Input((WIDTH,)), layers.Dense(3)], name="probe"
        )
        self.seed_generator = keras.random.SeedGenerator(5)
        self.built = True

    def compile(self, contrastive_optimizer, probe_optimizer):
        super().compile()
        self.contrastive_optimizer = contrastive_optimizer
        self.probe_optimizer = probe_optimizer
        self.contrastive_tracker = keras.metrics.Mean(name="c_loss")
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="c_acc")
        self.probe_accuracy = keras.metrics.SparseCategoricalAccuracy("p_acc")

    @property
    def metrics(self):
        return [self.contrastive_tracker, self.accuracy, self.probe_accuracy]

    def view(self, x):
        noise = keras.random.normal(ops.shape(x), seed=self.seed_generator)
        return x + 0.2 * noise

    def contrastive_loss(self, one, other):
        one = ops.normalize(one, axis=1)
        other = ops.normalize(other, axis=1)
        similar = ops.matmul(one, ops.transpose(other)) / self.temperature
        labels = ops.arange(ops.shape(one)[0])
        self.accuracy.update_state(labels, similar)
        self.accuracy.update_state(labels, ops.transpose(similar))
        loss = keras.losses.sparse_categorical_crossentropy
        there = loss(labels, similar, from_logits=True)
        back = loss(labels, ops.transpose(similar), from_logits=True)
        return ops.mean((there + back) / 2)

    def train_step(self, data):
        x, y = data
        one = self.encoder(self.view(x), training=True)
        other = self.encoder(self.view(x), training=True)
        loss = self.contrastive_loss(one, other)
        descend(
            loss, self.encoder.trainable_weights, self.contrastive_optimizer
        )
        self.contrastive_tracker.update_state(loss)
        logits = self.probe(self.encoder(x, training=False).detach())
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
            y, logits
        )
        descend(loss, self.probe.trainable_weights, self.probe_optimizer)
        self.probe_accuracy.update_state(y, logits)
        return {m.name: m.result() for m in self.metrics}


@program
def simclr():
    model = SimClr()
    model.compile(sgd(0.2), sgd(0.2))
    history = model.fit(
        normal(11, FEATURES), integers(3, 11), batch_size=4, verbose=0
    )
    return report(history, model)


class SupervisedContrastive(keras.losses.Loss):
    """Rows of one class attract each other; with a call of its own."""

    def __init__(self, temperature=0.5, name=None):
        super().__init__(name=name)
        self.temperature = temperature

    def __call__(self, labels, features, sample_weight=None):
        features = ops.normalize(features, axis=1)
        logits = ops.matmul(features, ops.transpose(features))
        logits = logits / self.temperature
        labels = ops.reshape(labels, (-1, 1))
        same = ops.cast(ops.equal(labels, ops.transpose(labels)), "float32")
        targets = same / ops.sum(same, axis=1, keepdims=True)
        return ops.mean(
            ops.categorical_crossentropy(targets, logits, from_logits=True)
        )


@program
def supervised_contrastive():
    x, y = normal(11, FEATURES), integers(3, 11)
    model = encoder()
    model.compile(sgd(0.3), SupervisedContrastive())
    pretrained = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    model.trainable = False
    inputs = keras.Input((FEATURES,))
    classifier = keras.Model(
        inputs, layers.Dense(3, "softmax", name="head")(model(inputs))
    )
    classifier.compile(
        sgd(0.3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    history = classifier.fit(x, y, batch_size=5, verbose=0)
    return report(history, classifier, pretrained=pretrained.history)


class NnClr(keras.Model):
    """Positives are neighbours out of a queue of what was seen before."""

    def __init__(self, entries=8):
        super().__init__()
        self.encoder = encoder()
        start = ops.normalize(
            keras.random.normal((entries, WIDTH), seed=2), axis=1
        )
        self.queue = self.add_weight(
            shape=(entries, WIDTH),
            initializer="zeros",
            trainable=False,
            name="queue",
        )
        self.queue.assign(start)
        self.built = True

    def neighbours(self, x):
        similar = ops.matmul(x, ops.transpose(self.queue))
        found = ops.take(self.queue, ops.argmax(similar, axis=1), axis=0)
        return x + ops.stop_gradient(found - x)

    def train_step(self, data):
        x = data
        one = ops.normalize(self.encoder(x + 0.1 * torch.randn(x.shape)))
        other = ops.normalize(self.encoder(x + 0.1 * torch.randn(x.shape)))
        logits = ops.matmul(self.neighbours(one), ops.transpose(other)) * 3.0
        labels = ops.arange(ops.shape(one)[0])
        loss = ops.mean(
            ops.sparse_categorical_crossentropy(
                labels, logits, from_logits=True
            )
        )
        descend(loss, self.encoder.trainable_weights, self.optimizer)
        kept = self.queue.shape[0] - ops.shape(one)[0]
        with torch.no_grad():
            self.queue.assign(ops.concatenate([one, self.queue[:kept]]))
        return {"contrast": loss.detach()}


@program
def nearest_neighbours():
    model = NnClr()
    model.compile(sgd(0.2))
    history = model.fit(normal(11, FEATURES), batch_size=4, verbose=0)
    return report(history, model)


class BarlowLoss(keras.losses.Loss):
    """The correlation of two views, over rows, should be the identity."""

    def call(self, one, other):
        def standardized(x):
            centred = x - ops.mean(x, axis=0)
            return centred / ops.sqrt(ops.var(x, axis=0) + 0.1)

        n = ops.cast(ops.shape(one)[0], "float32")
        one, other = standardized(one), standardized(other)
        correlation = ops.matmul(ops.transpose(one), other) / n
        wanted = ops.eye(WIDTH)
        weights = wanted + 0.05 * (1 - wanted)
        return ops.sum(weights * ops.square(correlation - wanted))


class Barlow(keras.Model):
    def __init__(self):
        super().__init__()
        self.encoder = encoder()
        self.between = BarlowLoss()
        self.built = True

    def train_step(self, data):
        one, other = data
        loss = self.between(self.encoder(one), self.encoder(other))
        descend(loss, self.encoder.trainable_weights, self.optimizer)
        return {"redundancy": loss.detach()}


@program
def barlow_twins():
    model = Barlow()
    model.compile(sgd(0.1))
    x = normal(7, FEATURES)
    other = x + 0.1 * normal(7, FEATURES, seed=1)
    history = model.fit(x, other, batch_size=4, epochs=2, verbose=0)
    return report(history, model)


class Byol(keras.Model):
    """A predictor follows a slow copy of the encoder."""

    def __init__(self):
        super().__init__()
        self.online = encoder("online")
        self.target = encoder("target")
        self.target.set_weights(self.online.get_weights())
        self.target.trainable = False
        self.predictor = layers.Dense(WIDTH, name="predictor")
        self.predictor.build((None, WIDTH))
        self.built = True

    def train_step(self, data):
        one, other = data
        loss = 0.0
        for a, b in ((one, other), (other, one)):
            guess = self.predictor(self.online(a, training=True))
            wanted = self.target(b, training=False).detach()
            similar = torch.nn.functional.cosine_similarity(guess, wanted)
            loss = loss + (2 - 2 * similar).mean()
        descend(loss, self.trainable_weights, self.optimizer)
        with torch.no_grad():
            for slow, fast in zip(self.target.weights, self.online.weights):
                slow.assign_add(0.1 * (fast - slow))
        return {"distance": loss.detach()}


@program
def byol():
    model = Byol()
    model.compile(sgd(0.1))
    x = normal(9, FEATURES)
    other = x + 0.3 * normal(9, FEATURES, seed=1)
    history = model.fit(x, other, batch_size=4, epochs=2, verbose=0)
    return report(history, model)


class MetricLearning(keras.Model):
    """Anchors against positives: a row for each class of a batch."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.loss_function = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True
        )
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.accuracy = keras.metrics.SparseCategoricalAccuracy(name="found")
        self.built = True

    @property
    def metrics(self):
        return [self.loss_tracker, self.accuracy]

    def train_step(self, data):
        x = data[0] if isinstance(data, tuple) else data
        anchors, positives = x[:, 0], x[:, 1]
        self.zero_grad()
        anchors = self.network(anchors, training=True)
        positives = self.network(positives, training=True)
        similar = ops.einsum("ae,pe->ap", anchors, positives) / 0.5
        labels = ops.arange(similar.shape[0])
        loss = self.loss_function(labels, similar)
        loss.backward()
        trained = self.network.trainable_weights
        gradients = [v.value.grad for v in trained]
        with torch.no_grad():
            self.optimizer.apply(gradients, trained)
        self.loss_tracker.update_state(loss)
        self.accuracy.update_state(labels, similar)
        return {m.name: m.result() for m in self.metrics}


@program
def metric_learning():
    inputs = keras.Input((FEATURES,))
    embedded = layers.UnitNormalization()(encoder()(inputs))
    model = MetricLearning(keras.Model(inputs, embedded))
    model.compile(sgd(0.2))
    x = normal(11, 1, FEATURES) + 0.2 * normal(11, 2, FEATURES, seed=1)
    history = model.fit(x, batch_size=5, epochs=2, verbose=0)
    return report(history, model)


@program
def siamese_distance():
    """One tower, called twice; a distance and a loss with a margin."""

    def distance(pair):
        one, other = pair
        squares = ops.sum(ops.square(one - other), axis=1, keepdims=True)
        return ops.sqrt(ops.maximum(squares, 1e-7))

    def margin_loss(margin):
        def loss(y, p):
            near = ops.square(ops.maximum(margin - p, 0))
            return ops.mean((1 - y) * ops.square(p) + y * near)

        return loss

    tower = encoder()
    one, other = keras.Input((FEATURES,)), keras.Input((FEATURES,))
    far = layers.Lambda(distance, output_shape=(1,))([tower(one), tower(other)])
    model = keras.Model([one, other], layers.Dense(1, "sigmoid")(far))
    model.compile(sgd(0.2), margin_loss(1.0), metrics=["accuracy"])
    x = [normal(11, FEATURES), normal(11, FEATURES, seed=1)]
    y = integers(2, 11, 1).astype("float32")
    history = model.fit(
        x, y, validation_data=(x, y), batch_size=4, epochs=2, verbose=0
    )
    predicted = model.predict(x, batch_size=5, verbose=0)
    return report(history, model, predicted=predicted)


class TripletDistances(layers.Layer):
    """Squared distances from an anchor."""

    def call(self, anchor, positive, negative):
        near = ops.sum(ops.square(anchor - positive), -1)
        far = ops.sum(ops.square(anchor - negative), -1)
        return near, far


class Triplets(keras.Model):
    """A network of distances, in a model with steps for them."""

    def __init__(self, network, margin=0.5):
        super().__init__()
        self.network = network
        self.margin = margin
        self.tracker = keras.metrics.Mean(name="loss")
        self.built = True

    @property
    def metrics(self):
        return [self.tracker]

    def of(self, data):
        near, far = self.network(data)
        return ops.mean(ops.maximum(near - far + self.margin, 0.0))

    def train_step(self, data):
        loss = self.of(data)
        descend(loss, self.network.trainable_weights, self.optimizer)
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}

    def test_step(self, data):
        self.tracker.update_state(self.of(data))
        return {"loss": self.tracker.result()}


@program
def triplets():
    tower = encoder()
    inputs = [keras.Input((FEATURES,)) for _ in range(3)]
    distances = TripletDistances()(*[tower(x) for x in inputs])
    model = Triplets(keras.Model(inputs, distances))
    model.compile(sgd(0.1))
    x = tuple(normal(9, FEATURES, seed=seed) for seed in range(3))
    history = model.fit((x,), batch_size=4, epochs=2, verbose=0)
    tested = model.evaluate((x,), batch_size=4, verbose=0)
    return report(history, model, tested=tested)
