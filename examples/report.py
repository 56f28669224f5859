"""What the examples print: a line for each epoch, and who stores what."""

import torch
from torch.distributed.tensor import DTensor

import keras


def print_once(*args):
    """Prints on process 0 only. It communicates with nobody."""
    if not torch.distributed.is_initialized() or (
        torch.distributed.get_rank() == 0
    ):
        print(*args, flush=True)


class EpochLine(keras.callbacks.Callback):
    """Prints the logs of each epoch on a line, with the losses first."""

    def on_epoch_end(self, epoch, logs=None):
        names = sorted(logs, key=lambda name: "loss" not in name)
        values = (f"  {name} {logs[name]:.5f}" for name in names)
        print_once(f"epoch {epoch + 1}{''.join(values)}")


def print_storage(model):
    """Prints the shape of every variable on one device and on each process.

    Collective: every process calls it.

    Args:
        model: a compiled `keras.Model`. Its optimizer's state is counted in
            bytes, and not listed.
    """
    shapes = _gather([tuple(_local(v).shape) for v in model.variables])
    names = [f"process {i}" for i in range(len(shapes))]
    rows = [["variable", "one device", *names]]
    for i, variable in enumerate(model.variables):
        cells = [tuple(variable.shape), *(local[i] for local in shapes)]
        rows.append([variable.path, *(_format_shape(c) for c in cells)])
    rows.append([""] * len(rows[0]))
    for name, variables in (
        ("bytes of variables", model.variables),
        ("bytes of optimizer state", model.optimizer.variables),
    ):
        whole = sum(_num_bytes(v.value) for v in variables)
        held = _gather(sum(_num_bytes(_local(v)) for v in variables))
        rows.append([name, *(f"{count:,}" for count in (whole, *held))])

    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:])]
        print_once("  ".join(cells).rstrip())


def _local(variable):
    """The part of the variable that this process stores."""
    value = variable.value
    return value.to_local() if isinstance(value, DTensor) else value


def _num_bytes(tensor):
    return tensor.numel() * tensor.element_size()


def _gather(item):
    """The items of all processes, in order. Collective: all call it."""
    if not torch.distributed.is_initialized():
        return [item]
    items = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


def _format_shape(shape):
    return " x ".join(map(str, shape)) or "scalar"
