"""Models and layouts whose report is held to what real processes do.

    python -m integration_tests.report.programs 4

prints, in one process that plays the first of four, what is predicted.
"""

import json
import sys

import numpy as np

import keras
from integration_tests.harness import parity
from keras import layers
from keras import ops

ROWS, LENGTH, VOCABULARY, WIDTH = 10, 6, 24, 16
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

TENSOR = {
    "tokens/embeddings": ("model", None),
    ".*(query|key|value)/kernel": (None, "model", None),
    ".*(query|key|value)/bias": ("model", None),
    ".*attention_output/kernel": ("model", None, None),
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*down/kernel": ("model", None),
    "head/kernel": (None, "model"),
    "head/bias": ("model",),
}
FULLY_SHARDED = {
    "tokens/embeddings": ("batch", None),
    ".*(query|key|value)/kernel": ("batch", None, None),
    ".*attention_output/kernel": (None, None, "batch"),
    ".*(up|down|head)/kernel": ("batch", None),
    ".*up/bias": ("batch",),
}
BOTH = {
    "tokens/embeddings": ("model", "batch"),
    ".*(query|key|value)/kernel": ("batch", "model", None),
    ".*attention_output/kernel": ("model", None, "batch"),
    ".*up/kernel": ("batch", "model"),
    ".*down/kernel": ("model", "batch"),
    "head/kernel": ("batch", "model"),
}
SEQUENCE = {
    **TENSOR,
    ".*(norm|down|tokens|add|attention_output)/output": (
        "batch",
        "model",
        None,
    ),
}
CONVOLUTIONS = {
    ".*conv_a/kernel": (None, None, None, "model"),
    ".*conv_b/kernel": (None, None, "model", "batch"),
    ".*out/kernel": ("batch", "model"),
}


def gpt(optimizer="sgd"):
    x = inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH, name="tokens")(x)
    for i in range(2):
        h = layers.LayerNormalization(name=f"block_{i}_1_norm")(x)
        h = layers.MultiHeadAttention(4, 4, name=f"block_{i}_attention")(
            h, h, use_causal_mask=True
        )
        x = layers.Add(name=f"block_{i}_1_add")([x, h])
        h = layers.LayerNormalization(name=f"block_{i}_2_norm")(x)
        h = layers.Dense(4 * WIDTH, "gelu", name=f"block_{i}_up")(h)
        h = layers.Dense(WIDTH, name=f"block_{i}_down")(h)
        x = layers.Add(name=f"block_{i}_2_add")([x, h])
    x = layers.Dense(VOCABULARY, name="head")(x)
    model = keras.Model(inputs, x)
    model.compile(optimizer, LOSS, metrics=["accuracy"])
    return model


def clipped():
    return gpt(keras.optimizers.Adam(clipnorm=0.1))


def accumulating():
    return gpt(keras.optimizers.SGD(gradient_accumulation_steps=2))


def muon():
    return gpt(keras.optimizers.Muon(0.01))


def convolutions():
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="conv_a")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Activation("relu")(x)
    x = layers.Conv2D(12, 3, strides=2, name="conv_b")(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(4, name="out")(x))
    model.compile("sgd", LOSS)
    return model


def own_loss():
    """The step of code of one's own, which sees the global batch."""
    model = gpt()

    def loss(y, logits):
        return ops.mean(ops.square(logits - ops.mean(logits, axis=0)))

    model.compile("sgd", loss)
    return model


def hub(name):
    from integration_tests.others import keras_hub_test

    model = getattr(keras_hub_test, name)()
    model.compile("sgd", LOSS, sampler="greedy")
    return model


def text():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCABULARY, (ROWS, LENGTH + 1)).astype("int32")
    return ids[:, :-1], ids[:, 1:]


def padded_text():
    x, y = text()
    return {"token_ids": x, "padding_mask": np.ones_like(x)}, y


def images():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 8, 8, 3)).astype("float32")
    return x, np.arange(ROWS) % 4


# By name: a function that makes a model, its data, the mesh of four, layouts.
PROGRAMS = {
    "gpt, tensor parallel": (gpt, text, (1, 4), TENSOR),
    "gpt, FSDP": (gpt, text, (4, 1), FULLY_SHARDED),
    "gpt, both": (gpt, text, (2, 2), BOTH),
    "gpt, clipped": (clipped, text, (2, 2), BOTH),
    "gpt, accumulated": (accumulating, text, (2, 2), BOTH),
    "gpt, Muon": (muon, text, (2, 2), BOTH),
    "gpt, sequence parallel": (gpt, text, (2, 2), SEQUENCE),
    "gpt, data parallel": (gpt, text, (4, 1), {}),
    "gpt, own loss": (own_loss, text, (2, 2), TENSOR),
    "convolutions": (convolutions, images, (2, 2), CONVOLUTIONS),
}
# KerasHub's: the layout map that they bring.
HUB = {
    "llama3": ("Llama3Backbone", (2, 2)),
    "gemma": ("GemmaBackbone", (1, 4)),
    "qwen_moe": ("QwenMoeBackbone", (2, 2)),
}


def distribution(shape, layouts, devices):
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)
    if isinstance(layouts, str):
        from keras_hub import models

        layout_map = getattr(models, layouts).get_layout_map(mesh)
    else:
        layout_map = parity.layout_map(mesh, layouts)
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def program(name):
    """A function that makes a model, a batch, and arguments of
    `distribution`."""
    if name in HUB:
        layouts, shape = HUB[name]
        return lambda: hub(name), padded_text(), shape, layouts
    make, data, shape, layouts = PROGRAMS[name]
    return make, data(), shape, layouts


def predict(name, processes):
    make, (x, y), shape, layouts = program(name)
    devices = [f"cpu:{i}" for i in range(processes)]
    return keras.distribution.report(
        make, x=x, y=y, distribution=distribution(shape, layouts, devices)
    )


def main(processes, *names):
    found = {}
    for name in names:
        # Names that Keras makes up are those of the first model.
        keras.utils.clear_session(free_memory=False)
        found[name] = predict(name, int(processes)).facts
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
