"""Gradients over data shards: bucketed, reduced while backward still runs.

Hooks on the parameters do it, so a custom `train_step` and a hand-written loop
are right without knowing about it. After `backward()`, `p.grad` is the mean
over data shards, weighted with their rows (see `rows`), and so is what
`torch.autograd.grad(loss, [p])` returns. The gradient of anything else, of
inputs above all, is that of this data shard's own loss. It is local, as the
loss is: of a sum over rows it is what one device gives for local rows, of a
mean over rows it is larger by (global rows) / (local rows).

Which parameters a backward pass reaches may differ between two passes (two
models that take turns, a branch that is not taken) and even between two
processes. The order of collectives must not. So every pass goes like this, the
same on all processes:

1. From the passes so far, which all processes know, the parameters of this one
   are predicted. Their buckets are reduced in a fixed order, each as soon as it
   is full; at the end of backward the others follow, with zeros for what has no
   gradient here.
2. One small collective tells which parameters had a gradient anywhere. It is
   left out on CPUs where no process has met anything else than was predicted,
   and all have agreed on that once: a number in the last bucket says so.
3. Those that nobody predicted are reduced. Those without a gradient anywhere
   keep `grad = None`, as on one device.

Where only the sum over several passes is needed (`Reducer.accumulating`), they
leave gradients local: `p.grad` is this data shard's share, weighted with its
rows, and the sum over data shards is the gradient. The next pass that reduces
completes it.

With `create_graph=True` reduced gradients can be differentiated again (see
`buckets.Reduce`).
"""

import bisect
import collections
import contextlib
import functools
import weakref
import zlib

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.gradients import buckets
from keras.src.backend.torch.distribution.gradients.backward import SURPRISE
from keras.src.backend.torch.distribution.gradients.backward import Pass
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.tensors import collectives
from keras.src.backend.torch.distribution.tensors import sharded

HISTORY = 16
# Of the flags of a pass: so much that one process may have made more variables
# than another, which train alike all the same.
FLAGS = 256
# After so many passes, processes tell which parameters still live.
PASSES = 64


class Reducer:
    """Reduces the gradients of the parameters of one distribution.

    Parameters are known by a number, given in the order of their creation, so
    that it is the same on all processes whatever each of them has freed. Those
    that none of them has any more are forgotten, by all in the same pass.

    Collective, in the backward pass: every process of the data axis runs as
    many backward passes that reach a registered parameter; one that runs more
    waits until the process group's timeout. So for `torch.autograd.grad`: what
    it asks for must reach the same parameters on all of them. Where a
    parameter is reached on some alone, all raise, since `grad` gives None on
    the others whatever a hook does; where a process reaches none at all, the
    others wait for it.
    """

    def __init__(self, context):
        self.context = context
        self._registered = 0
        self._parameters = weakref.WeakValueDictionary()
        # What a gradient of each is like, known after it has been freed too.
        self._likes = {}
        self._hooks = {}  # How many of each are none of the program's own.
        # Whether user code runs in a step, the same on all processes.
        self.is_in_step = False
        self._names = {}
        # Which numbers below `_first` are not forgotten. They come first in
        # flags, and all from `_first` on come next.
        self._kept, self._first, self._passes = [], 0, 0
        # A number of 1 to 255 of each's name and shape, as in flags.
        self._marks = bytearray()
        self._history = collections.deque(maxlen=HISTORY)
        self._plans = {}
        self._agreed = set()  # What passes have reached, as all agreed.
        self._pass = _no_pass
        self.owed, self.defers = {}, False
        self.shares = {}  # number -> `backward.Share`

    def register(self, parameter, name):
        """Hooks a parameter that is equal on all data shards.

        Args:
            parameter: the `torch.nn.Parameter`.
            name: what errors call it.

        Returns:
            The number of the parameter.
        """
        number = self._registered
        self._registered += 1
        self._parameters[number] = parameter
        setattr(parameter, marks.REDUCED, True)
        self._names[number] = name
        local = parameter.detach()
        if isinstance(parameter, DTensor):
            local = sharded.local_of(parameter)
        self._likes[number] = _like(local.shape, local.dtype), local.device
        self._marks.append(0)
        self.call(number, name)
        reference = weakref.ref(parameter)
        # Autograd calls the hooks. Compiled train steps would try to compile
        # them too, piece by piece: they do nothing that a compiler could make
        # faster.
        untraced = torch.compiler.disable
        parameter.register_hook(
            untraced(lambda grad: self._before(number, reference(), grad))
        )
        self._hooks[number] = len(parameter._backward_hooks)
        parameter.register_post_accumulate_grad_hook(
            untraced(lambda parameter: self._after(number, parameter))
        )
        return number

    def call(self, number, name):
        """Gives a parameter the name that it has on all processes."""
        like, _ = self._likes[number]
        described = f"{name} {tuple(like.shape)} {like.dtype}"
        (column,) = self._columns([number])
        self._marks[column] = 1 + zlib.crc32(described.encode()) % 255

    def in_words(self, numbers):
        """Whose gradients these are."""
        names = [self._names[n] for n in numbers if n in self._names]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        return f"gradients of {', '.join(names[:2])}{more}"

    @contextlib.contextmanager
    def accumulating(self, owed, defers):
        """Within it, gradients of several passes are reduced together.

        Args:
            owed: dict from numbers of parameters to local tensors, the sums of
                what earlier passes have left local. A pass that accumulates,
                and reduces, adds them to its gradients, sets them to zero and
                takes them out of the dict.
            defers: whether passes leave gradients local. They do not
                communicate then. Those of `grad()`, and with
                `create_graph=True`, reduce all the same.
        """
        previous = self.owed, self.defers
        self.owed, self.defers = owed, defers
        try:
            yield
        finally:
            self.owed, self.defers = previous

    def _before(self, number, parameter, grad):
        current = self._pass()
        if current is None:
            current = Pass(self)
            # Autograd alone holds the pass: if backward fails, the callback
            # never runs, and the pass is gone with it.
            self._pass = weakref.ref(current)
            private.at_end_of_backward(functools.partial(self._finish, current))
        if (
            self.is_in_step
            and parameter is not None
            and len(parameter._backward_hooks) > self._hooks[number]
        ):
            # Those of the program's own come next, and see the gradient of the
            # whole batch. Their mean over data shards is what they give.
            grad = self._reduced_now(grad)
            arrived = current.arrive(number, parameter, grad)
            return grad if arrived is None else arrived
        return current.arrive(number, parameter, grad)

    def _reduced_now(self, grad):
        """Collective along the data axis: every process of it has the hook."""
        weight = rows.weight(self.context)
        if not isinstance(grad, DTensor):
            return collectives.ReduceNow.apply(
                grad, weight, self.context.data_group
            )
        local = collectives.ReduceNow.apply(
            sharded.Leave.apply(grad), weight, self.context.data_group
        )
        return sharded.Enter.apply(
            local, grad.device_mesh, grad.placements, tuple(grad.shape)
        )

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
            plan = self._plans[numbers] = self.buckets(numbers)
            # Of what lies on a GPU, the host would wait for all of it.
            if plan and torch.device(plan[-1].device).type == "cpu":
                plan[-1].add(SURPRISE, _like((1,), plan[-1].dtype))
        return self._plans[numbers]

    def is_agreed(self, reached):
        """Whether all have agreed once that a pass reached these, and that they
        are the same parameters.

        Args:
            reached: tuple of numbers, in ascending order.
        """
        return reached in self._agreed

    def buckets(self, numbers):
        """Cuts parameters into buckets of one dtype, last created first."""
        # Whether they still live here must not matter: elsewhere they may.
        return buckets.build(
            (n, *self._likes[n]) for n in sorted(numbers, reverse=True)
        )

    def agree(self, reached, captured, replaced):
        """What the backward passes of all data shards, taken together, met.

        Collective: every process of the data axis calls it.

        Args:
            reached, captured, replaced: numbers of the parameters with a
                gradient, of those of them whose gradient `grad()` returns, and
                of those of these whose gradient a later hook has replaced.

        Returns:
            Tuple of the numbers with a gradient anywhere, and the error to
            raise, or None.

        Raises:
            RuntimeError: if the parameters of these numbers are not the same
                everywhere.
        """
        self._passes += 1
        asks = self._passes % PASSES == 0
        count = len(self._marks)
        capacity = max(FLAGS, 1 << (count - 1).bit_length())
        flags = torch.zeros((5 + asks, capacity), dtype=torch.uint8)
        flags[0, self._columns(reached)] = 1
        flags[1] = 1 - flags[0]
        flags[2, self._columns(captured)] = 1
        flags[2, self._columns(replaced)] = 2
        flags[3, :count] = torch.frombuffer(self._marks, dtype=torch.uint8)
        # The largest of these tells the smallest mark; 0 is none.
        flags[4] = 255 - flags[3]
        if asks:
            flags[5, self._columns(self._parameters)] = 1
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.context.data_group)
        anywhere, missed, returned, largest, smallest, *lives = flags
        self._check_same(self._numbers(anywhere & (largest != 255 - smallest)))
        error = None
        if returned.any():
            error = self._error(returned, missed & anywhere)
        reached = self._numbers(anywhere)
        if len(self._agreed) > HISTORY:
            self._agreed.clear()
        self._agreed.add(reached)
        if asks:
            self._forget(lives[0] | anywhere, int((smallest < 255).sum()))
        return reached, error

    def _columns(self, numbers):
        """Where in flags parameters are."""
        if not self._first:
            return list(numbers)
        offset = len(self._kept) - self._first
        return [
            n + offset
            if n >= self._first
            else bisect.bisect_left(self._kept, n)
            for n in numbers
        ]

    def _numbers(self, flags):
        """The numbers of the parameters whose flags are set."""
        kept, columns = self._kept, flags.nonzero().flatten().tolist()
        if not self._first:
            return tuple(columns)
        offset = self._first - len(kept)
        return tuple(kept[i] if i < len(kept) else i + offset for i in columns)

    def _forget(self, lives, count):
        """Forgets the parameters that no process has any more, of those that
        all have made.

        Args:
            lives: flags.
            count: int, so many flags are of parameters that all have made.
        """
        columns = lives[:count].nonzero().flatten().tolist()
        kept = list(self._numbers(lives[:count]))
        first = self._first + count - len(self._kept)
        forgotten = {n for n in self._names if n < first}.difference(kept)
        if not forgotten:
            return
        marks_left = [self._marks[i] for i in columns]
        self._marks = bytearray(marks_left) + self._marks[count:]
        self._kept, self._first = kept, first
        for by_number in (self._likes, self._hooks, self._names, self.shares):
            for number in forgotten.intersection(by_number):
                del by_number[number]
        self._plans.clear()
        # What is predicted from them goes on being the same on all.
        history = [
            tuple(n for n in reached if n not in forgotten)
            for reached in self._history
        ]
        self._history.clear()
        self._history.extend(history)

    def _check_same(self, different):
        if not different:
            return
        names = [self._names[n] for n in different if n in self._names]
        raise RuntimeError(
            "The processes have made different variables, or in another "
            "order, so that their gradients do not belong together. Make the "
            "same layers and models in the same order on every process, also "
            "those that one alone needs. Different are, as this process calls "
            f"them: {names or 'variables that it has not made'}"
        )

    def _error(self, returned, missed):
        names = [self._names[n] for n in self._numbers(missed & (returned > 0))]
        if names:
            return RuntimeError(
                "`torch.autograd.grad` was asked for gradients that only some "
                "data shards have; the others would get None. Let the loss "
                "depend on these variables on every process (`+ 0 * "
                "ops.sum(variable)`), or use `loss.backward()` and "
                f"`variable.value.grad`. Received: {names}"
            )
        names = [self._names[n] for n in self._numbers(returned == 2)]
        if names:
            return RuntimeError(
                "A hook on a variable replaced the gradient that "
                "`torch.autograd.grad` returns, before it was reduced over "
                "data shards. Change what `grad` returns instead. "
                f"Received: {names}"
            )
        return None

    def remember(self, reached):
        self._history.append(reached)

    def parameter(self, number):
        return self._parameters.get(number)


# Models that are built and dropped are much alike.
@functools.lru_cache(maxsize=1024)
def _like(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def _no_pass():
    return None


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
