"""Memory of one process while it trains a large MLP.

    python benchmarks/memory.py
    python benchmarks/memory.py --only 3,9 --workload mlp --json memory.json

Each variant gets fresh processes. Printed are, for process 0, the bytes of
parameters, gradients and optimizer state that it stores, and how much its
resident memory grew over what the imports take: after the model was made, at
the peak of making it, after two steps, and at the peak of the steps.
"""

import argparse
import gc
import json

import catalog
import report
import storage
import torch
import torch.distributed as dist
import workloads
from processes import ProcessError
from processes import launch
from torch.distributed.device_mesh import init_device_mesh

COLUMNS = (
    "parameters",
    "gradients",
    "optimizer",
    "made",
    "peak_making",
    "trained",
    "peak_training",
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workload", default="big_mlp", choices=workloads.WORKLOADS
    )
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--patience", type=int, default=300)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    output = {"environment": report.environment(options.processes)}
    report.print_environment(output["environment"])
    print(f"\n{options.workload}: MiB of process 0\n")
    report.print_head("", "variant", *(c.replace("_", ", ") for c in COLUMNS))
    for entry in catalog.entries(options.workload):
        if options.only and entry.key not in options.only:
            continue
        output[entry.key] = facts = measure(entry, options)
        report.print_row(entry.key, entry.title, *cells(facts))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(output, file, indent=1)


def cells(facts):
    if "error" in facts:
        return [f"FAILED {facts['error']}"]
    return [f"{facts[column] / report.MIB:.1f}" for column in COLUMNS]


def measure(entry, options):
    """One variant; returns its `COLUMNS` in bytes, or its `error`."""
    arguments = (options.workload, entry.key)
    # Nobody has to wait for a process that is not there.
    processes = options.processes if entry.all_processes else 1
    try:
        return list(launch(worker, arguments, processes, options.patience))[-1]
    except ProcessError as e:
        return {"error": str(e)}


def worker(rank, report, workload, key):
    # Before the first measurement, and of every variant, so that no import
    # counts as growth. Not above: only workers have the backend set.
    import keras_variants  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sizes = workloads.WORKLOADS[workload]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    (entry,) = [e for e in catalog.entries(workload) if e.key == key]
    # Weights drawn by Keras: those of the torch model would lie beside them.
    options = {"copy_weights": False} if entry.is_keras else {}
    gc.collect()
    storage.reset_peak()
    before = storage.resident_bytes()
    variant = entry.make(sizes, mesh, **options)
    gc.collect()
    facts = {
        "made": storage.resident_bytes() - before,
        "peak_making": storage.peak_resident_bytes() - before,
    }
    storage.reset_peak()
    variant.run(2)
    facts["peak_training"] = storage.peak_resident_bytes() - before
    gc.collect()
    facts["trained"] = storage.resident_bytes() - before
    facts |= storage.stored_bytes(variant)
    if rank == 0:
        report(facts)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
