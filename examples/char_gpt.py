"""A small GPT that learns the English of Python's own manual, by letters.

One program, the same losses on any number of processes:

    python examples/char_gpt.py --distribution none
    torchrun --nproc-per-node 2 examples/char_gpt.py --distribution data
    torchrun --nproc-per-node 2 examples/char_gpt.py --distribution model
    torchrun --nproc-per-node 4 examples/char_gpt.py --model-axis 2

The text is `pydoc_data.topics`, what `help("if")` prints. It changes with the
version of Python, and the losses with it.
"""

import argparse
import os
from pydoc_data.topics import topics

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
from report import EpochLine
from report import print_once
from report import print_storage

import keras

VOCABULARY = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
SEQUENCE = 64
WIDTH = 64
HEADS = 4
BLOCKS = 2


def make_distribution(name, model_axis=None):
    """Makes the `keras.distribution` object for all devices there are."""
    devices = keras.distribution.list_devices()
    if name == "data":
        return keras.distribution.DataParallel(devices=devices)

    model_axis = model_axis or min(2, len(devices))
    mesh = keras.distribution.DeviceMesh(
        shape=(len(devices) // model_axis, model_axis),
        axis_names=("batch", "model"),
        devices=devices,
    )
    # Megatron's layout: attention is cut by its heads, the feed-forward
    # layers by their hidden units, the vocabulary by its letters.
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map["tokens/embeddings"] = ("model", None)
    layout_map[".*attention/(query|key|value)/kernel"] = (None, "model", None)
    layout_map[".*attention/(query|key|value)/bias"] = ("model", None)
    layout_map[".*attention/attention_output/kernel"] = ("model", None, None)
    layout_map[".*up/kernel"] = (None, "model")
    layout_map[".*up/bias"] = ("model",)
    layout_map[".*down/kernel"] = ("model", None)
    layout_map["logits/kernel"] = (None, "model")
    layout_map["logits/bias"] = ("model",)
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector for each position of the sequence."""

    def build(self, input_shape):
        self.embeddings = self.add_weight(
            shape=input_shape[1:],
            initializer=keras.initializers.RandomNormal(stddev=0.3),
            name="embeddings",
        )

    def call(self, inputs):
        return inputs + self.embeddings


def make_model():
    """(batch, sequence) letters to (batch, sequence, vocabulary) logits."""
    tokens = keras.Input((SEQUENCE,), dtype="int32")
    x = keras.layers.Embedding(
        len(VOCABULARY),
        WIDTH,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=0.3),
        name="tokens",
    )(tokens)
    x = PositionEmbedding(name="positions")(x)
    for i in range(BLOCKS):
        h = keras.layers.LayerNormalization(name=f"block_{i}_norm_1")(x)
        x += keras.layers.MultiHeadAttention(
            HEADS, WIDTH // HEADS, name=f"block_{i}_attention"
        )(h, h, use_causal_mask=True)
        h = keras.layers.LayerNormalization(name=f"block_{i}_norm_2")(x)
        h = keras.layers.Dense(
            4 * WIDTH, activation="gelu", name=f"block_{i}_up"
        )(h)
        x += keras.layers.Dense(WIDTH, name=f"block_{i}_down")(h)
    x = keras.layers.LayerNormalization(name="norm")(x)
    logits = keras.layers.Dense(len(VOCABULARY), name="logits")(x)
    model = keras.Model(tokens, logits, name="char_gpt")
    model.compile(
        # The default epsilon of 1e-7 makes whole steps out of rounding noise
        # where a gradient is zero, as that of a key's bias is.
        optimizer=keras.optimizers.Adam(5e-3, epsilon=1e-5),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def encode(text):
    """Text to an int32 array of letters; others are left out."""
    index = {letter: i for i, letter in enumerate(VOCABULARY)}
    return np.array([index[c] for c in text if c in index], dtype="int32")


def sample_windows(letters, count, rng):
    """Inputs and targets, each (count, SEQUENCE), a letter apart."""
    starts = rng.integers(0, len(letters) - SEQUENCE, count)
    windows = letters[starts[:, None] + np.arange(SEQUENCE + 1)]
    return windows[:, :-1], windows[:, 1:]


def generate(model, prompt, count):
    """Appends the likeliest letter, `count` times. Collective: all call it."""
    for _ in range(count):
        letters = encode(prompt)[-SEQUENCE:]
        padded = np.zeros((1, SEQUENCE), dtype="int32")
        padded[0, : len(letters)] = letters
        logits = model.predict(padded, verbose=0)
        prompt += VOCABULARY[logits[0, len(letters) - 1].argmax()]
    return prompt


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--distribution", choices=("none", "data", "model"), default="model"
    )
    parser.add_argument("--model-axis", type=int)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.distribution != "none":
        keras.distribution.initialize()
        distribution = make_distribution(args.distribution, args.model_axis)
        keras.distribution.set_distribution(distribution)
        print_once(distribution)

    keras.utils.set_random_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    letters = encode("\n".join(topics.values()))
    split = len(letters) * 9 // 10
    x, y = sample_windows(letters[:split], 2000, rng)
    validation_data = sample_windows(letters[split:], 200, rng)
    model = make_model()
    model.fit(
        x,
        y,
        validation_data=validation_data,
        batch_size=args.batch_size,
        epochs=args.epochs,
        verbose=0,
        callbacks=[EpochLine()],
    )

    print_once(f"\n{generate(model, 'The function ', 80)!r}\n")
    print_storage(model)


if __name__ == "__main__":
    main()
