"""Layout maps that are found, beside those that an expert writes.

    python -m integration_tests.report.auto_programs [--code] [NAME ...]

prints for each model and mesh what a process sends in a step, and holds, under
the map that `LayoutMap.auto` finds, under one written by hand in Megatron's way
and under that of KerasHub where it ships one.
"""

import sys
import time

import numpy as np

import keras
from integration_tests.harness import parity
from integration_tests.report import programs
from keras import layers

ROWS, LENGTH, VOCABULARY = 8, 6, 128
LOSS = programs.LOSS
MESHES = ((1, 4), (2, 2), (4, 1))
HEADS = {
    ".*(query|key|value)/kernel": (None, "model", None),
    ".*(query|key|value)/bias": ("model", None),
    ".*attention_output/kernel": ("model", None, None),
}
FEEDFORWARD = {
    ".*(intermediate_dense|gate_dense|_gating|_gating_2)/kernel": (
        None,
        "model",
    ),
    ".*intermediate_dense/bias": ("model",),
    ".*(feedforward_output_dense|ffw_linear)/kernel": ("model", None),
}
TOKENS = {".*token_embedding/embeddings": ("model", None)}
UNTIED = {".*token_embedding/reverse_embeddings": (None, "model")}
DECODER = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 64,
}
# In the proportions of real models.
TRANSFORMER = {
    "vocabulary_size": 1280,
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 128,
    "dropout": 0.0,
}


def text():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCABULARY, (ROWS, LENGTH + 1)).astype("int32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((ROWS, LENGTH))}
    return x, ids[:, 1:]


def segments():
    x, _ = text()
    x["segment_ids"] = np.zeros((ROWS, LENGTH), "int32")
    return x, np.zeros(ROWS, "int32")


def sound():
    x, y = text()
    x = {f"decoder_{name}": value for name, value in x.items()}
    x["encoder_features"] = np.ones((ROWS, 8, 4), "float32")
    return x, y


def images(size=16):
    x = np.ones((ROWS, size, size, 3), "float32")
    return x, np.zeros(ROWS, "int32")


def small_images():
    return images(8)


def vectors():
    return np.ones((ROWS, 16), "float32"), np.ones((ROWS, 16), "float32")


def compiled(model, loss=LOSS):
    kwargs = {"sampler": "greedy"} if hasattr(model, "generate") else {}
    model.compile("sgd", loss, **kwargs)
    return model


def hub():
    from keras_hub import models

    return models


def llama():
    backbone = hub().LlamaBackbone(**DECODER)
    return compiled(hub().LlamaCausalLM(backbone, None))


def gemma():
    backbone = hub().GemmaBackbone(**DECODER, head_dim=4)
    return compiled(hub().GemmaCausalLM(backbone, None))


def mixtral():
    backbone = hub().MixtralBackbone(**DECODER, num_experts=4, top_k=2)
    return compiled(hub().MixtralCausalLM(backbone, None))


def bert():
    backbone = hub().BertBackbone(**TRANSFORMER, max_sequence_length=8)
    return compiled(
        hub().BertTextClassifier(backbone, num_classes=3, dropout=0.0)
    )


def whisper():
    backbone = hub().WhisperBackbone(
        **{**TRANSFORMER, "num_layers": 6},
        num_mels=4,
        max_encoder_sequence_length=8,
        max_decoder_sequence_length=6,
    )
    x = backbone.output["decoder_sequence_output"]
    logits = backbone.token_embedding(x, reverse=True)
    return compiled(keras.Model(backbone.input, logits))


def vit():
    backbone = hub().ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=2,
        num_layers=3,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
    )
    return compiled(hub().ViTImageClassifier(backbone, num_classes=3))


def resnet():
    backbone = hub().ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 128],
        stackwise_num_blocks=[2, 2],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    return compiled(hub().ResNetImageClassifier(backbone, num_classes=3))


def swin():
    backbone = hub().SwinTransformerBackbone(
        image_shape=(16, 16, 3),
        patch_size=2,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(4, 4),
        window_size=2,
    )
    return compiled(
        hub().SwinTransformerImageClassifier(backbone, num_classes=3)
    )


def mlp():
    names = ("up_1", "down_1", "up_2", "down_2")
    model = keras.Sequential([keras.Input((16,))])
    for name in names:
        units, activation = (64, "relu") if "up" in name else (16, None)
        model.add(layers.Dense(units, activation, name=name))
    return compiled(model, "mse")


# By name: a function that makes a model, its data, an expert's layouts, and
# the class of KerasHub's that ships a layout map.
PROGRAMS = {
    "gpt": (programs.gpt, programs.text, programs.TENSOR, None),
    "llama": (
        llama,
        text,
        {**HEADS, **FEEDFORWARD, **TOKENS, **UNTIED},
        "LlamaBackbone",
    ),
    "gemma": (
        gemma,
        text,
        {
            ".*(query|key|value|attention_output)/kernel": (
                "model",
                None,
                None,
            ),
            **FEEDFORWARD,
            **TOKENS,
        },
        "GemmaBackbone",
    ),
    "mixtral": (
        mixtral,
        text,
        {
            **HEADS,
            **TOKENS,
            **UNTIED,
            ".*expert_feedforward_(gate|intermediate)_dense": (
                None,
                None,
                "model",
            ),
            ".*expert_feedforward_output_dense": (None, "model", None),
        },
        None,
    ),
    "bert": (bert, segments, {**HEADS, **FEEDFORWARD, **TOKENS}, None),
    "vit": (
        vit,
        small_images,
        {
            **HEADS,
            ".*mlp/dense_1/kernel": (None, "model"),
            ".*mlp/dense_1/bias": ("model",),
            ".*mlp/dense_2/kernel": ("model", None),
        },
        None,
    ),
    "whisper": (whisper, sound, {**HEADS, **FEEDFORWARD, **TOKENS}, None),
    "resnet": (
        resnet,
        images,
        {
            r".*block\d+_1_conv/kernel": (None, None, None, "model"),
            r".*block\d+_1_bn/.*": ("model",),
            r".*block\d+_2_conv/kernel": (None, None, "model", None),
        },
        None,
    ),
    "swin": (
        swin,
        images,
        {
            ".*attention_qkv/kernel": (None, "model"),
            ".*attention_qkv/bias": ("model",),
            ".*attention_projection/kernel": ("model", None),
            ".*fc1/kernel": (None, "model"),
            ".*fc1/bias": ("model",),
            ".*fc2/kernel": ("model", None),
        },
        None,
    ),
    "mlp": (
        mlp,
        vectors,
        {
            r".*up_\d/kernel": (None, "model"),
            r".*up_\d/bias": ("model",),
            r".*down_\d/kernel": ("model", None),
        },
        None,
    ),
}


def mesh_of(shape):
    devices = [f"cpu:{i}" for i in range(shape[0] * shape[1])]
    return keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)


def cost(make, data, layout_map):
    """Bytes that a process sends in a step, and holds of weights."""
    x, y = data
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )
    keras.utils.clear_session(free_memory=False)
    facts = keras.distribution.report(
        make, x=x, y=y, distribution=distribution
    ).facts
    sent = sum(c["sent"] for c in facts["collectives"])
    return sent, sum(v["stored"] for v in facts["variables"])


def compare(name, shape):
    """Costs by the way a layout map came to be; the map and the seconds that
    it took to find."""
    make, data, written, shipped = PROGRAMS[name]
    data, mesh = data(), mesh_of(shape)
    keras.utils.clear_session(free_memory=False)
    start = time.process_time()
    found = keras.distribution.LayoutMap.auto(make, mesh, x=data[0])
    seconds = time.process_time() - start
    costs = {
        "found": cost(make, data, found),
        "written": cost(make, data, parity.layout_map(mesh, written)),
    }
    if shipped:
        shipped = getattr(hub(), shipped).get_layout_map(mesh)
        costs["shipped"] = cost(make, data, shipped)
    return costs, found, seconds


def main(*names):
    says_code = "--code" in names
    for name in [n for n in names if n != "--code"] or PROGRAMS:
        for shape in MESHES:
            costs, found, seconds = compare(name, shape)
            print(name, shape, f"{seconds:.2f} s", costs)
            least = min(sent for sent, _ in costs.values())
            if says_code or costs["found"][0] > least:
                print(found.code, found.explanation, sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
