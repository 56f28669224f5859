"""Gathered weights, freed after use and gathered again in backward.

While a layer is called, autograd saves no gathered weight, nor a view of one,
but how to gather it again (`torch.autograd.graph.saved_tensors_hooks`). So a
gathered weight lives as long as something refers to it: to the end of the call,
or as long as the program keeps it. When backward asks, it is gathered again,
once for all that one call has saved of it.

What a layer unshards together is gathered by one collective, and its gradients
are reduced by one: see `Reads`.
"""

import contextlib
import functools
import re
import threading

import torch
from torch.distributed.tensor import DTensor

from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import modes as modes_lib
from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.gradients import buckets
from keras.src.backend.torch.distribution.modes import modes
from keras.src.backend.torch.distribution.tensors import sharded

# A weight that is so small beside those before it is gathered with them.
SMALL = 1 / 8


class Unsharded:
    """What was gathered at once, for autograd to ask for again.

    Args:
        parts: tuple of `in_flight.Part`s.
        order: the `Order` of the context.
        context: the `Context`.
    """

    def __init__(self, parts, order, context):
        self.parts, self.order, self.context = parts, order, context
        self.versions = [part.version for part in parts]
        # The first that backward asks for is the last that forward used: it
        # is kept by what autograd saves.
        self.is_kept = order.is_last()
        self.packs = {}  # index of a part -> how often autograd has saved it
        self.waiting = {}  # index -> whole weight, and how often it is due

    def mark(self, wholes):
        """Lets `pack` know these weights, and views of them.

        The mark is on their memory, and lives as long as that.
        """
        for index, whole in enumerate(wholes):
            setattr(whole.untyped_storage(), marks.UNSHARDED, (self, index))

    def again(self, index, kept):
        """A whole weight, gathered where it is not at hand.

        Collective along the data axis: every process of it calls it, as
        backward has the same graph on all.
        """
        part = self.parts[index]
        if part.version != self.versions[index]:
            raise RuntimeError(
                "A weight that is needed for gradient computation has been "
                "modified by an inplace operation after a layer was called "
                "with it. Call `backward()` before you write into it, or set "
                "`distribution.reshard_after_forward = False`. Received: a "
                f"weight of shape {part.layout.shape} at version "
                f"{part.version}; expected version {self.versions[index]}"
            )
        if index not in self.waiting:
            indices = sorted(self.packs)
            parts = tuple(self.parts[i] for i in indices)
            wholes = [None] * len(parts)
            if kept is None:
                wholes = self.order.take(parts, self.context)
            else:
                self.order.skip(parts, self.context)
            for i, whole in zip(indices, wholes):
                self.waiting[i] = [whole, self.packs[i]]
        due = self.waiting[index]
        due[1] -= 1
        if not due[1]:
            del self.waiting[index]
        return due[0] if kept is None else kept


class Packed:
    """What autograd saves in place of a gathered weight, or a view of it."""

    def __init__(self, unsharded, index, x, wrapped=None):
        self.unsharded, self.index = unsharded, index
        self.strides = x.shape, x.stride(), x.storage_offset()
        self.wrapped = wrapped  # the `DTensor` layout of a view, or None
        self.kept = x.detach() if unsharded.is_kept else None
        packs = unsharded.packs
        packs[index] = packs.get(index, 0) + 1

    def unpack(self):
        whole = self.unsharded.again(self.index, self.kept)
        if self.kept is None:
            whole = whole.as_strided(*self.strides)
        if self.wrapped is not None:
            mesh, placements, shape = self.wrapped
            whole = sharded.wrap(whole, mesh, placements, shape)
        return whole


def _pack(x):
    local, wrapped = x, None
    if isinstance(x, DTensor):
        spec = x._spec
        local, wrapped = x._local_tensor, (x.device_mesh, spec.placements)
        wrapped = (*wrapped, tuple(spec.tensor_meta.shape))
    if local.layout is torch.strided:
        mark = getattr(local.untyped_storage(), marks.UNSHARDED, None)
        if mark is not None and local.numel():
            with torch.no_grad():
                return Packed(*mark, local, wrapped)
    # No reference to the tensor itself: it may have one to this.
    return x.detach(), x._version


def _unpack(packed):
    if isinstance(packed, Packed):
        with torch.no_grad():
            return packed.unpack()
    x, version = packed
    if x._version != version:
        # With hooks, torch leaves it to them to see that.
        raise RuntimeError(
            "one of the variables needed for gradient computation has been "
            f"modified by an inplace operation: [{x.type()} "
            f"{list(x.shape)}] is at version {x._version}; expected version "
            f"{version} instead."
        )
    return x


HOOKS = torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _is_on():
    hooks = private.saved_tensors_hooks()
    return hooks is not None and hooks[0] is _pack


@contextlib.contextmanager
def saving_no_weights():
    """Within it, autograd saves no gathered weight.

    Where other hooks are on already (activation checkpointing above all) they
    stay. Where code transforms functions (`torch.func`), which these hooks do
    not allow, they are off.
    """
    if private.saved_tensors_hooks() is not None:
        yield
        return
    with _TRANSFORMS, HOOKS:
        yield


class _Transforms:
    """Within it, what transforms functions turns the hooks off meanwhile.

    Threads share torch's function, so it is put back by the last of them.
    """

    def __init__(self):
        self._lock, self._inside, self._released = threading.Lock(), 0, None

    def __enter__(self):
        graph = torch.autograd.graph
        with self._lock:
            if not self._inside:
                self._released = graph.disable_saved_tensors_hooks
                graph.disable_saved_tensors_hooks = functools.partial(
                    _without_hooks, self._released
                )
            self._inside += 1

    def __exit__(self, *error):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.autograd.graph.disable_saved_tensors_hooks = (
                    self._released
                )


@contextlib.contextmanager
def _without_hooks(released, message):
    # Of this thread: others have theirs.
    was_on = _is_on()
    if was_on:
        HOOKS.__exit__()
    try:
        with released(message):
            yield
    finally:
        if was_on:
            HOOKS.__enter__()


_TRANSFORMS = _Transforms()


class Reads:
    """What one layer unshards, call after call.

    In its first call it unshards a weight when it is read. From then on those
    that were read one after the other are unsharded together, when the first of
    them is.
    """

    def __init__(self, layer):
        self.keeps = not layer._layers
        # By the first read of it: reads that are made together. A read is a
        # `Part`, and whether autograd tracks it.
        self.together = {}
        self.begin()

    def begin(self):
        self.met = {}  # read -> variable, in their order
        self.ready = {}  # read -> version, and whole weight of that

    def read(self, read, variable, value, unshard):
        """A whole weight.

        Args:
            read: a `Part`, and whether autograd tracks it.
            variable, value: whose part it is, and what it stores.
            unshard: function of a list of such triples that gives the whole
                weights.
        """
        first = read not in self.met
        self.met.setdefault(read, variable)
        part, _ = read
        if read in self.ready:
            # Of a layer of layers, a weight might lie here for long.
            ready = self.ready if self.keeps else {read: self.ready.pop(read)}
            version, whole = ready[read]
            # A layer may write into a state, and read it again.
            if version == part.version and not part.may_change_unseen:
                return whole
        triples = [(read, variable, value)]
        if first:
            triples += [
                (other, other_variable, None)
                for other, other_variable in self.together.get(read, ())
                if other not in self.met
            ]
        wholes = unshard(triples)
        for (other, *_), whole in zip(triples, wholes):
            self.ready[other] = other[0].version, whole
        if not self.keeps:
            del self.ready[read]
        return wholes[0]

    def end(self):
        for group in _groups(list(self.met.items())):
            self.together[group[0][0]] = group[1:]


def _groups(reads):
    """Cuts what was read into what is gathered at once."""
    groups = []
    for read, variable in reads:
        part, tracks = read
        for group in groups:
            other, others_track = group[0][0]
            size = sum(p.bytes for (p, _), _ in group)
            if (other.kind, others_track) == (part.kind, tracks) and (
                size + part.bytes <= buckets.MOST or part.bytes <= size * SMALL
            ):
                group.append((read, variable))
                break
        else:
            groups.append([(read, variable)])
    return groups


@contextlib.contextmanager
def reading(layer):
    """Within it, a layer is called that unshards weights."""
    reads = layer.__dict__.get(marks.READS)
    if reads is None:
        reads = layer.__dict__[marks.READS] = Reads(layer)
    if reads.met:
        # Called by itself, or by another thread.
        reads = Reads(layer)
    reads.begin()
    try:
        with modes_lib.reads(reads):
            if torch.is_grad_enabled():
                with saving_no_weights():
                    yield
            else:
                yield
        # Not after an error, which may be this process's alone.
        reads.end()
    finally:
        reads.begin()


def is_wanted(part, variable):
    """Whether a weight is freed after forward.

    `distribution.reshard_after_forward` says so: for all, or by the paths of
    variables.
    """
    setting = part.layout.context.distribution.reshard_after_forward
    if isinstance(setting, bool):
        return setting
    return all(
        wanted
        for key, wanted in setting.items()
        if re.fullmatch(key, variable.path)
    )


def is_met(layer):
    """Whether what a layer unshards is noted; from the next call on it is."""
    if layer is None or modes.reads is not None:
        return modes.reads is not None
    layer.__dict__.setdefault(marks.READS, Reads(layer))
    return False
