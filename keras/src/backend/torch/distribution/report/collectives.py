"""Which operators of torch communicate, and how many bytes they carry.

```python
with CollectiveCounter() as counter:
    loss = loss_function(model(x), y)
    loss.backward()
print(counter.calls, counter.bytes)
```

Every way to communicate in torch passes the dispatcher: `dist.all_reduce` as
`c10d::allreduce_`, DTensor's and other functional collectives as
`_c10d_functional::*`, and so do the reducers of DDP and FSDP2. So one
`TorchDispatchMode` sees them all, backward included. Not seen: what runs in a
thread that a library started on its own.
"""

import collections
import math
import typing

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import private

NAMESPACES = ("c10d", "_c10d_functional")

# Operators of these namespaces that move no data.
SILENT = ("wait_tensor", "_wrap_tensor_autograd", "check_for_nan")

# One name for the in-place, functional and coalesced spellings of a
# collective; names that are not here keep the operator's own.
NAMES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "monitored_barrier": "barrier",
}

# What a process hands in and gets, by the argument's name in the operators'
# schemas.
INPUTS = (
    "input",
    "inputs",
    "input_tensor",
    "input_tensors",
    "input_list",
    "tensor",
    "tensors",
)
OUTPUTS = ("output", "outputs", "output_tensor", "output_tensors", "out")


class Call(typing.NamedTuple):
    """One call of a collective by this process.

    Attributes:
        op: string, one of the values of `NAMES` above all.
        inputs: list of the tensors that this process hands in.
        bytes: int, of them. A barrier carries none.
        group: string, the name of the process group.
        reduction: string in upper case, such as `"SUM"`, or None.
        outputs: list of the tensors that it fills, where the operator has
            arguments for them.
    """

    op: str
    inputs: list
    bytes: int
    group: str
    reduction: str | None
    outputs: list

    @property
    def sizes(self):
        """Shapes of the inputs: a tuple of tuples."""
        return tuple(tuple(x.shape) for x in self.inputs)


def call_of(func, args, kwargs):
    """The `Call` that an operator makes, None if it moves no data.

    Args:
        func, args, kwargs: what a `TorchDispatchMode` is handed.
    """
    if func.namespace not in NAMESPACES:
        return None
    name = func._schema.name.split("::")[1]
    if name in SILENT:
        return None
    name = name.rstrip("_")
    op = NAMES.get(name, name)
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args)), **(kwargs or {})}
    inputs = flatten(next(given[name] for name in INPUTS if name in given))
    outputs = flatten([given[name] for name in OUTPUTS if name in given])
    carried = sum(x.numel() * x.element_size() for x in inputs)
    group = given.get("group_name")
    if group is None:
        group = dist.ProcessGroup.unbox(given["process_group"])
    reduction = given.get("reduce_op")
    if reduction is not None and not isinstance(reduction, str):
        # A number, as operators have it.
        reduction = dist.ReduceOp.RedOpType(reduction.op()).name
    return Call(
        op,
        inputs,
        0 if op == "barrier" else carried,
        getattr(group, "group_name", group),
        reduction and reduction.upper(),
        outputs,
    )


def sent_bytes(op, carried, size):
    """What a process sends at least, in a group of so many, by the best
    algorithms for large tensors (rings).

    Args:
        op: string, of a `Call`.
        carried: int, the bytes that it hands in.
        size: int, the number of processes.
    """
    others = size - 1
    factor = {
        "all_reduce": 2 * others / size,
        "all_gather": others,
        "reduce_scatter": others / size,
        "all_to_all": others / size,
        # One of them hands it in, and each hands it on.
        "broadcast": others / size,
    }
    return math.ceil(carried * factor.get(op, min(1, others)))


class CollectiveCounter(private.DispatchMode):
    """Counts what this process communicates while the context is open.

    Attributes:
        calls: `collections.Counter`, how often each collective was called.
        bytes: `collections.Counter`, for each collective the size of the
            tensors that this process handed in, in bytes. A barrier carries
            none.
    """

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self.bytes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A mode runs before the tensor's own class does, and is off inside
        # itself. DTensor has to come first: only the operators that it
        # issues itself communicate.
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        call = call_of(func, args, kwargs)
        if call is not None:
            self.calls[call.op] += 1
            self.bytes[call.op] += call.bytes
        return func(*args, **(kwargs or {}))


def flatten(value):
    """The tensors of a nested list of tensors."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in flatten(item)]
