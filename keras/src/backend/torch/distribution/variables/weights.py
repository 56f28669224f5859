"""Weights: tensors that show their whole shape, and store our shard.

A `ShardedTensor` is a DTensor, so that it has a mesh and placements, and none
in what torch does with it: each torch function that is handed one, by whomever,
goes through `weight_functions`. So it is in a script what it is in a layer, and
what is computed from it is one device's.
"""

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution.ops import operators
from keras.src.backend.torch.distribution.private import as_torch_has_it
from keras.src.backend.torch.distribution.private import is_in_transform
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.variables import weight_entries
from keras.src.backend.torch.distribution.variables import weight_functions

PRINTED = {"__repr__", "__format__"}
ASKED_OF_VIEWS = operators.QUESTIONS - PRINTED - {"backward"}
DETACH = torch.ops.aten.detach.default


def leaves_to(types):
    """Whether another class of tensors runs a function that mixes them."""
    return any(getattr(each, "holds_global_rows", False) for each in types)


def stored(x, context):
    """A DTensor as a weight. Shares its memory."""
    layout = laid_out.layout_of(x)
    layout = layout._replace(kind=ShardedTensor, context=context)
    return layout.wrap(x._local_tensor)


class ShardedTensor(DTensor):
    """A weight, its gradient, or what was computed of them entry by entry.

    It is never partial for its reader: what it holds may be a sum that is not
    taken over data shards yet (see `accumulation`), which is taken by whatever
    reads a number of it.

    Collective: every process of its mesh reads its numbers, by whatever
    function, in the same order. To print it does not communicate.

    Attributes:
        context: the `Context` that it was made under, or None.
    """

    context = None

    @property
    def sharding(self):
        return laid_out.layout_of(self)

    @property
    def shape(self):
        return self._spec.tensor_meta.shape

    @property
    def ndim(self):
        return len(self._spec.tensor_meta.shape)

    @property
    def dtype(self):
        return self._local_tensor.dtype

    @property
    def device(self):
        return self._local_tensor.device

    @property
    def requires_grad(self):
        with as_torch_has_it():
            return torch.Tensor.requires_grad.__get__(self)

    @requires_grad.setter
    def requires_grad(self, value):
        with as_torch_has_it():
            torch.Tensor.requires_grad.__set__(self, value)

    @property
    def grad(self):
        """The gradient, laid out as the weight is."""
        with as_torch_has_it():
            grad = torch.Tensor.grad.__get__(self)
        if grad is not None and type(grad) is not ShardedTensor:
            # A hook of the program's own has put a plain one here.
            self.grad = grad
            return self.grad
        return grad

    @grad.setter
    def grad(self, value):
        if isinstance(value, torch.Tensor):
            value = weight_functions.laid_out_as(value, self)
        with as_torch_has_it():
            torch.Tensor.grad.__set__(self, value)

    @property
    def data(self):
        # What is written into it changes no version.
        self._hand_out()
        return self.sharding.wrap(self._local_tensor.data)

    @data.setter
    def data(self, value):
        value = weight_functions.laid_out_as(value, self)
        self._local_tensor.data.copy_(value._local_tensor)
        self._hand_out()

    def _hand_out(self):
        parts = self.__dict__.setdefault(marks.PARTS, {})
        parts[marks.HANDED_OUT] = True

    def whole(self):
        """All of it, plain; autograd differentiates it.

        Collective: every process of the mesh calls it.
        """
        return laid_out.whole(self)

    def full_tensor(self, *, grad_placements=None):
        return laid_out.whole(self)

    def views(self, result, whole):
        """What a function of the whole value returned: a `View`, where it
        shares memory with that value."""
        if type(result) in (tuple, list):
            return type(result)(self.views(x, whole) for x in result)
        if (
            type(result) is not torch.Tensor
            or is_in_transform()
            or not laid_out.same_memory(result, whole)
        ):
            return result
        return View.of(self, result, whole)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if leaves_to(types):
            return NotImplemented
        return weight_functions.run(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # What asks for no `__torch_function__`: autograd, and what torch
        # implements in C.
        if func is DETACH:
            # Each gradient that arrives is.
            (x,) = args
            result = cls(x._local_tensor.detach(), x._spec, requires_grad=False)
            result.context = x.context
            return result
        return weight_functions.run(func, args, kwargs or {}, dispatched=True)

    def __repr__(self):
        # Printing must not communicate: often only one process prints.
        name = "Parameter" if getattr(self, "_is_param", False) else "Tensor"
        return (
            f"Sharded{name}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"placements={self.placements}, "
            f"local shape={tuple(self._local_tensor.shape)})"
        )

    def __format__(self, specification):
        return format(repr(self), specification)

    def __deepcopy__(self, memo):
        copy = self.sharding.wrap(self._local_tensor.detach().clone())
        if getattr(self, "_is_param", False):
            copy = torch.nn.Parameter(copy, requires_grad=self.requires_grad)
            copy.context = self.context
        else:
            copy.requires_grad = self.requires_grad
        if self.grad is not None:
            copy.grad = self.grad.__deepcopy__(memo)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol):
        """In a file it is what one device has there.

        Collective: every process of the mesh calls it.
        """
        value = self.detach().whole()
        if getattr(self, "_is_param", False):
            value = torch.nn.Parameter(value, requires_grad=self.requires_grad)
        return value.__reduce_ex__(protocol)


class View(torch.Tensor):
    """A part of the whole value of a weight, such as `weight[0]`.

    It has the numbers of a copy, which follow the weight's: what is written
    into it is written into the weight.
    """

    weight_of = True

    @staticmethod
    def of(weight, part, whole):
        view = part.as_subclass(View)
        view.weight, view.gathered = weight, whole
        view.version = weight._local_tensor._version
        return view

    def plain(self):
        """The same numbers in a plain tensor.

        Collective, if the weight has changed: every process calls it.
        """
        with as_torch_has_it():
            if self.version != self.weight._local_tensor._version:
                with torch.no_grad():
                    self.gathered.copy_(self.weight.detach().whole())
                self.version = self.weight._local_tensor._version
            return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if leaves_to(types):
            return NotImplemented
        name = operators.name_of(func)
        if name in ASKED_OF_VIEWS:
            with as_torch_has_it():
                return func(*args, **(kwargs or {}))
        target = args[0] if args else None
        is_view = isinstance(target, View)
        writes = is_view and operators.is_in_place(func)
        if writes and torch.is_grad_enabled() and target.weight.requires_grad:
            raise RuntimeError(
                "a view of a leaf Variable that requires grad is being used in "
                "an in-place operation."
            )
        args, kwargs = weight_functions.plain((args, kwargs or {}))
        result = func(*args, **kwargs)
        if writes:
            with torch.no_grad():
                weight_entries.write(target.weight, target.gathered)
            target.version = target.weight._local_tensor._version
            return target
        return (
            target.weight.views(result, target.gathered) if is_view else result
        )
