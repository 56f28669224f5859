"""KerasHub's presets: process 0 writes them, each process reads its part."""

import sys
import types

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from integration_tests.others import keras_hub_test

pytestmark = pytest.mark.world(2)
keras_hub = pytest.importorskip(
    "keras_hub",
    reason="keras_hub is not installed, see requirements-hub.txt",
    exc_type=ImportError,
)

LAYOUTS = {
    "fsdp": ((2, 1), {".*conv/kernel": (None, None, None, "batch")}),
    "tensor": ((1, 2), {".*conv/kernel": (None, None, None, "model")}),
    "data": ((2, 1), {}),
}


def make_task():
    models, layers = keras_hub.models, keras_hub.layers
    return models.ResNetImageClassifier(
        keras_hub_test.resnet().backbone,
        num_classes=3,
        preprocessor=models.ResNetImageClassifierPreprocessor(
            layers.ResNetImageConverter(image_size=(8, 8))
        ),
    )


@pytest.mark.parametrize("max_shard_size", [10, 2e-4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_save_and_load(name, max_shard_size, rank, tmp_path):
    x = np.linspace(-1, 1, 3 * 192).reshape(3, 8, 8, 3)
    with parity.fresh(parity.model_parallel(*LAYOUTS[name]), 3):
        task = make_task()
        # Each has a folder in its mind, and one makes it.
        task.save_to_preset(
            str(tmp_path / f"rank{rank}"), max_shard_size=max_shard_size
        )
        assert [path.name for path in tmp_path.iterdir()] == ["rank0"]
        files = {path.name for path in (tmp_path / "rank0").iterdir()}
        assert {"config.json", "metadata.json", "task.json"} <= files
        assert "preprocessor.json" in files and len(files) > 5
        assert ("model.weights.json" in files) == (max_shard_size < 1)
        loaded = keras_hub.models.ImageClassifier.from_preset(
            str(tmp_path / "rank0")
        )
        for ours, theirs in zip(loaded.weights, task.weights):
            np.testing.assert_array_equal(ours, theirs)
            assert type(ours.value) is type(theirs.value)
        expected = task.predict(x, verbose=0)
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    # One device reads it as well.
    one = everyone.gather(
        keras_hub.models.ImageClassifier.from_preset(
            str(tmp_path / "rank0")
        ).predict(x, verbose=0)
    )
    np.testing.assert_allclose(one[0], expected, atol=1e-5)


def test_a_preset_that_is_not_written_leaves_the_old_one(
    rank, tmp_path, monkeypatch
):
    """Broken off with its last file; then another takes its place."""
    path = tmp_path / "preset"
    with parity.fresh(keras.distribution.DataParallel(), 3):
        make_task().save_to_preset(str(path), max_shard_size=2e-4)
        if rank == 0:
            (path / "of others").write_text("of others")
        everyone.gather(None)
        old = {each.name: each.read_bytes() for each in path.iterdir()}
        everyone.gather(None)
        with monkeypatch.context() as patch:
            patch.setattr(
                keras_hub.models.ResNetImageClassifierPreprocessor,
                "save_to_preset",
                None,
            )
            outcomes = everyone.outcomes(
                lambda: make_task().save_to_preset(str(path))
            )
        assert "TypeError" in outcomes[0]
        for name, content in old.items():
            assert (path / name).read_bytes() == content, name
        assert [each.name for each in tmp_path.iterdir()] == ["preset"]
        everyone.gather(None)
        task = make_task()
        task.save_to_preset(str(path), max_shard_size=2e-4)
        assert set(old) <= {each.name for each in path.iterdir()}
        loaded = keras_hub.models.ImageClassifier.from_preset(str(path))
        for ours, theirs in zip(loaded.weights, task.weights):
            np.testing.assert_array_equal(ours, theirs)


def test_what_fails_on_one_fails_on_all(rank, tmp_path):
    with parity.fresh(keras.distribution.DataParallel(), 3):
        task = make_task()
        (tmp_path / "file").write_text("")
        path = tmp_path / ("other" if rank else "file") / "preset"
        outcomes = everyone.outcomes(lambda: task.save_to_preset(str(path)))
    assert outcomes[0] == outcomes[1] != "done"


def make_language_model():
    words = ["<|endoftext|>", *"abcd"]
    tokenizer = keras_hub.models.GPT2Tokenizer(
        vocabulary={word: i for i, word in enumerate(words)}, merges=[]
    )
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(words),
        num_layers=2,
        num_heads=2,
        hidden_dim=6,
        intermediate_dim=10,
        max_sequence_length=7,
    )
    return keras_hub.models.GPT2CausalLM(
        backbone,
        keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=4),
    )


EXPORT_LAYOUTS = {
    "both": (
        (2, 1),
        {".*(query|value)/kernel": ("batch", None, None)},
    ),
    "model": (
        (1, 2),
        {
            ".*feedforward_intermediate_dense/kernel": (None, "model"),
            ".*token_embedding/embeddings": ("model", None),
        },
    ),
    "data": ((2, 1), {}),
}


@pytest.fixture
def safetensors(monkeypatch):
    """What KerasHub takes of it for torch: sizes of dtypes."""
    package = types.ModuleType("safetensors")
    package.torch = types.ModuleType("safetensors.torch")
    package.torch._SIZE = {torch.float32: 4}
    monkeypatch.setitem(sys.modules, "safetensors", package)
    monkeypatch.setitem(sys.modules, "safetensors.torch", package.torch)


@pytest.mark.parametrize("name", EXPORT_LAYOUTS)
def test_export_to_transformers(name, rank, tmp_path, safetensors):
    """The files of one device, written once."""
    folders = tmp_path / "one", tmp_path / f"rank{rank}"
    with parity.fresh(None, 3):
        if rank == 0:
            make_language_model().export_to_transformers(str(folders[0]))
        everyone.gather(None)
    with parity.fresh(parity.model_parallel(*EXPORT_LAYOUTS[name]), 3):
        task = make_language_model()
        assert (name == "data") != any(
            isinstance(v._value, DTensor) for v in task.variables
        )
        task.export_to_transformers(str(folders[1]))
        everyone.gather(None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "rank0"]
    expected, actual = [
        {path.name: path.read_bytes() for path in (tmp_path / n).iterdir()}
        for n in ("one", "rank0")
    ]
    assert {"config.json", "model.safetensors", "vocab.json"} <= set(expected)
    assert actual == expected
    # A backbone alone, and a folder that is a file on the one that writes.
    path = tmp_path / (f"other{rank}" if rank else "rank0/config.json")
    with parity.fresh(parity.model_parallel(*EXPORT_LAYOUTS[name]), 3):
        outcomes = everyone.outcomes(
            lambda: task.backbone.export_to_transformers(str(path))
        )
    assert outcomes[0] == outcomes[1] != "done"
