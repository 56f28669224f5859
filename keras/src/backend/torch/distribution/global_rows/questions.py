"""Rules of what asks a tensor for no number, and of its attributes."""

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_addend
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import local_of
from keras.src.backend.torch.distribution.global_rows.carrier import map_tensors
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.global_rows.table import rule


@rule(
    """
    new_empty new_full new_ones new_tensor new_zeros is_floating_point
    is_complex is_signed element_size result_type get_device
    is_contiguous is_inference is_conj is_neg is_pinned is_shared
    """
)
def question(func, args, kwargs):
    """What is the same for local rows as for all."""
    args, kwargs = map_tensors(local_of, (args, kwargs))
    return func(*args, **kwargs)


# What local rows say of all.
OF_ALL = """
    device dtype grad_dtype grad_fn is_cpu is_cuda is_ipu is_leaf is_maia
    is_meta is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse
    is_sparse_csr is_vulkan is_xla is_xpu itemsize layout name output_nr
    requires_grad retains_grad volatile _backward_hooks _grad_fn _version
"""
OF_ALL = frozenset(OF_ALL.split())


@rule("__get__")
def attribute(func, args, kwargs):
    name = func.__self__.__name__
    x = args[0]
    if name == "data" and carrier.is_global(x):
        # Not that of local rows: what was gathered must know of writes.
        return GlobalTensor(x.local.detach(), x.at, x.rows)
    if name == "nbytes":
        return x.numel() * x.dtype.itemsize
    return func(x.local) if name in OF_ALL else NotImplemented


@rule("__set__")
def set_attribute(func, args, kwargs):
    x, value = args
    if func.__self__.__name__ == "data" and carrier.is_global(x):
        if is_rows(x):
            x.local.data = carrier.cut_rows(value, x.at, x.rows)
        elif is_addend(value):
            x.local.data = value.local
        else:
            x.local.data = carrier.part_of(whole(value), x.rows)
        x._whole = None
        return None
    # A box among what torch itself holds would not be seen through.
    return func(whole(x), whole(value))


@rule("__dir__")
def of_the_box(func, args, kwargs):
    with private.as_torch_has_it():
        return func(*args, **kwargs)


@rule("is_same_size")
def is_same_size(func, args, kwargs):
    return args[0].shape == args[1].shape
