"""One backward pass: what it meets, reduces and writes."""

import weakref

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import buckets
from keras.src.backend.torch.distribution import rows
from keras.src.backend.torch.distribution import sharded


class Pass:
    """One backward pass: of `backward()`, which accumulates gradients into
    `.grad`, or of `grad()`, which returns them."""

    def __init__(self, reducer):
        self.reducer = reducer
        self.weight = rows.weight(reducer.context)
        # With `create_graph=True`, autograd runs hooks under grad mode.
        self.differentiable = torch.is_grad_enabled()
        self.accumulates = False
        self.kept = {}  # number -> gradient of earlier passes
        self.grads = {}  # number -> local gradient, until its bucket starts
        self.returned = {}  # number -> weak reference to what `grad()` returns
        self.reached = set()
        self.buckets = reducer.plan(reducer.predict())
        self.bucket_of = {
            number: bucket
            for bucket in self.buckets
            for number in bucket.numbers
        }
        self.missing = {id(b): len(b.numbers) for b in self.buckets}
        self.started = 0
        self.reduced = {}  # number -> reduced gradient

    def arrive(self, number, parameter, grad):
        """A gradient, before it is accumulated or returned.

        Returns:
            What stands for it from here on, None for itself.
        """
        self.reached.add(number)
        # What earlier passes left has been reduced: only the new part is.
        if parameter.grad is not None:
            self.kept[number] = parameter.grad
            parameter.grad = None
        if self.accumulates:
            return None
        # Nothing tells whether this is `grad()`, until something has been
        # accumulated. `grad()` returns this very copy: into it goes, at the
        # end, what was reduced.
        copy = grad.clone()
        self.grads[number] = grad
        self.returned[number] = weakref.ref(copy)
        return copy

    def ready(self, number, parameter):
        """A gradient that has been accumulated."""
        self.accumulates = True
        self.returned.pop(number, None)
        self.grads[number] = parameter.grad
        bucket = self.bucket_of.get(number)
        if bucket is None:
            return
        self.missing[id(bucket)] -= 1
        while (
            self.started < len(self.buckets)
            and not self.missing[id(self.buckets[self.started])]
        ):
            self._start(self.buckets[self.started])
            self.started += 1

    def _start(self, bucket):
        grads = {
            number: self._local(self.grads.pop(number))
            for number in bucket.numbers
            if number in self.grads
        }
        group = self.reducer.group
        if self.differentiable:
            with torch.enable_grad():
                self.reduced |= buckets.reduce(
                    bucket, grads, self.weight, group
                )
        else:
            bucket.start(grads, self.weight, group)
        for number in grads:
            self.reducer.parameter(number).grad = None

    def _local(self, grad):
        if not isinstance(grad, DTensor):
            return grad
        if self.differentiable:
            with torch.enable_grad():
                return sharded.Leave.apply(grad)
        return sharded.local_of(grad)

    def finish(self):
        reducer = self.reducer
        for bucket in self.buckets[self.started :]:
            self._start(bucket)
        replaced = [n for n, copy in self.returned.items() if copy() is None]
        reached, error = reducer.agree(self.reached, self.returned, replaced)
        surprises = [n for n in reached if n not in self.bucket_of]
        extra = reducer.buckets(surprises)
        for bucket in extra:
            self._start(bucket)
        if not self.differentiable:
            for bucket in (*self.buckets, *extra):
                self.reduced.update(bucket.finish())
        with torch.set_grad_enabled(self.differentiable):
            self._write(set(reached))
        reducer.remember(reached)
        if error is not None:
            raise error

    def _write(self, reached):
        for number, reduced in self.reduced.items():
            parameter = self.reducer.parameter(number)
            if parameter is None:
                continue
            # What this pass did not reach here has kept its gradient.
            kept = self.kept.pop(number, parameter.grad)
            if number not in reached or self.returned:
                parameter.grad = kept
            else:
                grad = self._like(reduced, parameter)
                parameter.grad = grad if kept is None else kept + grad
            copy = self.returned.get(number, _no_copy)()
            if copy is not None:
                copy.copy_(self._like(reduced, parameter))

    def _like(self, local, parameter):
        """A reduced gradient, laid out as its parameter."""
        if not isinstance(parameter, DTensor):
            return local
        make = sharded.Enter.apply if self.differentiable else sharded.wrap
        return make(
            local,
            parameter.device_mesh,
            parameter.placements,
            tuple(parameter.shape),
        )


def _no_copy():
    return None
