"""Counts the collectives a piece of code issues, and the bytes they carry.

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

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

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

# What a process hands in, by the argument's name in the operators' schemas.
INPUTS = (
    "input",
    "inputs",
    "input_tensor",
    "input_tensors",
    "input_list",
    "tensor",
    "tensors",
)


class CollectiveCounter(TorchDispatchMode):
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
        kwargs = kwargs or {}
        if func.namespace in NAMESPACES:
            self._count(func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        if name in SILENT:
            return
        name = name.rstrip("_")
        name = NAMES.get(name, name)
        self.calls[name] += 1
        if name != "barrier":
            self.bytes[name] += input_bytes(func._schema, args, kwargs)


def input_bytes(schema, args, kwargs):
    """Bytes of the input tensors of one call of a collective's operator."""
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, args)), **kwargs}
    value = next(given[name] for name in INPUTS if name in given)
    return sum(t.numel() * t.element_size() for t in flatten(value))


def flatten(value):
    """The tensors of a nested list of tensors."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in flatten(item)]
