"""What collectives would cost on GPUs: a prediction, and a check of the model.

    python benchmarks/cost_model.py            # the prediction
    python benchmarks/cost_model.py --check    # on processes of this machine

The model is Hockney's (R. Hockney, The communication challenge for MPP, 1994):
a message of b bytes takes alpha + b / beta. A ring of n (R. Thakur et al.,
Optimization of collective communication operations in MPICH, 2005) gathers or
scatters b bytes in n - 1 messages of b / n, and reduces them for all in twice
as many. Groups that span hosts reduce within each host, between hosts, and
within each again.

Constants of the latencies are those that NCCL itself chooses algorithms by (its
`tuning.cc`: 8.4 us for a call, 3.4 us for a step over NVLink, 14 us over a
network, rings of its protocol `Simple`); an H100 sends 450 GB/s over NVLink (by
its data sheet), of which 0.8 are taken, and a host 100 Gbit/s, of which 0.9.
Nothing of this has been measured on GPUs.
"""

import argparse
import statistics
import time

import report

CALL = 8.4e-6
NVLINK = 3.4e-6, 0.8 * 450e9
ETHERNET = 14e-6, 0.9 * 12.5e9
ON_A_HOST = 8

# A language model: parameters, layers, width, tokens of a GPU in a step, bytes
# of a number; the share of 989 TFLOP/s (an H100's, bfloat16) that it reaches.
SIZES = {"1.3 B": (1.3e9, 24, 2048, 16384), "7 B": (6.7e9, 32, 4096, 8192)}
BYTES, FLOPS = 2, 0.4 * 989e12


def ring(kind, size, count, link):
    """Seconds of one collective.

    Args:
        kind: `"all_reduce"`, `"all_gather"` or `"reduce_scatter"`.
        size: bytes of the whole: what is reduced, gathered, or scattered.
        count: processes.
        link: pair of alpha, in seconds, and beta, in bytes a second.
    """
    alpha, beta = link
    rounds = (count - 1) * (2 if kind == "all_reduce" else 1)
    return rounds * (alpha + size / count / beta)


def on_gpus(kind, size, count):
    """As `ring`, of GPUs of which eight share a host and its network."""
    inside = min(count, ON_A_HOST)
    hosts = count // inside
    if hosts == 1:
        return CALL + ring(kind, size, count, NVLINK)
    alpha, beta = ETHERNET
    shared = alpha, beta / inside  # All GPUs of a host use it at once.
    parts = 2 if kind == "all_reduce" else 1
    return (
        CALL
        + parts * ring("all_gather", size, inside, NVLINK)
        + ring(kind, size / inside, hosts, shared)
    )


def collectives_of(layout, gpus, parameters, layers, width, tokens):
    """What a step of a GPU takes: triples of kind, bytes and processes, and how
    often, as `scale.py` counts them of the same layouts."""
    weights, rows = parameters * BYTES, tokens * width * BYTES
    if layout == "data":
        return [("all_reduce", weights, gpus, 1)]
    if layout == "fsdp":
        each = weights / layers
        return [
            ("all_gather", each, gpus, 2 * layers),
            ("reduce_scatter", each, gpus, layers),
        ]
    # Tensor parallel in a host, data parallel between hosts. The GPUs of a host
    # share their tokens.
    inside = min(gpus, ON_A_HOST)
    found = [("all_reduce", rows * inside, inside, 4 * layers)]
    if gpus > inside:
        found.append(("between", weights / inside, gpus // inside, 1))
    return found


def seconds_of(kind, size, count, times):
    if kind != "between":
        return times * on_gpus(kind, size, count)
    alpha, beta = ETHERNET
    shared = alpha, beta / ON_A_HOST
    return times * (CALL + ring("all_reduce", size, count, shared))


def predict():
    report.print_head(
        "model", "layout", "GPUs", "computes, ms", "communicates, ms", "of it"
    )
    for name, (parameters, *rest) in SIZES.items():
        computes = 6 * parameters * rest[2] / FLOPS
        for layout in ("data", "fsdp", "tensor"):
            for gpus in (8, 64):
                found = collectives_of(layout, gpus, parameters, *rest)
                seconds = sum(seconds_of(*each) for each in found)
                report.print_row(
                    name,
                    layout,
                    gpus,
                    f"{1e3 * computes:.0f}",
                    f"{1e3 * seconds:.1f}",
                    f"{seconds / computes:.2f}",
                )


# ---- the check ---------------------------------------------------------------

# What a data parallel step of `scale.py` reduces, and another twice as large.
STEP = (4228944, 2 * 4228944, 96)
SMALL, LARGE, SLEEP, TIMES = 8, 8 << 20, 0.05, 15


def check():
    from processes import launch

    found = {}
    for count in (2, 4, 8):
        (found[count],) = launch(measure, (), count)
    # alpha and beta of two processes; the cores of the machine carry the bytes,
    # so that more processes than cores share them.
    small, large, _ = found[2]
    alpha = small / 2
    beta = LARGE / (large - small)
    cores = 2
    report.print_head("processes", "step, ms", "predicted, ms", "ratio")
    for count, (_, _, step) in found.items():
        shared = alpha, beta * min(1, cores / count)
        predicted = SLEEP + sum(
            ring("all_reduce", size, count, shared) for size in STEP
        )
        report.print_row(
            count,
            f"{1e3 * step:.1f}",
            f"{1e3 * predicted:.1f}",
            f"{step / predicted:.2f}",
        )


def measure(rank, report):
    """Medians: a small and a large all-reduce, and a step that sleeps."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    def median(function):
        seconds = []
        for _ in range(TIMES):
            dist.barrier()
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
        slowest = torch.tensor([statistics.median(seconds[1:])])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item()

    def reduce(size):
        buffer = torch.zeros(size // 4)
        return lambda: dist.all_reduce(buffer)

    buffers = [reduce(size) for size in STEP]

    def step():
        time.sleep(SLEEP)  # in place of kernels
        for each in buffers:
            each()

    result = median(reduce(SMALL)), median(reduce(LARGE)), median(step)
    if rank == 0:
        report(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        check()
    else:
        predict()
