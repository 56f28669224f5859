"""Bytes that each process reads, writes and holds, as a large MLP is saved and
loaded.

    python benchmarks/files.py
    python benchmarks/files.py --processes 4 --layouts fsdp --workload mlp

Each layout gets fresh processes. In MiB, by rank: the size of the files; what a
process reads of files (`rchar` of `/proc/self/io`) and makes the disk write
(`write_bytes`); and how far its resident memory rises over what it was before,
at the peak. That is over a model that is built; what is loaded from `.keras` is
built as well. The last column is what all processes read, of the files' size.
"""

import argparse
import ctypes
import gc
import pathlib
import shutil
import tempfile

import building
import report
import storage
import torch
import torch.distributed as dist
import workloads
from processes import launch

MIB = report.MIB
LAYOUTS = ("fsdp", "tensor", "replicated")
KINDS = ("m.keras", "m.weights.h5", "m.weights.json")
COLUMNS = (
    "processes",
    "layout",
    "file",
    "MiB",
    "",
    "read",
    "written",
    "held",
    "all read",
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
    parser.add_argument("--folder", default=".", help="on the disk to write to")
    parser.add_argument("--patience", type=int, default=600)
    options = parser.parse_args()
    report.print_environment(report.environment(options.processes[-1]))
    print()
    report.print_head(*COLUMNS)
    for processes in options.processes:
        for layout in options.layouts if processes > 1 else ["none"]:
            folder = tempfile.mkdtemp(dir=options.folder)
            try:
                arguments = (options.workload, layout, folder)
                messages = list(
                    launch(worker, arguments, processes, options.patience)
                )
            finally:
                shutil.rmtree(folder)
            print_table(processes, layout, sorted(messages))


def print_table(processes, layout, messages):
    """Prints what the processes said, by rank."""
    for rows in zip(*(rows for _, rows in messages)):
        kind, size, what, *_ = rows[0]
        read, written, held = zip(*(row[3:] for row in rows))
        report.print_row(
            processes,
            layout,
            kind,
            f"{size:.0f}",
            what,
            *(
                " ".join(f"{max(x, 0):.0f}" for x in each)
                for each in (read, written, held)
            ),
            f"{sum(read) / size:.2f}" if what == "load" else "",
        )


def worker(rank, report, workload, layout, folder):
    import keras

    torch.set_num_threads(1)
    sizes = workloads.WORKLOADS[workload]
    if layout == "replicated":
        keras.distribution.initialize()
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    elif layout != "none":
        building.set_distribution(keras, layout)
    widths = [sizes.hidden, sizes.width, sizes.hidden, sizes.output]
    folder, rows = pathlib.Path(folder), []
    # What the first file takes at all is not the model's.
    small = building.build(keras, 4, [4], "uniform")
    for kind in KINDS:
        save(small, folder / f"small_{kind}")
        wait()
        load(keras, small, folder / f"small_{kind}")
        wait()
    model = building.build(keras, sizes.width, widths, "uniform")
    for kind in KINDS:
        before = set(folder.iterdir())
        with used() as bytes_of_saving:
            save(model, folder / kind)
        wait()
        size = sum(p.stat().st_size for p in set(folder.iterdir()) - before)
        rows.append((kind, size / MIB, "save", *bytes_of_saving))
        wait()
    for kind in reversed(KINDS):
        if kind == "m.keras":
            del model
            model = None
        with used() as bytes_of_loading:
            model = load(keras, model, folder / kind)
        (size,) = {row[1] for row in rows if row[0] == kind}
        rows.append((kind, size, "load", *bytes_of_loading))
        wait()
    report((rank, rows))
    wait()


def save(model, path):
    if path.suffix == ".keras":
        model.save(path)
    elif path.suffix == ".json":
        # Several files: one takes two of the large weights.
        model.save_weights(path, max_shard_size=150 * MIB / 2**30)
    else:
        model.save_weights(path)


def load(keras, model, path):
    if path.suffix == ".keras":
        return keras.models.load_model(path)
    model.load_weights(path)
    return model


def wait():
    if dist.is_initialized():
        dist.barrier()


class used(list):
    """Within it, files are used; afterwards a list of the MiB that are read,
    written and held."""

    def __enter__(self):
        gc.collect()
        # What was freed is not held.
        ctypes.CDLL(None).malloc_trim(0)
        storage.reset_peak()
        self._before = *_io(), storage.resident_bytes()
        return self

    def __exit__(self, *error):
        after = *_io(), storage.peak_resident_bytes()
        self += [(b - a) / MIB for a, b in zip(self._before, after)]


def _io():
    with open("/proc/self/io") as file:
        fields = dict(line.split(": ") for line in file)
    return int(fields["rchar"]), int(fields["write_bytes"])


if __name__ == "__main__":
    main()
