"""Peak memory of one of several processes that train a deep MLP.

    python benchmarks/peak_memory.py
    python benchmarks/peak_memory.py --only fsdp,fully_shard --layers 16

Eight dense layers of 2048 x 2048: 128 MiB of weights, 512 MiB with gradients
and Adam's slots. Each variant gets fresh processes. Printed is how much the
resident memory of process 0 grew over what it was before the model was made:
after two steps, and at the peak of the two that follow. What is freed goes
back to the system at once (`MALLOC_MMAP_THRESHOLD_`), so that resident is live.

"first" is what a model of 16 x 16, trained so before, has taken, which no
tensor does: code that is read from the disk, threads and buffers of gloo,
Python's objects. "of tensors" is the growth of the peak over that, with what
malloc keeps and Python's objects of this model, and "report" what
`keras.distribution.report` tells of the peak.
"""

import argparse
import gc
import os

import report
import storage
import torch
import torch.distributed as dist
import torch.nn.functional as F
import workloads
from processes import ProcessError
from processes import launch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

VARIANTS = {
    "one": "Keras fit, one process",
    "fsdp": "Keras fit, FSDP by layout map",
    "kept": "Keras fit, FSDP, reshard_after_forward=False",
    "fully_shard": "torch fully_shard, each layer",
    "tensor": "Keras fit, tensor parallel",
}
LAYOUTS = {
    "fsdp": {".*kernel": ("data", None), ".*bias": ("data",)},
    "kept": {".*kernel": ("data", None), ".*bias": ("data",)},
    "tensor": {
        ".*_0/kernel": (None, "model"),
        ".*_0/bias": ("model",),
        ".*_1/kernel": ("model", None),
    },
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--patience", type=int, default=300)
    options = parser.parse_args()
    # Before any process starts: malloc reads them once.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ[name] = "65536"
    report.print_environment(report.environment(options.processes))
    report.print_head(
        "",
        "variant",
        "between steps",
        "peak",
        "first",
        "of tensors",
        "report",
        "loss",
    )
    sizes = options.layers, options.width, options.batch
    for key, title in VARIANTS.items():
        if options.only and key not in options.only:
            continue
        processes = 1 if key == "one" else options.processes
        try:
            (facts,) = launch(
                worker, (key, *sizes), processes, options.patience
            )
            told = None
            if key in LAYOUTS:
                arguments = (key, *sizes, processes)
                (told,) = launch(predict, arguments, 1, options.patience)
        except ProcessError as error:
            report.print_row(key, title, f"FAILED {error}")
            continue
        between, peak, first, of_tensors, loss = facts
        report.print_row(
            key,
            title,
            f"{between / report.MIB:.0f}",
            f"{peak / report.MIB:.0f}",
            "" if first is None else f"{first / report.MIB:.1f}",
            "" if first is None else f"{of_tensors / report.MIB:.2f}",
            "" if told is None else f"{told / report.MIB:.2f}",
            f"{loss:.6f}",
        )


def worker(rank, report, key, layers, width, batch):
    # Of every variant, so that no import counts as growth.
    import keras

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, width, generator=generator)
    y = torch.randn(batch, width, generator=generator)
    # What the first steps of anything allocate once.
    nn.Linear(8, 8)(x[:, :8]).sum().backward()
    dist.all_reduce(torch.ones(1))
    gc.collect()
    before, first = storage.resident_bytes(), None
    if key == "fully_shard":
        step = torch_step(layers, width, x, y)
    else:
        if key != "one":
            set_distribution(keras, key)
        small = keras_step(keras, 2, 16, x[:, :16], y[:, :16])
        for _ in range(4):
            small()
        del small
        gc.collect()
        first = storage.resident_bytes() - before
        step = keras_step(keras, layers, width, x, y)
    step()
    step()
    gc.collect()
    between = storage.resident_bytes() - before
    dist.barrier()
    storage.reset_peak()
    step()
    loss = step()
    peak = storage.peak_resident_bytes() - before
    if rank == 0:
        report((between, peak, first, peak - (first or 0), loss))
    dist.barrier()
    dist.destroy_process_group()


def weight(index, width):
    """The initial kernel of a layer, (in, out), equal in all variants."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(width, width, generator=generator) * (2 / width) ** 0.5


def predict(rank, report, key, layers, width, batch, processes):
    """Bytes at the peak, as a report tells them."""
    import keras

    torch.set_num_threads(1)
    devices = [f"cpu:{i}" for i in range(processes)]
    facts = keras.distribution.report(
        lambda: keras_model(keras, layers, width),
        batch,
        distribution=distribution_of(keras, key, devices),
    ).facts
    weights = sum(v["stored"] for v in facts["variables"])
    report(weights + facts["slots"]["stored"] + facts["peak"])


def set_distribution(keras, key):
    keras.distribution.initialize()
    devices = keras.distribution.list_devices()
    keras.distribution.set_distribution(distribution_of(keras, key, devices))


def distribution_of(keras, key, devices):
    shape, names = (len(devices),), ["data"]
    if key == "tensor":
        shape, names = (1, len(devices)), ["data", "model"]
    mesh = keras.distribution.DeviceMesh(shape, names, devices)
    layouts = keras.distribution.LayoutMap(mesh)
    for path, axes in LAYOUTS[key].items():
        layouts[path] = axes
    distribution = keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="data"
    )
    if key == "kept":
        distribution.reshard_after_forward = False
    return distribution


def keras_model(keras, layers, width):
    model = keras.Sequential([keras.Input((width,))])
    for index in range(layers):
        last = index == layers - 1
        model.add(
            keras.layers.Dense(
                width,
                activation=None if last else "relu",
                name=f"layer{index}_{index % 2}",
                kernel_initializer="zeros",
            )
        )
        model.layers[-1].kernel.assign(weight(index, width))
    model.compile(
        optimizer=keras.optimizers.Adam(1e-5, epsilon=1e-10), loss="mse"
    )
    return model


def keras_step(keras, layers, width, x, y):
    model = keras_model(keras, layers, width)
    x, y = x.numpy(), y.numpy()
    return lambda: model.fit(
        x, y, batch_size=len(x), shuffle=False, verbose=0
    ).history["loss"][0]


def torch_step(layers, width, x, y):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential()
    for index in range(layers):
        layer = nn.Linear(width, width)
        with torch.no_grad():
            layer.weight.copy_(weight(index, width).t())
            layer.bias.zero_()
        model.append(fully_shard(layer, mesh=mesh))
        if index < layers - 1:
            model.append(nn.ReLU())
    fully_shard(model, mesh=mesh)
    adam = torch.optim.Adam(
        model.parameters(), lr=1e-5, eps=workloads.ADAM_EPSILON, fused=True
    )
    x, y = (
        t.chunk(dist.get_world_size())[dist.get_rank()].clone() for t in (x, y)
    )

    def step():
        adam.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        adam.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        return float(loss) / dist.get_world_size()

    return step


if __name__ == "__main__":
    main()
