"""What a torch function does when it is handed shards.

torch's DTensors lack rules for many operators, or for their gradients, and
some of their rules give wrong numbers. So while layers run, every torch
function that is handed a shard goes through one table:

- functions of single numbers run on the local shards;
- functions whose rule is known to be right, forward and backward, run on
  DTensors (a test walks them);
- any other function runs on whole values: its inputs are gathered, and what it
  returns is plain.

No function hands on a partial sum.
"""

import contextlib
import logging

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from keras.src.backend.common import KerasVariable
from keras.src.backend.torch.distribution.global_rows import table
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.mesh import cuts
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.modes import handing_shards
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import sharded
from keras.src.backend.torch.distribution.tensors import trials

logger = logging.getLogger("keras.distribution")

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
# Most arguments are of one of these.
HOLD_NO_SHARD = PLAIN | {
    *(bool, int, float, str, type(None)),
    *(torch.dtype, torch.device),
}

# They ask what a tensor is, and touch no number.
QUESTIONS = frozenset(
    """
    __get__ __set__ __delete__ __len__ __hash__ __repr__ __format__ __dir__
    size dim ndimension stride numel nelement element_size get_device
    sym_numel sym_size sym_stride sym_storage_offset
    is_floating_point is_complex is_conj is_contiguous is_inference is_neg
    is_pinned is_set_to is_shared is_signed is_tensor
    data_ptr storage_offset untyped_storage dim_order requires_grad_
    retain_grad register_hook register_post_accumulate_grad_hook
    is_same_size result_type can_cast backward has_torch_function
    _is_view _is_zerotensor is_distributed has_names
    """.split()
)

# Functions of single numbers, of one tensor.
ELEMENTWISE = frozenset(
    """
    abs absolute acos acosh angle arccos arccosh arcsin arcsinh arctan arctanh
    asin asinh atan atanh bfloat16 bitwise_not bool byte ceil celu clamp
    clamp_max clamp_min clip clone conj_physical contiguous cos cosh deg2rad
    detach digamma double elu erf erfc erfinv exp exp2 expm1 fix float floor
    frac full_like gelu half hardshrink hardsigmoid hardswish hardtanh i0 int
    isfinite isinf isnan isneginf isposinf isreal leaky_relu lgamma log log10
    log1p log2 logical_not logit logsigmoid log_sigmoid long mish mvlgamma
    nan_to_num neg negative ones_like positive rad2deg reciprocal relu relu6
    round rsqrt selu sgn short sigmoid sign signbit silu sin sinc sinh softplus
    softshrink softsign sqrt square tan tanh tanhshrink threshold to trunc type
    type_as zeros_like
    """.split()
)

# DTensor's rules for them are right, forward and backward.
SHARDED = frozenset(
    """
    __add__ __and__ __eq__ __floordiv__ __ge__ __getitem__ __gt__ __iadd__
    __imul__ __isub__ __itruediv__ __le__ __lt__ __matmul__ __mul__
    __ne__ __neg__ __or__ __pow__ __radd__ __rdiv__ __rmul__ __rpow__ __rsub__
    __rtruediv__ __sub__ __truediv__ __invert__ __abs__
    add add_ sub sub_ subtract subtract_ mul mul_ multiply multiply_ div div_
    divide divide_ true_divide rsub pow square_ maximum minimum where
    eq ne lt le gt ge equal not_equal less greater less_equal greater_equal
    logical_and logical_or logical_xor addcmul addcdiv copy_ rsqrt_ sqrt_ exp_
    relu_ neg_ fill_ zero_
    matmul mm bmm linear einsum
    sum mean softmax log_softmax layer_norm
    permute transpose movedim moveaxis swapaxes swapdims t reshape view flatten
    unflatten unsqueeze squeeze expand expand_as broadcast_to concat
    concatenate cat stack split chunk narrow
    """.split()
)


# They are views, or made of views. Of a dim that several axes cut, torch 2.13
# lacks the gradient of a view.
OF_VIEWS = frozenset(
    "__matmul__ einsum flatten linear matmul reshape unflatten view".split()
)


@contextlib.contextmanager
def on_shards(context):
    """Within it, torch functions may be handed shards."""
    if modes.on_shards or not context.has_layouts:
        yield
        return
    with handing_shards(), OnShards(context):
        yield


def call_on_shards(function, *args, **kwargs):
    """Calls a loss or a metric, which may be handed shards: outputs that the
    layout map asks for.

    Collective along the model axes where a function gathers.
    """
    context = current()
    shards = []
    _find_shards((*args, *kwargs.values()), shards)
    if context is None or all(map(sharded.is_weight, shards)):
        return function(*args, **kwargs)
    with on_shards(context):
        return function(*args, **kwargs)


class OnShards(TorchFunctionMode):
    """While it is active, torch functions may be handed shards.

    Collective along the model axes where a function gathers.
    """

    def __init__(self, context):
        super().__init__()
        self.meshes = (context.model_mesh, context.mesh)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if modes.direct or _are_plain(types, args, kwargs):
            return func(*args, **kwargs)
        if GlobalTensor in types:
            # Its own table comes first: this one, for what lies in it.
            with self:
                return GlobalTensor.__torch_function__(
                    func, types, args, kwargs
                )
        if any(issubclass(each, KerasVariable) for each in types):
            # Their own way to their values passes by this table.
            args = tuple(map(_value, args))
            kwargs = {name: _value(x) for name, x in kwargs.items()}
        shards = []
        _find_shards((*args, *kwargs.values()), shards)
        name = getattr(func, "__name__", "")
        if not shards or name in QUESTIONS:
            return func(*args, **kwargs)
        if any(map(sharded.is_weight, shards)):
            # The value of a variable was read outside of layers.
            return func(*args, **kwargs)
        model_mesh, mesh = self.meshes
        meshes = {x.device_mesh for x in shards}
        if not meshes <= {model_mesh, mesh}:
            # Those of a plan that the user wrote for a torch module.
            return func(*args, **kwargs)
        if name in ELEMENTWISE and _is_of_one_tensor(args, kwargs):
            return on_local_shard(func, *args, **kwargs)
        if mesh in meshes:
            why = "it is laid out over the data axis too"
            return on_whole_values(func, args, kwargs, why)
        if name in SHARDED and _can_be_sharded(func, args, shards):
            mesh = shards[0].device_mesh
            why = trials.why_not(on_dtensors, func, args, kwargs, mesh)
            if why is None:
                return on_dtensors(func, args, kwargs, mesh)
            # An error of the program's own comes again below, in its own
            # words.
        else:
            why = "it has no rule"
        return on_whole_values(func, args, kwargs, why)


def _are_plain(types, args, kwargs):
    """Whether there is no shard among arguments. Most calls end here."""
    if not PLAIN.issuperset(types):
        return False
    if HOLD_NO_SHARD.issuperset(map(type, args)) and (
        not kwargs or HOLD_NO_SHARD.issuperset(map(type, kwargs.values()))
    ):
        return True
    # A DTensor has no function of its own, and is not among the types.
    for x in args:
        if isinstance(x, (DTensor, list, tuple)):
            return False
    if kwargs:
        for x in kwargs.values():
            if isinstance(x, (DTensor, list, tuple)):
                return False
    return True


def on_local_shard(func, x, *args, **kwargs):
    """`func` of single numbers. Does not communicate."""
    mesh, placements, shape = x.device_mesh, x.placements, tuple(x.shape)
    local = func(sharded.Leave.apply(x), *args, **kwargs)
    return sharded.Enter.apply(local, mesh, placements, shape)


def on_dtensors(func, args, kwargs, mesh):
    """`func` by DTensor's own rule; what it returns is not partial.

    Collective along the model axes where the rule asks for it.
    """

    def enter(x):
        # Its gradient must come back plain, to the plain code that made it.
        if isinstance(x, DTensor) or not x.requires_grad:
            return x
        whole = sharded.replicate(mesh)
        return sharded.Enter.apply(x, mesh, whole, tuple(x.shape))

    args, kwargs = _map(enter, (args, kwargs))
    return _map(_reduced, func(*args, **kwargs))


def _reduced(x):
    return sharded.reduced(x) if isinstance(x, DTensor) else x


def on_whole_values(func, args, kwargs, why):
    """`func` on gathered values; what it returns is plain.

    Collective along the model axes of each shard that it is handed.
    """
    log(func, why)
    target = args[0] if args else None
    args, kwargs = _map(sharded.whole, (args, kwargs))
    if not isinstance(target, DTensor) or not is_in_place(func):
        return func(*args, **kwargs)
    func(*args, **kwargs)
    mesh, shape = target.device_mesh, tuple(target.shape)
    y = sharded.Enter.apply(args[0], mesh, sharded.replicate(mesh), shape)
    y = y.redistribute(placements=target.placements)
    return target.copy_(y)


def name_of(func):
    """The name of a torch function, without that of an overload."""
    return getattr(func, "__name__", "").partition(".")[0]


def is_in_place(func):
    """Whether a torch function writes into its first argument."""
    return table.is_in_place(name_of(func))


def _value(x):
    return x.value if isinstance(x, KerasVariable) else x


def _find_shards(values, found):
    for x in values:
        if isinstance(x, DTensor):
            found.append(x)
        elif type(x) in (list, tuple):
            _find_shards(x, found)


def _is_of_one_tensor(args, kwargs):
    others = (*args[1:], *kwargs.values())
    return isinstance(args[0], DTensor) and not any(
        isinstance(x, torch.Tensor) for x in others
    )


def _can_be_sharded(func, args, shards):
    if is_in_place(func) and not isinstance(args[0], DTensor):
        return False
    if func.__name__ in OF_VIEWS and any(
        cuts.has_several_on_a_dim(x.placements) for x in shards
    ):
        return False
    # What fails on one of several unlike shards fails on that process alone,
    # and the others would wait for it.
    return not any(map(sharded.has_unlike_shards, shards))


def _map(function, structure):
    """Applies a function to the tensors of arguments or results."""
    if isinstance(structure, torch.Tensor):
        return function(structure)
    if type(structure) in (list, tuple):
        return type(structure)(_map(function, x) for x in structure)
    if type(structure) is dict:
        return {name: _map(function, x) for name, x in structure.items()}
    return structure


def log(func, why):
    """Says once for a distribution what is gathered, and why."""
    context = current()
    if context is None or not logger.isEnabledFor(logging.DEBUG):
        return
    key = (name_of(func), getattr(modes.layer, "path", None))
    if context.says_first("on whole values", *key):
        logger.debug(
            "operator %s in layer %s runs on whole values, gathered for each "
            "call: %s",
            *key,
            why.strip().partition("\n")[0][:200],
        )
