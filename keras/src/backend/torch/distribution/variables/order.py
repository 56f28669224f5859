"""In which order weights are gathered, so that the next is on its way.

While a layer computes with its weights, those that were gathered after them the
last time are gathered already, forward and backward. Which those are is known
to all processes alike: it follows from the gathers so far, which all of them
make in the same order, and from nothing else; not from what a process has
freed, nor from when. A wrong prediction is waited for, and dropped.
"""

import collections
import contextlib
import itertools

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.gradients import buckets
from keras.src.backend.torch.distribution.variables import in_flight

KEPT_ORDERS = 64
# So much that follows is gathered, or reduced, by one collective.
SMALL_BYTES = 2 * 2**20


class Order:
    """The gathers and reductions of one distribution.

    A gather is known by its parts, a tuple of `in_flight.Part`s.
    """

    def __init__(self):
        # By the first gather of a pass, those of the last pass that began so.
        self.orders = collections.OrderedDict()
        self._forward = self._backward = self._ahead = self._open = None
        self._reductions = collections.deque()

    def take(self, parts, context):
        """Whole weights; starts to gather the next ones.

        Collective along the axis of the parts: every process of it calls it.

        Args:
            parts: tuple of `in_flight.Part`s of one kind.
            context: the `Context`.

        Returns:
            List of plain tensors.
        """
        current = self._pass()
        wholes = None
        if self._ahead is not None:
            if self._ahead.of is current:
                wholes = self._ahead.take(parts)
            if wholes is None:
                self._drop()
        if wholes is None:
            self._make_room_on_cpu(parts)
            wholes = in_flight.Gather(parts, context).finish()
        self._begin_next(current, parts, context)
        return wholes

    def skip(self, parts, context):
        """As `take`, of weights that the caller has."""
        current = self._pass()
        self._drop()
        self._begin_next(current, parts, context)

    def _begin_next(self, current, parts, context):
        if current is None or not current.follow(parts):
            return
        if self._ahead is not None and not self._ahead.is_empty():
            return
        self._ahead, following = None, _run(current.following())
        if not following:
            return
        together = tuple(part for parts in following for part in parts)
        size = sum(part.bytes for part in together)
        if together[0].device.type == "cpu" and size > SMALL_BYTES:
            if current.ends_with(following):
                # Here memory is at its peak: almost all gradients are there.
                return
        self._make_room_on_cpu(together)
        gather = in_flight.Gather(together, context)
        self._ahead = Ahead(current, following, gather)

    def reduce(self, parts, grads, context):
        """Reduces gradients, small ones together with others.

        Collective along the data axis, at once or later: every process of it
        calls it.

        Returns:
            The `in_flight.Reduction`, and for each part our shard, which is
            filled once `finish` has been called with it.
        """
        task = private.backward_task()
        if self._open is not None and self._open[0] != task:
            self._open = None  # Of a pass that has failed.
        size = sum(part.bytes for part in parts)
        if self._open is not None and not (
            self._open[1].takes(parts)
            and self._open[1].bytes + size <= SMALL_BYTES
        ):
            self._start(self._open[1])
        if self._open is None:
            self._open = task, in_flight.Reduction(context)
        reduction = self._open[1]
        shards = reduction.add(parts, grads)
        if reduction.bytes > SMALL_BYTES:
            self._start(reduction)
        return reduction, shards

    def _start(self, reduction):
        if self._open is not None and self._open[1] is reduction:
            self._open = None
        self._make_room(reduction.bytes)
        reduction.start()
        self._reductions.append(reduction)

    def _make_room_on_cpu(self, parts):
        """Lets there be one buffer of full size of what is on its way. (On a
        GPU, to wait would hold up what computes.)"""
        if parts[0].device.type == "cpu":
            self._make_room(sum(part.bytes for part in parts))

    def _make_room(self, size):
        """Finishes reductions that would take too much memory beside this."""
        size += sum(each.bytes for each in self._reductions)
        while self._reductions and size > buckets.MOST:
            reduction = self._reductions.popleft()
            size -= reduction.bytes
            reduction.finish()

    def finish(self, reductions):
        """Waits for reductions.

        Collective along the data axis, where one has not begun.
        """
        for reduction in reductions:
            if not reduction.has_started:
                self._start(reduction)
            reduction.finish()
            if reduction in self._reductions:
                self._reductions.remove(reduction)

    @contextlib.contextmanager
    def forward_pass(self):
        """Within it, the outermost layer is called."""
        before, self._forward = self._forward, Pass(self)
        try:
            yield
        finally:
            self._drop_of(self._forward)
            self._forward = before

    def _drop(self):
        """Forgets what is on its way."""
        if self._ahead is not None:
            self._ahead.wait()
            self._ahead = None

    def _drop_of(self, which):
        if self._ahead is not None and self._ahead.of is which:
            self._drop()

    def is_last(self):
        """Whether the last gather of the forward pass has probably been
        made: its weights are the first that backward asks for."""
        current = self._pass()
        return (
            current is not None
            and current is self._forward
            and current.is_at_end()
        )

    def _pass(self):
        if not private.is_in_backward():
            return self._forward
        task = private.backward_task()
        if self._backward is None or self._backward.task != task:
            current = self._backward = Pass(self, task)
            private.at_end_of_backward(lambda: self._end_backward(current))
        return self._backward

    def _end_backward(self, current):
        self._drop_of(current)
        if self._backward is current:
            self._backward = None


class Ahead:
    """Gathers that are predicted, made by one collective.

    Args:
        of: the `Pass`.
        gathers: list of tuples of parts, in the order in which they come.
        gather: the `in_flight.Gather` of all of them.
    """

    def __init__(self, of, gathers, gather):
        self.of, self._gather = of, gather
        self._gathers = collections.deque(gathers)
        self._versions = collections.deque(gather.versions)
        self._wholes = None

    def take(self, parts):
        """Whole weights, or None if others were predicted.

        Numbers that have changed since are none: all processes see the same
        writes.
        """
        if not self._gathers or self._gathers[0] != parts:
            return None
        versions = [self._versions.popleft() for _ in parts]
        self._gathers.popleft()
        if any(
            part.weight is not None and part.version != version
            for part, version in zip(parts, versions)
        ):
            return None
        if self._wholes is None:
            self._wholes = collections.deque(self._gather.finish())
        return [self._wholes.popleft() for _ in parts]

    def is_empty(self):
        return not self._gathers

    def wait(self):
        self._gather.wait()


def _run(gathers):
    """The first of these, and small ones after it, of one kind."""
    run, size = [], 0
    for parts in gathers:
        size += sum(part.bytes for part in parts)
        if run and (size > SMALL_BYTES or parts[0].kind != run[0][0].kind):
            break
        if any(part.may_change_unseen for part in parts):
            break
        run.append(parts)
    return run


class Pass:
    """The gathers of a forward or a backward pass, in their order.

    What it meets is what is predicted from the moment it is met: a pass that
    an error ends leaves the same behind on all processes.
    """

    def __init__(self, order, task=None):
        self.task = task
        self._orders = order.orders
        self._met, self._predicted, self._place = None, (), 0

    def follow(self, parts):
        """Notes a gather. Gives whether it was predicted."""
        if self._met is None:
            self._predicted = self._orders.pop((self.is_backward, parts), ())
            self._met = self._orders[self.is_backward, parts] = []
            while len(self._orders) > KEPT_ORDERS:
                self._orders.popitem(last=False)
        self._met.append(parts)
        try:
            place = self._predicted.index(parts, self._place) + 1
        except ValueError:
            return False
        self._place = place
        return True

    def following(self):
        """What is predicted from here on."""
        return itertools.islice(self._predicted, self._place, None)

    def ends_with(self, gathers):
        """Whether a backward pass probably ends with these."""
        end = self._place + len(gathers)
        return self.is_backward and end >= len(self._predicted)

    @property
    def is_backward(self):
        return self.task is not None

    def is_at_end(self):
        return 0 < self._place == len(self._predicted)
