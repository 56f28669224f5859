"""Overlay: what KerasHub exports for Hugging Face's library, process 0 writes.

All take part in gathering the weights of a backbone, each of them once; then
process 0 writes all files by itself.
"""

import functools

from keras_hub.src.utils.transformers.export import hf_exporter as upstream

from keras.src.distribution import files
from keras.src.distribution import processes

__all__ = [
    "export_backbone",
    "export_generation_config",
    "export_image_converter",
    "export_processor_config",
    "export_tokenizer",
]

released_export_backbone = upstream.export_backbone


def _by_one(export):
    """Wraps a function that communicates with nobody and writes files.

    Collective under a distribution: every process calls it.
    """

    @functools.wraps(export)
    def export_once(exported, path):
        return files.on_all(
            lambda: None if files.is_other() else export(exported, path), path
        )

    return export_once


export_generation_config = _by_one(upstream.export_generation_config)
export_image_converter = _by_one(upstream.export_image_converter)
export_processor_config = _by_one(upstream.export_processor_config)
export_tokenizer = _by_one(upstream.export_tokenizer)


@functools.wraps(released_export_backbone)
def export_backbone(backbone, path, include_lm_head=False, tokenizer=None):
    def write():
        return released_export_backbone(
            backbone, path, include_lm_head, tokenizer
        )

    exporters, name = upstream.MODEL_EXPORTERS, type(backbone).__name__
    with processes.distribution_of(backbone):
        # Of another model, all raise what KerasHub says.
        if not processes.is_distributed() or name not in exporters:
            return write()
        export = exporters[name]
        weights = _whole(export(backbone, include_lm_head=include_lm_head))
        # KerasHub asks by the name of the model, as it writes.
        exporters[name] = lambda *args, **kwargs: weights
        try:
            files.on_all(lambda: files.is_other() or write(), path)
        finally:
            exporters[name] = export


def _whole(weights):
    """Whole weights by their names, on the process that writes.

    Collective: every process calls it.

    Args:
        weights: dict of variables, tensors and arrays.
    """
    found = {}
    for name, weight in weights.items():
        weight = getattr(weight, "value", weight)
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        found[name] = None if files.is_other() else weight
    return found
