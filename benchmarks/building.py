"""Memory and time that a process takes to build a large MLP, and its slots.

    python benchmarks/building.py
    python benchmarks/building.py --processes 1 4 --workload mlp

Each row is a run in fresh processes. The largest of all processes are printed:
MiB of the shards that it stores, how far its resident memory rose over that
before the model was built, at the peak, and the seconds of its processor; then
the same of Adam's slots. One process has no distribution: released Keras.

`normal` draws kernels as `keras.layers.Dense` does with
`kernel_initializer="random_normal"`, `uniform` as it does by default.
"""

import argparse
import gc
import time

import report
import storage
import torch
import workloads
from processes import launch

MIB = report.MIB
INITIALIZERS = {
    "uniform": "glorot_uniform",
    "normal": "random_normal",
    "truncated": "he_normal",
}
LAYOUTS = {
    # Rows of every kernel: what a process stores is drawn in one go.
    "fsdp": {".*kernel": ("batch", None)},
    # Columns of every kernel.
    "tensor": {".*kernel": (None, "model")},
}
COLUMNS = (
    "processes",
    "layout",
    "drawn",
    "shards",
    "largest variable",
    "peak",
    "processor s",
    "slots",
    "peak",
    "processor s",
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workload", default="big_mlp", choices=["big_mlp", "mlp", "tiny_mlp"]
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--drawn", nargs="+", default=list(INITIALIZERS))
    options = parser.parse_args()
    report.print_environment(report.environment(options.processes[-1]))
    print()
    report.print_head(*COLUMNS)
    for drawn in options.drawn:
        for processes in options.processes:
            layouts = options.layouts if processes > 1 else ["none"]
            for layout in layouts:
                arguments = (options.workload, layout, drawn)
                facts = list(launch(worker, arguments, processes))
                most = [max(values) for values in zip(*facts)]
                report.print_row(
                    processes, layout, drawn, *map("{:.1f}".format, most)
                )


def worker(rank, report, workload, layout, drawn):
    import keras

    torch.set_num_threads(1)
    sizes = workloads.WORKLOADS[workload]
    if layout != "none":
        set_distribution(keras, layout)
    widths = [sizes.hidden, sizes.width, sizes.hidden, sizes.output]
    # What the first build takes at all is not the model's.
    build(keras, 4, [4], "uniform")
    with measured() as making:
        model = build(keras, sizes.width, widths, drawn)
    with measured() as making_slots:
        optimizer = keras.optimizers.Adam()
        optimizer.build(model.trainable_variables)
    largest = max(
        v.value.dtype.itemsize * v.value.numel() for v in model.variables
    )
    report(
        (
            storage.local_bytes([v._value for v in model.variables]) / MIB,
            largest / MIB,
            *making,
            storage.local_bytes([v._value for v in optimizer.variables]) / MIB,
            *making_slots,
        )
    )


def set_distribution(keras, layout):
    devices = keras.distribution.list_devices()
    shape = (-1, 1) if layout == "fsdp" else (1, -1)
    shape = [len(devices) if n < 0 else n for n in shape]
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    for key, axes in LAYOUTS[layout].items():
        layouts[key] = axes
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch"
        )
    )


def build(keras, inputs, widths, drawn):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input((inputs,))]
        + [
            keras.layers.Dense(n, kernel_initializer=INITIALIZERS[drawn])
            for n in widths
        ]
    )


class measured(list):
    """Within it, what memory and the processor are used; afterwards a list of
    the peak's MiB over what was resident before, and seconds."""

    def __enter__(self):
        gc.collect()
        storage.reset_peak()
        self._before = storage.resident_bytes(), time.process_time()
        return self

    def __exit__(self, *error):
        memory, seconds = self._before
        self.append((storage.peak_resident_bytes() - memory) / MIB)
        self.append(time.process_time() - seconds)


if __name__ == "__main__":
    main()
