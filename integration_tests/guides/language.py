"""Transformers as their users write them."""

import numpy as np

import keras
from integration_tests.guides.guide import HEADS
from integration_tests.guides.guide import descend
from integration_tests.guides.guide import integers
from integration_tests.guides.guide import program
from integration_tests.guides.guide import report
from integration_tests.guides.guide import sgd
from keras import layers
from keras import ops

WORDS, LENGTH, WIDTH = 12, 6, 8


class Positions(layers.Layer):
    """Embeddings of words and of where they stand."""

    def __init__(self, words, length, width, **kwargs):
        super().__init__(**kwargs)
        self.words = layers.Embedding(words, width, name="words")
        self.places = layers.Embedding(length, width, name="places")

    def call(self, x):
        places = ops.arange(0, ops.shape(x)[-1], 1)
        return self.words(x) + self.places(places)


class Block(layers.Layer):
    """Attention and two dense layers, each with a norm."""

    def __init__(self, heads, width, causal=False, **kwargs):
        super().__init__(**kwargs)
        self.causal = causal
        self.attention = layers.MultiHeadAttention(
            heads, width // heads, name="attention"
        )
        self.feed_forward = keras.Sequential(
            [
                layers.Dense(2 * width, "relu", name="up"),
                layers.Dense(width, name="down"),
            ],
            name="feed_forward",
        )
        self.norm_1 = layers.LayerNormalization(epsilon=1e-6, name="norm_1")
        self.norm_2 = layers.LayerNormalization(epsilon=1e-6, name="norm_2")
        self.dropout = layers.Dropout(0.0)

    def mask(self, n, length):
        """A causal one, for each row."""
        i = ops.arange(length)[:, None]
        j = ops.arange(length)
        mask = ops.cast(i >= j, "bool")
        mask = ops.reshape(mask, [1, length, length])
        return ops.tile(mask, [n, 1, 1])

    def call(self, x, training=None):
        mask = None
        if self.causal:
            mask = self.mask(ops.shape(x)[0], ops.shape(x)[1])
        attended = self.attention(x, x, attention_mask=mask)
        attended = self.dropout(attended, training=training)
        x = self.norm_1(x + attended)
        return self.norm_2(x + self.feed_forward(x))


@program(layouts=HEADS)
def transformer_classifier():
    inputs = keras.Input((LENGTH,))
    x = Positions(WORDS, LENGTH, WIDTH)(inputs)
    x = Block(2, WIDTH)(x)
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dense(6, "relu")(x)
    model = keras.Model(inputs, layers.Dense(2, "softmax")(x))
    model.compile(
        sgd(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    x, y = integers(WORDS, 11, LENGTH), integers(2, 11, seed=1)
    history = model.fit(
        x, y, validation_data=(x[:5], y[:5]), batch_size=4, epochs=2, verbose=0
    )
    return report(history, model)


class Writer(keras.callbacks.Callback):
    """Continues a text after each epoch, by what is likeliest."""

    def __init__(self, start):
        super().__init__()
        self.start = start
        self.written, self.scores = [], []

    def on_epoch_end(self, epoch, logs=None):
        tokens = list(self.start)
        for _ in range(2):
            padded = tokens + [0] * (LENGTH - len(tokens))
            logits, _ = self.model.predict(np.array([padded]), verbose=0)
            last = logits[0, len(tokens) - 1]
            tokens.append(int(np.argmax(last)))
            self.scores.append(last)
        self.written.append(tokens)


@program(layouts=HEADS)
def small_gpt():
    """Two outputs, of which one has a loss; text written by a callback."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = Positions(WORDS, LENGTH, WIDTH)(inputs)
    x = Block(2, WIDTH, causal=True)(x)
    logits = layers.Dense(WORDS, name="logits")(x)
    model = keras.Model(inputs, [logits, x])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(sgd(0.2), loss=[loss, None])
    text = integers(WORDS, 11, LENGTH + 1)
    writer = Writer([3, 1])
    history = model.fit(
        text[:, :-1],
        text[:, 1:],
        batch_size=4,
        epochs=2,
        callbacks=[writer],
        verbose=0,
    )
    return report(history, model, written=writer.written, scores=writer.scores)


class Masked(keras.Model):
    """A loss of those words alone that were masked."""

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        losses = keras.losses.sparse_categorical_crossentropy(y, y_pred)
        losses = losses * sample_weight
        return ops.sum(losses) / ops.maximum(ops.sum(sample_weight), 1.0)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        right = ops.equal(ops.argmax(y_pred, -1), ops.cast(y, "int64"))
        right = ops.cast(right, "float32") * sample_weight
        logs["recovered"] = ops.sum(right) / ops.sum(sample_weight)
        logs["masked"] = ops.sum(sample_weight)
        return logs


@program(layouts=HEADS)
def masked_language_model():
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = Positions(WORDS + 1, LENGTH, WIDTH)(inputs)
    x = Block(2, WIDTH)(x)
    model = Masked(inputs, layers.Dense(WORDS, "softmax", name="head")(x))
    model.compile(sgd(0.3), metrics=["sparse_categorical_accuracy"])
    y = integers(WORDS, 9, LENGTH)
    masked = integers(10, 9, LENGTH, seed=1) < 3
    masked[:, 0] = True
    x = np.where(masked, WORDS, y)
    history = model.fit(
        x,
        y,
        sample_weight=masked.astype("float32"),
        batch_size=4,
        epochs=2,
        verbose=0,
    )
    return report(history, model)


class Router(layers.Layer):
    """Sends tokens to experts, up to what each takes, and balances them."""

    def __init__(self, experts, capacity, **kwargs):
        super().__init__(**kwargs)
        self.experts = experts
        self.capacity = capacity
        self.route = layers.Dense(experts, name="route")

    def call(self, tokens):
        chances = ops.softmax(self.route(tokens), axis=-1)
        gate = ops.max(chances, axis=-1)
        taken = ops.one_hot(ops.argmax(chances, axis=-1), self.experts)
        density = ops.mean(taken, axis=0)
        share = ops.mean(chances, axis=0)
        self.add_loss(0.1 * self.experts * ops.sum(density * share))
        place = ops.cumsum(taken, axis=0) * taken
        fits = ops.cast(place <= self.capacity, "float32") * taken
        gate = gate * ops.sum(fits, axis=-1)
        slot = ops.cast(ops.sum(place * fits, axis=-1), "int32")
        slots = ops.one_hot(slot, self.capacity + 1)[:, 1:]
        dispatch = fits[:, :, None] * slots[:, None, :]
        return dispatch, dispatch * gate[:, None, None]


class Switch(layers.Layer):
    """Experts, each of which sees the tokens that were sent to it."""

    def __init__(self, experts, width, capacity, **kwargs):
        super().__init__(**kwargs)
        self.router = Router(experts, capacity, name="router")
        self.experts = [
            keras.Sequential(
                [layers.Dense(6, "relu"), layers.Dense(width)],
                name=f"expert_{i}",
            )
            for i in range(experts)
        ]

    def call(self, x):
        tokens = ops.reshape(x, (-1, x.shape[-1]))
        dispatch, combine = self.router(tokens)
        sent = ops.einsum("td,tec->ecd", tokens, dispatch)
        done = [expert(sent[i]) for i, expert in enumerate(self.experts)]
        back = ops.einsum("ecd,tec->td", ops.stack(done), combine)
        return ops.reshape(back, ops.shape(x))


@program
def switch_transformer():
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = Positions(WORDS, LENGTH, WIDTH)(inputs)
    x = layers.LayerNormalization()(x + Switch(3, WIDTH, 10)(x))
    x = layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, layers.Dense(2, "softmax")(x))
    model.compile(
        sgd(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    x, y = integers(WORDS, 11, LENGTH), integers(2, 11, seed=1)
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(
        history, model, evaluated=model.evaluate(x, y, batch_size=4, verbose=0)
    )


@program
def soft_experts():
    """A few experts for each row, and a penalty of uneven importance."""

    class Experts(layers.Layer):
        def __init__(self, units, experts, **kwargs):
            super().__init__(**kwargs)
            self.units = units
            self.experts = experts

        def build(self, shape):
            self.kernel = self.add_weight(
                shape=(self.experts, shape[-1], self.units), name="kernel"
            )
            self.gate = self.add_weight(
                shape=(shape[-1], self.experts), name="gate"
            )

        def call(self, x):
            scores = ops.matmul(x, self.gate)
            best, places = ops.top_k(scores, 2)
            gates = ops.sum(
                ops.one_hot(places, self.experts)
                * ops.softmax(best)[..., None],
                axis=1,
            )
            importance = ops.sum(gates, axis=0)
            variation = ops.var(importance) / ops.square(ops.mean(importance))
            self.add_loss(0.05 * variation)
            outputs = ops.einsum("bi,eio->beo", x, self.kernel)
            return ops.einsum("be,beo->bo", gates, ops.tanh(outputs))

    inputs = keras.Input((5,))
    model = keras.Model(inputs, layers.Dense(1)(Experts(6, 4)(inputs)))
    model.compile(sgd(0.1), "mse")
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(11, 5)), draw.normal(size=(11, 1))
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    return report(history, model)


@program
def memory_network():
    """Stories, questions, and a softmax over what is remembered."""
    story = keras.Input((LENGTH,), dtype="int32", name="story")
    question = keras.Input((3,), dtype="int32", name="question")
    memory = layers.Embedding(WORDS, 6, name="memory")(story)
    answers = layers.Embedding(WORDS, 3, name="answers")(story)
    asked = layers.Embedding(WORDS, 6, name="asked")(question)
    match = layers.Activation("softmax")(
        layers.Dot(axes=(2, 2))([memory, asked])
    )
    response = layers.Permute((2, 1))(layers.add([match, answers]))
    read = layers.LSTM(5)(layers.concatenate([response, asked]))
    model = keras.Model([story, question], layers.Dense(WORDS, "softmax")(read))
    model.compile(
        sgd(0.3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    x = [integers(WORDS, 11, LENGTH), integers(WORDS, 11, 3, seed=1)]
    history = model.fit(
        x, integers(WORDS, 11, seed=2), batch_size=5, epochs=2, verbose=0
    )
    return report(history, model)


class Denoiser(keras.Model):
    """A step that masks by itself, each time otherwise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seeds = keras.random.SeedGenerator(2)

    def train_step(self, text):
        drawn = keras.random.uniform(ops.shape(text), seed=self.seeds)
        masked = drawn < 0.4
        seen = ops.where(masked, WORDS, text)
        logits = self(seen, training=True)
        losses = ops.sparse_categorical_crossentropy(
            text, logits, from_logits=True
        )
        chosen = losses[masked]
        loss = ops.sum(chosen) / max(len(chosen), 1)
        descend(loss, self.trainable_weights, self.optimizer)
        return {"loss": loss.detach(), "masked": ops.sum(masked)}


@program(layouts=HEADS)
def masked_in_the_step():
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = Block(2, WIDTH)(Positions(WORDS + 1, LENGTH, WIDTH)(inputs))
    model = Denoiser(inputs, layers.Dense(WORDS)(x))
    model.compile(sgd(0.2))
    history = model.fit(
        integers(WORDS, 7, LENGTH), batch_size=4, epochs=2, verbose=0
    )
    return report(history, model)
