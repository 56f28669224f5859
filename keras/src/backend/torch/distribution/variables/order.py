"""In which order weights are gathered, so that the next is on its way.

While a layer computes with its weights, those that were gathered after them the
last time are gathered already, forward and backward. Which those are is known
to all processes alike: it follows from the gathers so far, which all of them
make in the same order, and from nothing else; not from what a process has
freed, nor from when. A wrong prediction is waited for, and dropped.
"""

import collections

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.gradients import buckets
from keras.src.backend.torch.distribution.variables import in_flight

KEPT_ORDERS = 64


class Order:
    """The gathers and reductions of one distribution.

    A gather is known by its parts, a tuple of `in_flight.Part`s.
    """

    def __init__(self):
        # By the first gather of a pass, those of the last pass that began so.
        self.orders = collections.OrderedDict()
        self._forward = self._backward = self._ahead = None
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
        gather = self._taken(current, parts)
        if gather is None:
            gather = in_flight.Gather(parts, context)
        wholes = gather.finish()
        self._begin_next(current, parts, context)
        return wholes

    def _taken(self, current, parts):
        """The gather that is on its way, if it is this one."""
        if self._ahead is None:
            return None
        (of, gather), self._ahead = self._ahead, None
        if of is current and gather.parts == parts and gather.is_current():
            return gather
        gather.wait()
        return None

    def skip(self, parts, context):
        """As `take`, of weights that the caller has."""
        current = self._pass()
        self.drop(current)
        self._begin_next(current, parts, context)

    def _begin_next(self, current, parts, context):
        following = None if current is None else current.follow(parts)
        if following is None or any(p.may_change_unseen for p in following):
            return
        if following[0].device.type == "cpu":
            # Of what is on its way there is one buffer of full size.
            self._make_room(sum(part.bytes for part in following))
        gather = in_flight.Gather(following, context)
        self._ahead = current, gather

    def reduce(self, parts, grads, context):
        """Starts to reduce gradients.

        Collective along the data axis: every process of it calls it.

        Returns:
            The `in_flight.Reduction`.
        """
        self._make_room(sum(part.bytes for part in parts))
        reduction = in_flight.Reduction(parts, grads, context)
        self._reductions.append(reduction)
        return reduction

    def _make_room(self, size):
        """Finishes reductions that would take too much memory beside this."""
        size += sum(each.bytes for each in self._reductions)
        while self._reductions and size > buckets.BUCKET_BYTES:
            reduction = self._reductions.popleft()
            size -= reduction.bytes
            reduction.finish()

    def finish(self, reductions):
        """Waits for reductions."""
        for reduction in reductions:
            reduction.finish()
            if reduction in self._reductions:
                self._reductions.remove(reduction)

    def begin_forward(self):
        """To be called as the outermost layer is called. Returns what is to be
        handed to `end_forward`."""
        before, self._forward = self._forward, Pass(self)
        return before

    def end_forward(self, before):
        self.drop(self._forward)
        self._forward = before

    def drop(self, which):
        """Forgets what is on its way for a pass."""
        if self._ahead is not None and self._ahead[0] is which:
            self._ahead[1].wait()
            self._ahead = None

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
        self.drop(current)
        if self._backward is current:
            self._backward = None


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
        """Notes a gather; the one that probably follows, or None."""
        if self._met is None:
            self._predicted = self._orders.pop((self.is_backward, parts), ())
            self._met = self._orders[self.is_backward, parts] = []
            while len(self._orders) > KEPT_ORDERS:
                self._orders.popitem(last=False)
        self._met.append(parts)
        try:
            place = self._predicted.index(parts, self._place) + 1
        except ValueError:
            return None
        self._place = place
        return None if self.is_at_end() else self._predicted[place]

    @property
    def is_backward(self):
        return self.task is not None

    def is_at_end(self):
        return 0 < self._place == len(self._predicted)
