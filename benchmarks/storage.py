"""What a process stores: bytes of tensors, and resident memory."""

from torch.distributed.tensor import DTensor


def local_bytes(tensors):
    """Bytes of the storages behind `tensors` on this process, each once."""
    sizes = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        storage = tensor.detach().untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def stored_bytes(variant):
    """Parameters, gradients and optimizer state that this process holds.

    Args:
        variant: a `Variant` that has taken a step.

    Returns:
        Dict of bytes.
    """
    parameters = variant.parameters()
    gradients = [p.grad for p in parameters if p.grad is not None]
    return {
        "parameters": local_bytes(parameters),
        "gradients": local_bytes(gradients),
        "optimizer": local_bytes(variant.optimizer_tensors()),
    }


def resident_bytes():
    return _status("VmRSS")


def peak_resident_bytes():
    """The most since the process began or since `reset_peak`."""
    return _status("VmHWM")


def reset_peak():
    """Makes the present resident memory the peak; Linux only."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status(field):
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")
