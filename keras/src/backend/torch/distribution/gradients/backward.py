"""One backward pass: what it meets, reduces and writes."""

import dataclasses
import weakref

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution.gradients import buckets
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import laid_out
from keras.src.backend.torch.distribution.tensors import sharded

# In place of a parameter's number, where a bucket has how many processes have
# met something else than was predicted.
SURPRISE = -1


class Share:
    """A gradient in `.grad` that is not, or not all, reduced.

    Attributes:
        total: weak reference to it. Whoever sets another, or None, drops the
            share with it.
        reduced: the part that is, None for none.
    """

    def __init__(self, total, reduced, local):
        self.total = weakref.ref(total)
        self.reduced = reduced
        self._local = None if reduced is None else local

    @property
    def local(self):
        """The local part, as a plain tensor."""
        if self.reduced is not None:
            return self._local
        total = self.total()
        if isinstance(total, DTensor):
            return sharded.local_of(total)
        return total


@dataclasses.dataclass
class Arrived:
    """A gradient that this pass has met.

    Attributes:
        kept: what `.grad` had of earlier passes, or None. It has been reduced:
            only the new part is to be.
        new: the gradient of this process, None once its bucket has it.
    """

    kept: torch.Tensor | None
    new: torch.Tensor | None = None


class Pass:
    """One backward pass: of `backward()`, which accumulates gradients into
    `.grad`, or of `grad()`, which returns them.

    Attributes:
        reducer: the `Reducer`.
        weight: float, of our rows among those of all data shards.
        differentiable: whether what is reduced is differentiated again.
        defers: whether gradients are left local.
        accumulates: whether a gradient has been accumulated: `backward()` runs.
        numbers: tuple, of the parameters that are predicted to arrive.
        schedule: the `buckets.Schedule` of them.
        arrived: dict from numbers of parameters to `Arrived`.
        returned: dict from numbers to weak references to what `grad()` returns.
        reduced: dict from numbers to reduced gradients.
    """

    def __init__(self, reducer):
        self.reducer = reducer
        self.weight = rows.weight(reducer.context)
        # With `create_graph=True`, autograd runs hooks under grad mode, and
        # gradients are used at once.
        self.differentiable = torch.is_grad_enabled()
        self.defers = reducer.defers and not self.differentiable
        self.accumulates = False
        self.numbers = () if self.defers else reducer.predict()
        self.schedule = buckets.Schedule(reducer.plan(self.numbers))
        self.arrived, self.returned, self.reduced = {}, {}, {}

    def arrive(self, number, parameter, grad):
        """A gradient, before it is accumulated or returned.

        Returns:
            What stands for it from here on, None for itself.
        """
        arrived = self.arrived.setdefault(number, Arrived(None))
        if parameter.grad is not None:
            arrived.kept = parameter.grad
            parameter.grad = None
        laid_out = _laid_out(grad, parameter)
        if self.accumulates:
            return None if laid_out is grad else laid_out
        # Nothing tells whether this is `grad()`, until something has been
        # accumulated. `grad()` returns this very copy: into it goes, at the
        # end, what was reduced.
        copy = laid_out.clone()
        arrived.new = laid_out
        self.returned[number] = weakref.ref(copy)
        return copy

    def ready(self, number, parameter):
        """A gradient that has been accumulated."""
        self.accumulates = True
        self.returned.pop(number, None)
        self.arrived[number].new = parameter.grad
        for bucket in self.schedule.fill(number):
            self._start(bucket)

    def _start(self, bucket):
        grads = {}
        for number in bucket.numbers:
            arrived = self.arrived.get(number)
            if arrived is not None and arrived.new is not None:
                grads[number] = self._local(arrived.new)
                arrived.new = None
        owed = {n: self._owed(n) for n in bucket.numbers}
        if SURPRISE in owed:
            surprised = torch.tensor([float(not self._is_as_predicted())])
            owed[SURPRISE] = [surprised.to(bucket.dtype)]
        arguments = grads, self.weight, self.reducer.context.data_group, owed
        if self.differentiable:
            with torch.enable_grad():
                self.reduced |= buckets.reduce(bucket, *arguments)
        else:
            bucket.start(*arguments)
        for number in grads:
            self.reducer.parameter(number).grad = None

    def _local(self, grad):
        if not isinstance(grad, DTensor):
            return grad
        if self.differentiable:
            with torch.enable_grad():
                return laid_out.Local.apply(grad)
        return sharded.local_of(grad)

    def _owed(self, number):
        """What earlier passes have left local and this one completes."""
        if self.returned:
            return ()
        owed, share = [self._accumulated(number)], self._share(number)
        if share is not None:
            owed.append(share.local)
        return [x for x in owed if x is not None]

    def _accumulated(self, number):
        # What `create_graph=True` is for uses the gradients of this pass.
        return None if self.differentiable else self.reducer.owed.get(number)

    def _share(self, number):
        """The `Share` that is in `.grad`, None if none is."""
        share = self.reducer.shares.get(number)
        if share is None:
            return None
        parameter = self.reducer.parameter(number)
        grad = None if parameter is None else self._kept(number, parameter)
        return share if grad is not None and share.total() is grad else None

    def _kept(self, number, parameter):
        """What `.grad` had before this pass, or has still."""
        arrived = self.arrived.get(number)
        if arrived is None or arrived.kept is None:
            return parameter.grad
        return arrived.kept

    def finish(self):
        """Reduces what has not been, and writes it where the program reads it.

        Collective, but where gradients are left local: every process of the
        data axis calls it at the end of a pass.
        """
        reducer = self.reducer
        if self.defers and not self.returned:
            with torch.no_grad():
                self._leave_local()
            return
        for bucket in self.schedule.rest():
            self._start(bucket)
        reached, error = self.numbers, None
        if not self._all_as_predicted():
            replaced = [n for n, c in self.returned.items() if c() is None]
            reached, error = reducer.agree(
                self.arrived, self.returned, replaced
            )
            surprises = [n for n in reached if n not in self.schedule]
            for bucket in self.schedule.rest(reducer.buckets(surprises)):
                self._start(bucket)
        self._finish_started()
        with torch.set_grad_enabled(self.differentiable):
            self._write(set(reached))
        reducer.remember(reached)
        if error is not None:
            raise error

    def waits_for(self):
        """What is reduced first of what is not yet, in words: `mesh.watch`."""
        for bucket in self.schedule.started:
            if bucket.buffer is not None:
                return self.reducer.in_words(bucket.numbers)
        return None

    def _is_as_predicted(self):
        """Whether this process has met what was predicted, and all have agreed
        on that before."""
        return (
            not self.returned
            and tuple(sorted(self.arrived)) == self.numbers
            and self.reducer.is_agreed(self.numbers)
        )

    def _all_as_predicted(self):
        """Whether all processes have, as far as a bucket says."""
        if SURPRISE not in self.schedule:
            return False
        self._finish_started()
        return not self.reduced.pop(SURPRISE).any()

    def _finish_started(self):
        if self.differentiable:
            return
        for bucket in self.schedule.started:
            if bucket.work is not None:
                self.reduced.update(bucket.finish())

    def _write(self, reached):
        for number, reduced in self.reduced.items():
            parameter = self.reducer.parameter(number)
            if parameter is None:
                continue
            # What this pass did not reach here has kept its gradient.
            kept = self._kept(number, parameter)
            if number not in reached or self.returned:
                parameter.grad = kept
            else:
                share = self._share(number)
                if share is not None:
                    kept = share.reduced
                grad = self._like(reduced, parameter)
                parameter.grad = grad if kept is None else kept + grad
                self.reducer.shares.pop(number, None)
                if self._accumulated(number) is not None:
                    self.reducer.owed.pop(number).zero_()
            copy = self.returned.get(number, _no_copy)()
            if copy is not None:
                copy.copy_(self._like(reduced, parameter))

    def _leave_local(self):
        for number, arrived in self.arrived.items():
            if arrived.new is None:
                continue
            parameter = self.reducer.parameter(number)
            local = collectives.weighted(self._local(arrived.new), self.weight)
            reduced, share = arrived.kept, self._share(number)
            if share is not None:
                reduced, local = share.reduced, share.local + local
            total = self._like(local, parameter)
            if reduced is not None:
                total = reduced + total
            parameter.grad = total
            self.reducer.shares[number] = Share(total, reduced, local)

    def _like(self, local, parameter):
        """A local gradient, laid out as its parameter."""
        if not isinstance(parameter, DTensor):
            return local
        return laid_out.layout_of(parameter).carry(local)


def _laid_out(grad, parameter):
    """A gradient, cut as its parameter is.

    Collective along model axes where it was not, and partial.
    """
    if not isinstance(parameter, DTensor):
        return grad
    return laid_out.lay_out(grad, laid_out.layout_of(parameter))


def _no_copy():
    return None
