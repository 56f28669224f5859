"""The variants that are compared, by the keys that `--only` takes."""

import dataclasses
import functools
import importlib

BASE = "1"
# Of these, the faster one is the peer of the Keras variants.
PEERS = ("2", "2l")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What can be made of a workload, and who takes part.

    Attributes:
        key: what `--only` takes.
        title: for the tables.
        maker: `"module.function"` that makes the `Variant`; imported when
            needed, so that a torch peer runs where Keras does not.
        all_processes: whether every process takes part, or the first alone.
        options: dict of further arguments of the maker.
    """

    key: str
    title: str
    maker: str
    all_processes: bool = True
    options: dict = dataclasses.field(default_factory=dict)

    def make(self, sizes, mesh, **kwargs):
        module, function = self.maker.split(".")
        maker = getattr(importlib.import_module(module), function)
        return maker(sizes, mesh, **self.options, **kwargs)

    @property
    def is_keras(self):
        return self.maker.startswith("keras_variants.")


def entries(workload):
    """The entries of one workload, in the order of the tables."""
    kind = workload.split("_")[-1]
    torch_entry = functools.partial(_entry, "torch_peers")
    keras_entry = functools.partial(_entry, "keras_variants")
    found = [
        torch_entry("1", "torch, one process", "single", False),
        torch_entry("2", "torch parallelize_module", "tensor_parallel"),
        torch_entry(
            "2l",
            "torch parallelize_module, Adam on local shards",
            "tensor_parallel_local_adam",
        ),
        torch_entry("3", "torch tensor parallel, raw", "raw_tensor_parallel"),
        torch_entry("4", "torch DDP", "distributed_data_parallel"),
        torch_entry("5", "torch FSDP2", "fully_sharded"),
        torch_entry(
            "5l", "torch FSDP2, layer by layer", "fully_sharded_layers"
        ),
        torch_entry(
            "5t",
            "torch FSDP2 x parallelize_module, mesh (n / 2, 2)",
            "fully_sharded_two_axes",
        ),
        keras_entry("6", "Keras fit, one process", "fit_single", False),
        keras_entry("6b", "Keras bare step, one process", "bare_single", False),
        keras_entry("7", "Keras fit, ModelParallel", "fit_model_parallel"),
        keras_entry("8", "Keras fit, DataParallel", "fit_data_parallel"),
    ]
    bare = "Keras bare step, ModelParallel"
    if kind == "mlp":
        found.append(keras_entry("9", bare, "bare_model_parallel"))
    else:
        found += [
            keras_entry("9a", f"{bare}, sharded logits", "bare_sharded_output"),
            keras_entry("9b", f"{bare}, whole logits", "bare_model_parallel"),
        ]
    found.append(
        keras_entry("10", "Keras bare step, DataParallel", "bare_data_parallel")
    )
    found += [
        keras_entry("11", "Keras fit, FSDP", "fit_fully_sharded"),
        keras_entry("12", "Keras bare step, FSDP", "bare_fully_sharded"),
        keras_entry(
            "12t",
            "Keras bare step, FSDP x tensor parallel, mesh (n / 2, 2)",
            "bare_two_axes",
        ),
    ]
    if kind == "gpt":
        found += [
            keras_entry(
                "6m",
                "Keras fit, one process, MultiHeadAttention",
                "fit_single",
                False,
                attention="mha",
            ),
            keras_entry(
                "7m",
                "Keras fit, ModelParallel, MultiHeadAttention",
                "fit_model_parallel",
                attention="mha",
            ),
            keras_entry(
                "9m",
                f"{bare}, sharded logits, MultiHeadAttention",
                "bare_sharded_output",
                attention="mha",
            ),
        ]
    return found


def _entry(module, key, title, function, all_processes=True, **options):
    return Entry(key, title, f"{module}.{function}", all_processes, options)
