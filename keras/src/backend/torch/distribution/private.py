"""What this project takes from torch that torch has no public name for.

Everything that another version of torch may rename stands here, with what it is
for and what may follow it. It is all there in torch 2.13, 2.14 and 2.15. Beside
these, tensors are asked for `_version` and `_base`, parameters for
`_backward_hooks`, and DTensors for `_local_tensor` and `_spec`, where a call
would take longer than what is done there; `private_test` looks for these too.
"""

import json

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def _named(module, name):
    """A name of a module of torch's, or an error that says what to do."""
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"torch {torch.__version__} has no `{module}.{name}`, which "
            "`keras.distribution` stands on. Install a version of torch that "
            "this project was made for: torch>=2.13,<2.16."
        ) from error


# The public `DTensor.from_local` takes about ten times as long as the
# constructor that it ends in (40 us against 4), which counts several times for
# each layer of a step.
DTensorSpec = _named("torch.distributed.tensor._dtensor_spec", "DTensorSpec")
TensorMeta = _named("torch.distributed.tensor._dtensor_spec", "TensorMeta")

# The only placement for another order of cuts than the mesh's. It is no `Shard`
# for `is_shard`.
StridedShard = _named(
    "torch.distributed.tensor.placement_types", "_StridedShard"
)

# Within it no transformation of `torch.vmap` or `torch.func` sees what is
# computed: what communicates cannot be transformed.
outside_of_transforms = _named(
    "torch._functorch.pyfunctorch", "temporarily_clear_interpreter_stack"
)

# Within it no class of tensors has a `__torch_function__`. The one that torch's
# documentation names, `torch._C.DisableTorchFunction`, turns off modes as well.
as_torch_has_it = _named("torch._C", "DisableTorchFunctionSubclass")

# Within it neither classes of tensors nor modes have one.
without_torch_functions = _named("torch._C", "DisableTorchFunction")

# A mode that sees each operator before it runs. It has no other name; torch's
# documentation of `__torch_dispatch__` imports it from here.
DispatchMode = _named("torch.utils._python_dispatch", "TorchDispatchMode")

_resolve_process_group = _named(
    "torch.distributed.distributed_c10d", "_resolve_process_group"
)
_get_default_store = _named(
    "torch.distributed.distributed_c10d", "_get_default_store"
)
_abort_process_group = _named(
    "torch.distributed.distributed_c10d", "_abort_process_group"
)
_current_graph_task_id = _named("torch._C", "_current_graph_task_id")
_current_node = _named("torch._C", "_current_autograd_node")
_peek_interpreter_stack = _named(
    "torch._C._functorch", "peek_interpreter_stack"
)
_top_saved_tensors_hooks = _named(
    "torch._C._autograd", "_top_saved_tensors_default_hooks"
)
_engine = _named("torch.autograd", "Variable")._execution_engine


def is_in_transform():
    """Whether `torch.vmap` or `torch.func` transforms what calls this."""
    return _peek_interpreter_stack() is not None


def is_in_backward():
    """Whether autograd runs a backward pass in this thread. torch's activation
    checkpointing asks it too."""
    return _current_graph_task_id() != -1


def backward_task():
    """A number of the backward pass under way in this thread."""
    return _current_graph_task_id()


def current_node():
    """The node of autograd's graph that runs in this thread, or None."""
    return _current_node()


def run_last(node):
    """Lets a node of autograd's graph run after all others that could run,
    which have been made later. `_sequence_nr` is what the engine goes by."""
    node._set_sequence_nr(0)


def saved_tensors_hooks():
    """The innermost hooks on what autograd saves, a pair, or None."""
    return _top_saved_tensors_hooks(False)


def at_end_of_backward(function):
    """Calls a function when the backward pass under way is over, as DDP and
    FSDP2 do. torch 2.15 has `torch.autograd.graph.queue_callback`."""
    _engine.queue_callback(function)


def store_of_all():
    """The store in which the processes of a job have found each other."""
    return _get_default_store()


def local_tensor(x):
    """What this process holds of a DTensor, without autograd; shares its
    memory. `to_local` says the same under `no_grad`, in four times the time,
    but for parameters: those it gives a view that is a parameter too."""
    local = x._local_tensor
    if type(local) is torch.Tensor:
        return local
    # It may be on its way.
    with torch.no_grad():
        return x.to_local()


def storage_key(storage):
    """What tells a storage from others as long as it lives: each time that it
    is asked for, torch makes another Python object of it."""
    return storage._cdata


def join_fake_group(world_size, rank):
    """Makes this process one of a group whose others are not there. torch's
    own tests do it so."""
    # Here, as it is of torch's tests. It registers the backend of this name.
    store = _named("torch.testing._internal.distributed.fake_pg", "FakeStore")
    dist.init_process_group(
        "fake", store=store(), rank=rank, world_size=world_size
    )


def group_of(name):
    """The process group of a name, by which DTensor knows its groups."""
    return _resolve_process_group(name)


def abort_groups():
    """Ends all process groups at once, whatever the others do. NCCL ends them
    one after the other only where all processes do."""
    _abort_process_group()


# What torch's flight recorder has written down, by backend; a build without
# CUDA has none of NCCL's.
_TRACES = [
    trace
    for trace in (
        getattr(torch._C._distributed_c10d, name, None)
        for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    )
    if trace is not None
]


def collective_under_way():
    """The collective that this process has begun first of those that it still
    waits for, such as `"all_reduce of (8, 16) float"`; None if torch has not
    written it down. Any thread may ask."""
    for trace in _TRACES:
        entries = json.loads(trace(True, True)).get("entries", ())
        for entry in entries:
            if entry["retired"] or entry["state"] == "completed":
                continue
            operation = entry["profiling_name"].partition(":")[2]
            sizes = " and ".join(
                str(tuple(size)) for size in entry["input_sizes"]
            )
            kinds = ", ".join(sorted(set(entry["input_dtypes"]))).lower()
            return f"{operation} of {sizes} {kinds}"
    return None


def forget_groups(mesh):
    """Drops what a torch mesh holds of its process groups, for
    `torch.compile`. Those of one mesh cannot be ended in public."""
    mesh._pg_registry.clear()


def implicit_replication():
    """Whether plain tensors may meet DTensors."""
    return DTensor._op_dispatcher._allow_implicit_replication


def allow_implicit_replication(value):
    """Lets plain tensors meet DTensors, or not. The public context manager
    (`torch.distributed.tensor.experimental.implicit_replication`) sets it to
    False at its end, whatever it was."""
    DTensor._op_dispatcher._allow_implicit_replication = value
