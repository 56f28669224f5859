"""Keras's `fit` on JAX beside this patch's on torch, in turns.

    python benchmarks/keras_on_jax.py mlp
    python benchmarks/keras_on_jax.py gpt --rounds 8 --steps 2

JAX is one process with two devices of the host, torch two processes of one
thread (`requirements-jax.txt` brings JAX). Both live through the whole
measurement, each trains while the other waits, and a ratio is of two samples of
one round.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys

WAYS = ("DataParallel", "ModelParallel")
DEVICES = 2


class Side:
    """The processes of one backend, which train when they are told to.

    Args:
        backend: `"jax"` or `"torch"`.
        workload: name, of `workloads.WORKLOADS`.
        way: of `WAYS`.
    """

    def __init__(self, backend, workload, way):
        common = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "OMP_NUM_THREADS": "1",
        }
        if backend == "jax":
            flag = f"--xla_force_host_platform_device_count={DEVICES}"
            environments = [{**common, "XLA_FLAGS": flag}]
        else:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = str(s.getsockname()[1])
            environments = [
                {
                    **common,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(DEVICES),
                    "LOCAL_WORLD_SIZE": str(DEVICES),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                for rank in range(DEVICES)
            ]
        command = [sys.executable, __file__, workload, "--train", way]
        self.processes = [
            subprocess.Popen(
                command,
                env=each,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for each in environments
        ]

    def seconds(self, steps):
        """Seconds a step, of the slowest process."""
        for process in self.processes:
            print(steps, file=process.stdin, flush=True)
        return max(float(p.stdout.readline()) for p in self.processes) / steps

    def end(self):
        for process in self.processes:
            process.stdin.close()
            process.wait(timeout=60)


def train(workload, way):
    """What a process does: trains as many steps as it reads, until there is no
    more to read, and prints the seconds."""
    import keras_models
    import keras_variants
    import workloads

    import keras

    sizes = workloads.WORKLOADS[workload]
    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(1)
        keras.distribution.initialize()
    devices = keras.distribution.list_devices()
    if way == "DataParallel":
        distribution = keras.distribution.DataParallel(devices=devices)
    else:
        mesh = keras.distribution.DeviceMesh(
            (1, DEVICES), ["batch", "model"], devices
        )
        distribution = keras.distribution.ModelParallel(
            layout_map=keras_models.make_layout_map(mesh, sizes),
            batch_dim_name="batch",
        )
    fit = keras_variants.Fit(sizes, distribution, copy_weights=False)
    for line in sys.stdin:
        print(fit.run(int(line)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--train", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.workload, arguments.train)
        return
    print("| `fit` | ms a step on JAX | on torch | torch to JAX |")
    print("| --- | --- | --- | --- |")
    for way in WAYS:
        sides = [Side(b, arguments.workload, way) for b in ("jax", "torch")]
        samples = [[], []]
        for number in range(arguments.rounds + 2):
            order = (0, 1) if number % 2 else (1, 0)
            for i in order:
                sample = sides[i].seconds(arguments.steps)
                if number > 1:  # The first rounds compile and warm up.
                    samples[i].append(sample)
        for side in sides:
            side.end()
        jax, torch = samples
        ratios = [b / a for a, b in zip(jax, torch)]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {way} | {1e3 * statistics.median(jax):.2f} | "
            f"{1e3 * statistics.median(torch):.2f} | "
            f"{median:.2f} ({low:.2f}-{high:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
