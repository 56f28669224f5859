"""Models of KerasHub, of random weights, under their own layout maps."""

import functools
import re

import numpy as np
import pytest

import keras
from integration_tests.harness import parity

pytestmark = pytest.mark.world(4)
models = pytest.importorskip(
    "keras_hub.models",
    reason="keras_hub is not installed, see requirements-hub.txt",
    exc_type=ImportError,
)

VOCABULARY = 31
ROWS = 7
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def text(length=5):
    """Inputs of a language model, the next tokens, and which of them count."""
    rng = np.random.default_rng(5)
    ids = rng.integers(1, VOCABULARY, (ROWS, length + 1)).astype("int32")
    mask = np.ones((ROWS, length), "int32")
    mask[0, -2:] = mask[3, -1:] = 0
    x = {"token_ids": ids[:, :-1], "padding_mask": mask}
    return x, ids[:, 1:], mask.astype("float32")


def segments():
    x, _, _ = text()
    x["segment_ids"] = np.tile([0, 0, 0, 1, 1], (ROWS, 1)).astype("int32")
    return x, np.arange(ROWS) % 3, None


def two_texts():
    x, _, _ = text()
    z, y, weights = text(4)
    x = {f"encoder_{name}": value for name, value in x.items()}
    x.update({f"decoder_{name}": value for name, value in z.items()})
    return x, y, weights


def sound():
    rng = np.random.default_rng(5)
    x, y, weights = text()
    x = {f"decoder_{name}": value for name, value in x.items()}
    x["encoder_features"] = rng.normal(size=(ROWS, 8, 5)).astype("float32")
    return x, y, weights


def images(size):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(ROWS, size, size, 3)).astype("float32")
    return x, np.arange(ROWS) % 3, None


# One layer, as this is the longest of all tests; Gemma and GPT-2 have two.
LANGUAGE_MODEL = {"vocabulary_size": VOCABULARY, "num_layers": 1}
DECODER = {
    **LANGUAGE_MODEL,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 14,
}
TRANSFORMER = {
    **LANGUAGE_MODEL,
    "num_heads": 2,
    "hidden_dim": 6,
    "intermediate_dim": 9,
    "dropout": 0.0,
}


def gemma(**kwargs):
    backbone = models.GemmaBackbone(
        **{**DECODER, "num_layers": 2, "hidden_dim": 10, "head_dim": 6},
        **kwargs,
    )
    return models.GemmaCausalLM(backbone, None)


def llama3(**kwargs):
    return models.Llama3CausalLM(
        models.Llama3Backbone(**DECODER, **kwargs), None
    )


def qwen_moe(**kwargs):
    backbone = models.QwenMoeBackbone(
        **DECODER,
        moe_intermediate_dim=6,
        shared_expert_intermediate_dim=9,
        num_experts=3,
        top_k=2,
        router_aux_loss_coefficient=0.1,
        **kwargs,
    )
    return models.QwenMoeCausalLM(backbone, None)


def mixtral():
    backbone = models.MixtralBackbone(
        **DECODER,
        num_experts=3,
        top_k=2,
        router_aux_loss_coef=0.1,
    )
    return models.MixtralCausalLM(backbone, None)


def gpt2():
    backbone = models.GPT2Backbone(
        **{**TRANSFORMER, "num_layers": 2}, max_sequence_length=8
    )
    return models.GPT2CausalLM(backbone, None)


def bert():
    backbone = models.BertBackbone(**TRANSFORMER, max_sequence_length=8)
    return models.BertTextClassifier(backbone, num_classes=3, dropout=0.0)


def with_logits(backbone):
    """A model of next tokens, where KerasHub has none without a tokenizer."""
    x = backbone.output["decoder_sequence_output"]
    logits = backbone.token_embedding(x, reverse=True)
    return keras.Model(backbone.input, logits)


def t5():
    return with_logits(models.T5Backbone(**TRANSFORMER))


def whisper():
    return with_logits(
        models.WhisperBackbone(
            **TRANSFORMER,
            num_mels=5,
            max_encoder_sequence_length=8,
            max_decoder_sequence_length=6,
        )
    )


def vit():
    backbone = models.ViTBackbone(
        image_shape=(6, 6, 3),
        patch_size=3,
        num_layers=2,
        num_heads=2,
        hidden_dim=6,
        mlp_dim=9,
    )
    return models.ViTImageClassifier(backbone, num_classes=3)


def resnet():
    backbone = models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 6],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(8, 8, 3),
    )
    return models.ResNetImageClassifier(backbone, num_classes=3)


def program(make, data, distribution=None):
    """Trains three steps, generates, and trains LoRA for two more.

    Collective under a distribution: every process calls it.
    """
    with parity.fresh(distribution, 7):
        model = make()
        x, y, weights = data()
        generates = hasattr(model, "generate")

        def compile_it():
            # KerasHub's own choices for all but the optimizer.
            kwargs = {"sampler": "greedy"} if generates else {}
            model.compile(keras.optimizers.SGD(0.1), LOSS, **kwargs)

        compile_it()
        results = {"before": model.predict_on_batch(x)}
        results["step"] = model.train_on_batch(
            x, y, sample_weight=weights, return_dict=True
        )
        results["gradients"] = {
            v.path: None
            if v.value.grad is None
            else keras.ops.convert_to_numpy(v.value.grad)
            for v in model.trainable_variables
        }
        # Two steps, of which the last has fewer rows than data shards.
        fit = model.fit(
            x, y, sample_weight=weights, batch_size=4, shuffle=False, verbose=0
        )
        results["fit"] = fit.history
        results["evaluate"] = model.evaluate(
            x, y, sample_weight=weights, batch_size=4, verbose=0
        )
        results["weights"] = values(model)
        results["after"] = model.predict(x, batch_size=4, verbose=0)
        if generates:
            prompt = {name: array[:3].copy() for name, array in x.items()}
            prompt["padding_mask"][:, 2:] = 0
            tokens = model.generate(prompt, stop_token_ids=None)
            results["tokens"] = tokens["token_ids"]
            model.backbone.enable_lora(2)
            compile_it()
            results["lora"] = [
                model.train_on_batch(x, y, sample_weight=weights)
                for _ in range(2)
            ]
            results["lora_weights"] = values(model)
    return results


def values(model):
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.variables}


@functools.cache
def on_one_device(make):
    return parity.on_one_device(lambda: program(make, text))


def device_mesh(shape):
    devices = keras.distribution.list_devices()
    return keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)


@pytest.mark.parametrize("shape", [(1, 4), (2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("make", [gemma, llama3, qwen_moe])
def test_shipped_layout_map(make, shape):
    expected = on_one_device(make)
    backbone = type(make().backbone)
    distribution = keras.distribution.ModelParallel(
        layout_map=backbone.get_layout_map(device_mesh(shape)),
        batch_dim_name="batch",
    )
    actual = program(make, text, distribution)
    parity.assert_same(actual, expected, 2e-5)


@pytest.mark.parametrize(
    "make, data",
    [
        (gpt2, text),
        (mixtral, text),
        (bert, segments),
        (t5, two_texts),
        (whisper, sound),
        (vit, functools.partial(images, 6)),
        (resnet, functools.partial(images, 8)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layout_map_of_the_keras_guide(make, data):
    """Every kernel and bias is cut along its last dim."""
    expected = parity.on_one_device(lambda: program(make, data))
    layouts = {
        re.escape(path): (None,) * (value.ndim - 1) + ("model",)
        for path, value in expected["weights"].items()
        if path.endswith(("/kernel", "/bias"))
    }
    assert layouts
    distribution = parity.model_parallel((2, 2), layouts)
    actual = program(make, data, distribution)
    parity.assert_same(actual, expected, 2e-5)
