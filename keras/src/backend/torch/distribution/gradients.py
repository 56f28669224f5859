"""Gradients over data shards: bucketed, reduced while backward still runs.

Hooks on the parameters do it, so a custom `train_step` and a hand-written loop
are right without knowing about it. After `backward()` returns, `p.grad` is the
mean over data shards, weighted with their rows (see `rows`).

Which parameters a backward pass reaches may differ between two passes (two
models that take turns, a branch that is not taken) and even between two
processes. The order of collectives must not. So every pass goes like this, the
same on all processes:

1. From the passes so far, which all processes know, the parameters of this one
   are predicted. Their buckets are reduced in a fixed order, each as soon as it
   is full; at the end of backward the others follow, with zeros for what has no
   gradient here.
2. One small collective tells which parameters had a gradient anywhere.
3. Those that nobody predicted are reduced. Those without a gradient anywhere
   keep `grad = None`, as on one device.
"""

import collections
import functools
import weakref

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import buckets
from keras.src.backend.torch.distribution import rows
from keras.src.backend.torch.distribution import sharded

HISTORY = 16


class Reducer:
    """Reduces the gradients of the parameters of one distribution.

    Parameters are known by a number, given in the order of their creation, so
    that it is the same on all processes whatever each of them has freed.

    Collective, in the backward pass: every process of the data axis runs as
    many backward passes that reach a registered parameter.
    """

    def __init__(self, context):
        self.context = context
        self.group = context.data_group
        self._registered = 0
        self._parameters = weakref.WeakValueDictionary()
        # What a gradient of each is like, known after it has been freed too.
        self._likes = []
        self._nodes = {}
        self._history = collections.deque(maxlen=HISTORY)
        self._plans = {}
        self._pass = _no_pass

    def register(self, parameter, owner):
        """Hooks a parameter that is equal on all data shards.

        Args:
            parameter: the `torch.nn.Parameter`.
            owner: the variable that holds it. The hooks live as long.
        """
        number = self._registered
        self._registered += 1
        self._parameters[number] = parameter
        local = parameter.detach()
        if isinstance(parameter, DTensor):
            local = sharded.local_of(parameter)
        like = torch.empty(local.shape, dtype=local.dtype, device="meta")
        self._likes.append((like, local.device))
        # The node that writes `grad` holds a hook only as long as it lives
        # itself, which is as long as somebody refers to it. And it holds the
        # parameter: nobody would free the two if we did not let go.
        node = torch.autograd.graph.get_gradient_edge(parameter).node
        self._nodes[number] = node
        weakref.finalize(owner, self._nodes.pop, number).atexit = False
        reference = weakref.ref(parameter)
        node.register_prehook(lambda _: self._before(number, reference()))
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: self._after(number, parameter)
        )

    # Autograd calls the hooks. Compiled train steps would try to compile them
    # too, piece by piece: they do nothing that a compiler could make faster.
    @torch.compiler.disable
    def _before(self, number, parameter):
        current = self._pass()
        if current is None:
            current = _Pass(self)
            # Autograd alone holds the pass: if backward fails, the callback
            # never runs, and the pass is gone with it.
            self._pass = weakref.ref(current)
            # torch 2.13: there is no public way to run code at the end of a
            # backward pass; DDP and FSDP2 use this one too.
            torch.autograd.Variable._execution_engine.queue_callback(
                functools.partial(self._finish, current)
            )
        # What earlier passes left has been reduced: only the new part is.
        if parameter.grad is not None:
            current.kept[number] = parameter.grad
            parameter.grad = None

    @torch.compiler.disable
    def _after(self, number, parameter):
        current = self._pass()
        if current is not None:
            current.ready(number, parameter)

    @torch.compiler.disable
    def _finish(self, current):
        self._pass = _no_pass
        current.finish()

    def predict(self):
        """Numbers of the parameters that this pass will probably reach:
        what followed the last time the previous pass was like that one."""
        history = list(self._history)
        for i in range(len(history) - 2, -1, -1):
            if history[i] == history[-1]:
                return history[i + 1]
        return history[-1] if history else ()

    def plan(self, numbers):
        """Buckets of these parameters, kept for the next time."""
        if numbers not in self._plans:
            if len(self._plans) > HISTORY:
                self._plans.clear()
            self._plans[numbers] = self.buckets(numbers)
        return self._plans[numbers]

    def buckets(self, numbers):
        """Cuts parameters into buckets of one dtype, last created first."""
        # Whether they still live here must not matter: elsewhere they may.
        return buckets.build(
            (n, *self._likes[n]) for n in sorted(numbers, reverse=True)
        )

    def reached_anywhere(self, numbers):
        """Numbers of the parameters with a gradient on any data shard.

        Collective: every process of the data axis calls it.
        """
        flags = torch.zeros(self._registered, dtype=torch.uint8)
        flags[list(numbers)] = 1
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return tuple(flags.nonzero().flatten().tolist())

    def remember(self, reached):
        self._history.append(reached)

    def parameter(self, number):
        return self._parameters.get(number)


def _no_pass():
    return None


class _Pass:
    """One backward pass."""

    def __init__(self, reducer):
        self.reducer = reducer
        self.weight = rows.weight(reducer.context)
        self.kept = {}  # number -> gradient of earlier passes
        self.grads = {}  # number -> local gradient, until its bucket starts
        self.reached = set()
        self.buckets = reducer.plan(reducer.predict())
        self.bucket_of = {
            number: bucket
            for bucket in self.buckets
            for number in bucket.numbers
        }
        self.missing = {id(b): len(b.numbers) for b in self.buckets}
        self.started = 0

    def ready(self, number, parameter):
        grad = parameter.grad
        if isinstance(grad, DTensor):
            grad = sharded.local_of(grad)
        self.grads[number] = grad
        self.reached.add(number)
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
        bucket.start(self.grads, self.weight, self.reducer.group)
        for number in bucket.numbers:
            if self.grads.pop(number, None) is not None:
                self.reducer.parameter(number).grad = None

    def finish(self):
        reducer = self.reducer
        for bucket in self.buckets[self.started :]:
            self._start(bucket)
        reached = reducer.reached_anywhere(self.reached)
        surprises = [n for n in reached if n not in self.bucket_of]
        extra = reducer.buckets(surprises)
        for bucket in extra:
            self._start(bucket)
        for bucket in (*self.buckets, *extra):
            self._write(bucket, set(reached))
        reducer.remember(reached)

    def _write(self, bucket, reached):
        for number, reduced in bucket.finish():
            parameter = self.reducer.parameter(number)
            if parameter is None:
                continue
            # What this pass did not reach here has kept its gradient.
            kept = self.kept.pop(number, parameter.grad)
            if number not in reached:
                parameter.grad = kept
                continue
            grad = _like_parameter(reduced, parameter)
            if kept is not None:
                with torch.no_grad():
                    grad = kept + grad
            parameter.grad = grad


def _like_parameter(local, parameter):
    if not isinstance(parameter, DTensor):
        return local
    return sharded.wrap(
        local,
        parameter.device_mesh,
        parameter.placements,
        tuple(parameter.shape),
    )


def to_plain(grad):
    """A hook that makes a gradient plain; see `keep_plain`."""
    return grad.full_tensor() if isinstance(grad, DTensor) else None


def keep_plain(parameter):
    """Makes the gradient of a plain parameter plain.

    Where a plain weight meets a DTensor in a layer's own code, its gradient
    arrives as a DTensor.

    Collective in the backward pass, where it arrives sharded or partial.
    """
    parameter.register_hook(to_plain)
