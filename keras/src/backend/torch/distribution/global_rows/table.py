"""What a torch function does when it is handed the global batch.

Of each function that is in here a rule tells on which arguments, and which dims
of rows, it gives local rows of what one device computes if it runs on these. In
all other cases, and for all other functions, it runs on all rows, gathered. So
what is missing costs time, never a number; what is here is proven by a test,
function by function (`table_test`).

A rule takes the function and its arguments, and returns its result or
`NotImplemented`. Arguments are found by name and position, as the function's
signature has them: what a rule does not know of makes it give way.
"""

import functools
import logging

import torch

from keras.src.backend.common import KerasVariable
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.global_rows import aliases
from keras.src.backend.torch.distribution.global_rows import carrier
from keras.src.backend.torch.distribution.global_rows.carrier import (
    GlobalTensor,
)
from keras.src.backend.torch.distribution.global_rows.carrier import is_rows
from keras.src.backend.torch.distribution.global_rows.carrier import leaf_of_all
from keras.src.backend.torch.distribution.global_rows.carrier import map_tensors
from keras.src.backend.torch.distribution.global_rows.carrier import whole
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.private import is_in_transform

logger = logging.getLogger("keras.distribution")

RULES = {}


def rule(functions, **options):
    """Registers a rule for functions of these names."""

    def register(function):
        for name in functions.split():
            if options:
                RULES[name] = lambda f, a, k, o=options: function(f, a, k, **o)
            else:
                RULES[name] = function
        return function

    return register


def run(func, types, args, kwargs):
    """A torch function that is handed a `GlobalTensor`.

    Collective along the data axis where it gathers.
    """
    for each in types:
        if each is not GlobalTensor and issubclass(each, KerasVariable):
            args, kwargs = _values((args, kwargs))
            break
    for x in args:
        if type(x) is GlobalTensor:
            local = x.local
            if (
                x._whole is not None
                or local._base is not None
                or marks.FOLLOWED in local.__dict__
            ):
                aliases.settle(x)
        elif type(x) in (list, tuple):
            map_tensors(_settle, x)
    if kwargs:
        map_tensors(_settle, kwargs)
    name = func.__name__
    y = _run(func, name, args, kwargs)
    if is_in_place(name) or "out" in kwargs:
        written = kwargs.get("out", args[0] if args else None)
        map_tensors(_tell, [written])
    return y


def _settle(x):
    if type(x) is GlobalTensor:
        aliases.settle(x)


def _tell(x):
    if type(x) is GlobalTensor:
        aliases.written_into(x)


def _run(func, name, args, kwargs):
    rule = RULES.get(name)
    if rule is not None and not is_in_transform():
        if not args and "input" in kwargs and name != "where":
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)  # It comes first.
        y = rule(func, args, kwargs)
        if y is not NotImplemented:
            return y
    return on_all_rows(func, name, args, kwargs)


carrier.dispatch[0] = run


def on_all_rows(func, name, args, kwargs):
    """A function on gathered tensors; what it returns is plain.

    Collective along the data axis.
    """
    _log(name)
    if not is_in_place(name) and "out" not in kwargs:
        boxes = []

        def gather(x):
            if type(x) is GlobalTensor:
                boxes.append(x)
            return whole(x)

        args, kwargs = map_tensors(gather, (args, kwargs))
        y = func(*args, **kwargs)
        aliases.follow(y, boxes)
        return y
    return _in_place_on_all_rows(func, args, kwargs)


def _in_place_on_all_rows(func, args, kwargs):
    targets = []

    def enter(x):
        if type(x) is not GlobalTensor:
            return x
        # A copy of our part: autograd may need what was gathered.
        y = whole(x).clone()
        targets.append((x, y, y._version))
        return y

    new_args, new_kwargs = map_tensors(enter, (args, kwargs))
    result = func(*new_args, **new_kwargs)
    for x, y, version in targets:
        if y._version == version:
            continue
        if y.shape != x.shape:
            raise NotImplementedError(
                f"'{func.__name__}' changes the shape of a tensor in place, "
                "which holds rows of the global batch. Use a function that "
                "returns a new tensor."
            )
        aliases.write(x, y)
        if not aliases.is_followed(x):
            carrier.keep(x, y)
    back = {id(y): x for x, y, _ in targets}
    return map_tensors(lambda y: back.get(id(y), y), result)


@functools.cache
def is_in_place(name):
    """Whether a torch function of this name writes into its first argument."""
    if name.startswith("__"):
        return name == "__setitem__" or (
            name.startswith("__i")
            and name not in ("__invert__", "__int__", "__index__", "__iter__")
        )
    return name.endswith("_") and name != "requires_grad_"


def _values(structure):
    """Variables, as what they hold."""
    if isinstance(structure, KerasVariable):
        return structure.value
    if type(structure) in (list, tuple):
        return type(structure)(map(_values, structure))
    if type(structure) is dict:
        return {name: _values(x) for name, x in structure.items()}
    return structure


def _log(name):
    """Says once for a distribution what is gathered."""
    if modes.step is None or not logger.isEnabledFor(logging.INFO):
        return
    key = (name, getattr(modes.layer, "path", None))
    if modes.step.context.says_first("on all rows", *key):
        logger.info(
            "'%s' in layer '%s' runs on all rows of the batch, gathered on "
            "every data shard",
            *key,
        )


# ---- arguments ---------------------------------------------------------------

ALIASES = {
    "x": "input",
    "self": "input",
    "axis": "dim",
    "keepdims": "keepdim",
    "axes": "dims",
}


split = functools.cache(str.split)


def bind(names, args, kwargs):
    """Arguments by name; None if there are others than these names."""
    names = split(names)
    if len(args) > len(names):
        return None
    bound = dict(zip(names, args))
    for name, x in kwargs.items():
        name = name if name in names else ALIASES.get(name, name)
        if name not in names or name in bound:
            return None
        bound[name] = x
    return bound


def tensors_of(args, kwargs):
    """The tensors among arguments; None if some are in a list."""
    found = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)) and any(
            isinstance(e, torch.Tensor) for e in x
        ):
            return None
    return found


def with_tensors(args, kwargs, new):
    """The arguments with other tensors in the place of theirs."""
    new = iter(new)
    pick = lambda x: next(new) if isinstance(x, torch.Tensor) else x
    return tuple(map(pick, args)), {k: pick(x) for k, x in kwargs.items()}


def dims_of(where, ndim):
    """Dims as ints from 0 on; all for None, None for what is no dim."""
    if where is None:
        return list(range(ndim))
    if type(where) is int:
        if -ndim <= where < ndim:
            return [where % ndim]
        return None if ndim or where not in (-1, 0) else [0]
    where = where if isinstance(where, (list, tuple)) else [where]
    if any(type(d) is not int or not -ndim <= d < max(ndim, 1) for d in where):
        return None
    return [d % ndim if ndim else 0 for d in where]


def align(tensors, ndim):
    """Rows, their dim after broadcasting to `ndim` dims, and local operands.

    The first operand with rows decides. Others with the same rows there are
    local; a whole one is cut if it has all rows there.

    Returns:
        None if an operand is neither whole nor of these rows in this dim; such
        ones are gathered.

    Collective along the data axis where operands are gathered.
    """
    first = next(x for x in tensors if is_rows(x))
    rows, dim = first.rows, first.at + ndim - first.ndim
    local = []
    for x in tensors:
        if type(x) is GlobalTensor:
            if x.rows is rows and x.at is not None:
                if x.at + ndim - x.ndim == dim:
                    local.append(x.local)
                    continue
            x = whole(x)
        x = leaf_of_all(x, rows)
        at = dim - (ndim - x.ndim)
        if at >= 0 and x.shape[at] != 1:
            if x.shape[at] != rows.total:
                return None  # One row is broadcast, or it is an error.
            x = rows.cut(x, at)
        elif at >= 0 and rows.total == 1:
            x = rows.cut(x, at)
        local.append(x)
    return rows, dim, local
