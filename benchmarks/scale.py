"""What one process of 8, 64, 512 and 4,096 has to do: a simulation.

    python benchmarks/scale.py
    python benchmarks/scale.py --only data,fsdp --sizes 8,512 --json scale.json
    python benchmarks/scale.py --svg docs/scale.svg

Nothing is sent (see `alike.py`): what is measured is what does not depend on a
network, the processor time of this process, its memory, and how many
collectives of how many bytes it takes part in. Every measurement gets a fresh
process. The work of a data shard stays the same: 2 rows of a model of four
Dense layers, 64 x 4096 and back, with Adam. Seconds are of the processor;
those of a step are medians, and of three processes the least is printed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

LAYOUTS = {
    "data": "data parallel, mesh (N)",
    "fsdp": "weights cut over the data axis, mesh (N)",
    "tensor": "tensor parallel x FSDP, mesh (N / 8, 8)",
    "hybrid": "replicas x FSDP x tensor parallel, mesh (N / 64, 8, 8)",
}
SIZES = (8, 64, 512, 4096)
ROWS, FEATURES, HIDDEN, BLOCKS = 2, 64, 4096, 2
STEPS, FEW = 40, 4

# Of what is measured: its heading and how it is written.
COLUMNS = {
    "set up": ("ms", 1e3),
    "build": ("ms", 1e3),
    "start of fit": ("ms", 1e3),
    "step": ("ms", 1e3),
    "step, generator": ("ms", 1e3),
    "step, evaluate": ("ms", 1e3),
    "step, predict": ("ms", 1e3),
    "save weights": ("ms", 1e3),
    "memory": ("MiB", 2**-20),
}
COUNTED = {
    "fit": "a step of `fit`",
    "generator": "of a generator",
    "evaluate": "of `evaluate`",
    "predict": "of `predict`",
    "start": "as `fit` begins",
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(LAYOUTS))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="a file for all that was measured")
    parser.add_argument(
        "--tables", nargs="*", help="such files, to print and plot as well"
    )
    parser.add_argument("--svg", help="a file for the plot")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        layout, size = options.measure
        print(json.dumps(measure(layout, int(size))))
        return
    found = []
    for layout in filter(None, options.only.split(",")):
        for size in map(int, options.sizes.split(",")):
            if size % factor(layout):
                continue
            found.append(least(layout, size, options.rounds))
            print(f"{layout} {size}", file=sys.stderr, flush=True)
            if options.json:
                # Now: it takes some minutes.
                with open(options.json, "w") as file:
                    json.dump(found, file, indent=1)
    for path in options.tables or ():
        with open(path) as file:
            found += json.load(file)
    found.sort(key=lambda e: (list(LAYOUTS).index(e["layout"]), e["size"]))
    print_tables(found)
    if options.svg:
        import plot

        with open(options.svg, "w") as file:
            file.write(plot.of_scale(found))


def factor(layout):
    return {"data": 1, "fsdp": 1, "tensor": 8, "hybrid": 64}[layout]


def least(layout, size, rounds):
    """The least of what several processes measure: others slow them down."""
    found = [in_a_process(layout, size) for _ in range(rounds)]
    for name in found[0]["times"]:
        found[0]["times"][name] = min(each["times"][name] for each in found)
    return found[0]


def in_a_process(layout, size):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "KERAS_BACKEND": "torch",
        # What is freed goes back at once, so that resident is live.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--measure", layout, str(size)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def make_distribution(layout, size):
    import keras

    shape, axes, batch_axes, cut = {
        "data": ((size,), ("batch",), "batch", None),
        "fsdp": ((size,), ("batch",), "batch", "batch"),
        "tensor": (
            (size // 8, 8),
            ("batch", "model"),
            "batch",
            ("model", "batch"),
        ),
        "hybrid": (
            (size // 64, 8, 8),
            ("replicate", "shard", "model"),
            ("replicate", "shard"),
            ("model", "shard"),
        ),
    }[layout]
    mesh = keras.distribution.DeviceMesh(
        shape, axes, keras.distribution.list_devices()
    )
    layouts = keras.distribution.LayoutMap(mesh)
    if cut is not None:
        layouts[".*up.*/kernel"] = (None, cut)
        layouts[".*up.*/bias"] = (cut,)
        layouts[".*down.*/kernel"] = (cut, None)
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name=batch_axes
    )


def make_model():
    import keras
    from keras import layers

    stack = [keras.Input((FEATURES,))]
    for i in range(BLOCKS):
        stack.append(layers.Dense(HIDDEN, "relu", name=f"up_{i}"))
        stack.append(layers.Dense(FEATURES, name=f"down_{i}"))
    model = keras.Sequential(stack)
    model.compile(keras.optimizers.Adam(1e-3), "mse", metrics=["mae"])
    return model


def measure(layout, size):
    """What one process of `size` takes, as a dict."""
    import alike
    import numpy as np
    import torch

    import keras

    torch.set_num_threads(1)
    keras.utils.set_random_seed(1)
    times = {}
    found = {"layout": layout, "size": size, "times": times}
    with alike.world(size):
        memory = resident()
        clock = Clock(times)
        distribution = make_distribution(layout, size)
        keras.distribution.set_distribution(distribution)
        clock.lap("set up")
        model = make_model()
        clock.lap("build")
        shards = getattr(distribution, "_torch_context").data_size
        found["data shards"] = shards
        batch = ROWS * shards
        row = np.zeros((1, FEATURES), "float32")

        def arrays(steps):
            # All rows are one: they take no memory.
            x = np.broadcast_to(row, (batch * steps, FEATURES))
            return {"x": x, "y": x, "batch_size": batch}

        def generator(steps):
            rows = np.broadcast_to(row, (batch, FEATURES))
            return {
                "x": ((rows, rows) for _ in range(steps)),
                "steps_per_epoch": steps,
            }

        def only_x(steps):
            arguments = arrays(steps)
            del arguments["y"]
            return arguments

        kinds = {
            "fit": (model.fit, arrays),
            "generator": (model.fit, generator),
            "evaluate": (model.evaluate, arrays),
            "predict": (model.predict, only_x),
        }
        for method, of in kinds.values():
            method(**of(FEW), verbose=0)  # builds, and predicts the order
        for name, (method, of) in kinds.items():
            step, start = timed(method, of(STEPS))
            times["step" if name == "fit" else f"step, {name}"] = step
            if name == "fit":
                times["start of fit"] = start
        clock.begin()
        path = f"/tmp/scale_{os.getpid()}.weights.h5"
        model.save_weights(path)
        clock.lap("save weights")
        os.remove(path)
        times["memory"] = resident() - memory
        found["counts"] = {}
        for name, (method, of) in kinds.items():
            few, more = counted(method, of(FEW)), counted(method, of(2 * FEW))
            step = [(a - b) / FEW for a, b in zip(more, few)]
            found["counts"][name] = step
            if name == "fit":
                start = [a - FEW * b for a, b in zip(few, step)]
                found["counts"]["start"] = start
    return found


class Clock:
    """Processor time, lap by lap."""

    def __init__(self, times):
        self.times = times
        self.begin()

    def begin(self):
        self.since = time.process_time()

    def lap(self, name):
        now = time.process_time()
        self.times[name], self.since = now - self.since, now


def timed(method, arguments):
    """Processor time of a step, the median, and of all before the first."""
    # The class of all steps, in which no file of Keras's has its name.
    kind = type(method.__self__.test_function)
    stamps = []
    step = kind.__call__

    def stamped(self, data):
        stamps.append(time.process_time())
        return step(self, data)

    kind.__call__ = stamped
    before = time.process_time()
    try:
        method(**arguments, verbose=0)
    finally:
        kind.__call__ = step
    laps = [b - a for a, b in zip(stamps, stamps[1:])]
    return statistics.median(laps), stamps[0] - before


def counted(method, arguments):
    """Collectives, and the bytes handed in and brought, of a call."""
    import alike

    with alike.traffic() as traffic:
        method(**arguments, verbose=0)
    log = traffic.log
    return len(log), sum(e[2] for e in log), sum(e[3] for e in log)


def resident():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return min(pages * resource.getpagesize(), peak * 1024)


def print_tables(found):
    names = list(COLUMNS)
    units = [f"{name}, {COLUMNS[name][0]}" for name in names]
    print_row("layout", "N", *units)
    print_row(*["---"] * (len(names) + 2))
    for each in found:
        print_row(
            each["layout"],
            each["size"],
            *(
                f"{each['times'][name] * COLUMNS[name][1]:.1f}"
                for name in names
            ),
        )
    print()
    print("Collectives, bytes handed in, bytes brought:")
    print()
    print_row("layout", "N", *COUNTED.values())
    print_row(*["---"] * (len(COUNTED) + 2))
    for each in found:
        counts = [each["counts"][name] for name in COUNTED]
        texts = [f"{n:.4g}, {a:.0f}, {b:.0f}" for n, a, b in counts]
        print_row(each["layout"], each["size"], *texts)


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
