"""Initial values and dropout, of which each process draws what it stores.

torch's generator of the host gives one number after the other, so a process
runs through the numbers of the whole value, keeps those that are its own, and
steps over the rest: bit by bit what one device draws, in no more time, and no
process holds the whole. What is not known to be drawn like that (another
device, half precision, another version of torch) is drawn whole, and cut.
"""

import functools
import itertools
import math

import torch

from keras.src.backend.torch.distribution import modes

# Numbers that are drawn at once.
PIECE = 1 << 18
# Fewer numbers than these are drawn whole.
SMALLEST = 1 << 15
# Numbers in a row that are worth to be drawn by themselves.
SHORTEST = 1 << 12

# Normal numbers are made by Box and Muller's method of blocks of these, and
# the last block of a tensor of another size ends where the tensor does.
BLOCK = 16


class Part:
    """What is drawn of a value, for a process that stores a part of it.

    Args:
        shape: tuple, of the whole.
        ranges: pairs of the start and stop of our part, for each dim.

    Attributes:
        origin: string that says what was drawn, None as long as nothing was:
            where it is the same, the whole is.
    """

    def __init__(self, shape, ranges):
        self.shape = tuple(shape)
        self.ranges = ranges
        self.origin = None

    @property
    def local_shape(self):
        return tuple(stop - start for start, stop in self.ranges)


class _Stepping:
    """The generator of a tensor whose numbers are drawn bit by bit.

    Args:
        generator: `torch.Generator` of the host.
        dtype: of the numbers.
    """

    def __init__(self, generator, dtype):
        self.generator = generator
        # How many numbers of 32 bits one of ours is made of.
        self._draws = 2 if dtype == torch.float64 else 1
        self._bin = torch.empty(min(PIECE, 1 << 16), dtype=torch.uint8)
        self.position = 0

    def step_to(self, position):
        left = (position - self.position) * self._draws
        while left > 0:
            skipped = self._bin[:left]
            skipped.random_(generator=self.generator)
            left -= len(skipped)
        self.position = position


class Uniform:
    """The numbers of `torch.rand`, to be read in order.

    Args:
        generator: `torch.Generator` of the host.
        size: int, how many numbers there are.
        dtype: of the numbers.
    """

    def __init__(self, generator, size, dtype):
        self._stepping = _Stepping(generator, dtype)
        self._dtype = dtype
        self._size = size

    def end(self):
        """Leaves the generator as one that has drawn all numbers."""
        self._stepping.step_to(self._size)

    def read(self, start, stop):
        """The numbers from `start` to `stop`, in a new 1-D tensor."""
        self._stepping.step_to(start)
        self._stepping.position = stop
        return torch.rand(
            stop - start,
            generator=self._stepping.generator,
            dtype=self._dtype,
            device="cpu",
        )


class Normal:
    """As `Uniform`, the numbers of `torch.normal`.

    Args:
        size: int, of `BLOCK` numbers or more.
        mean, stddev: floats.
    """

    def __init__(self, generator, size, dtype, mean=0.0, stddev=1.0):
        self._stepping = _Stepping(generator, dtype)
        self._dtype, self._parameters = dtype, (mean, stddev)
        self._size = size
        # Numbers from here on are drawn after all others.
        self._end = size - BLOCK if size % BLOCK else size
        self._tail = None
        self._last = None  # the block that was drawn last

    def _draw(self, start, stop):
        self._stepping.step_to(start)
        self._stepping.position = stop
        return torch.normal(
            *self._parameters,
            size=(stop - start,),
            generator=self._stepping.generator,
            dtype=self._dtype,
            device="cpu",
        )

    def read(self, start, stop):
        parts = []
        if start < self._end:
            parts.append(self._of_blocks(start, min(stop, self._end)))
        if stop > self._end:
            if self._tail is None:
                self._tail = self._draw(self._size, self._size + BLOCK)
            first = max(start, self._end) - self._end
            parts.append(self._tail[first : stop - self._end])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _of_blocks(self, start, stop):
        first = start - start % BLOCK
        last = -(-stop // BLOCK) * BLOCK
        kept = []
        if self._last is not None and self._stepping.position > first:
            # A block that the numbers before have begun.
            kept = [self._last]
        begin = first + BLOCK * len(kept)
        if last > begin:
            kept.append(self._draw(begin, last))
        numbers = kept[0] if len(kept) == 1 else torch.cat(kept)
        self._last = numbers[-BLOCK:].clone()
        return numbers[start - first : stop - first]


def _read_box(read, part, dtype):
    """Our part of the numbers of a whole.

    Args:
        read: function of a start and a stop, called in order.
        part: the `Part`.
        dtype: of the numbers.
    """
    shape, ranges = part.shape, part.ranges
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    local = torch.empty(part.local_shape, dtype=dtype)
    if not local.numel():
        return local
    # Dims from `axis` on are read at once, but for their first.
    axis = next(d for d, stride in enumerate(strides) if stride <= PIECE)
    for dim in range(axis + 1, len(shape)):
        start, stop = ranges[dim]
        is_cut = stop - start < shape[dim]
        if is_cut and (stop - start) * strides[dim] >= SHORTEST:
            axis = dim
    start, stop = ranges[axis]
    rows = max(1, PIECE // strides[axis])
    for index in itertools.product(*(range(*pair) for pair in ranges[:axis])):
        base = sum(i * stride for i, stride in zip(index, strides))
        target = local[tuple(i - r[0] for i, r in zip(index, ranges))]
        for row in range(start, stop, rows):
            after = min(row + rows, stop)
            values = read(
                base + row * strides[axis], base + after * strides[axis]
            )
            values = values.view(after - row, *shape[axis + 1 :])
            for dim, (a, b) in enumerate(ranges[axis + 1 :], start=1):
                values = values.narrow(dim, a, b - a)
            target[row - start : after - start].copy_(values)
    return local


def uniform(generator, part, dtype, minval, maxval):
    """Our part of what `keras.random.uniform` draws, on the host."""
    read = Uniform(generator, math.prod(part.shape), dtype).read
    return _read_box(
        lambda *where: (maxval - minval) * read(*where) + minval, part, dtype
    )


def normal(generator, part, dtype, mean, stddev):
    """Our part of what `keras.random.normal` draws, on the host."""
    size = math.prod(part.shape)
    read = Normal(generator, size, dtype, mean, stddev).read
    return _read_box(read, part, dtype)


# How many numbers Keras draws, to find one that is not too far out.
TRIALS = 4


def truncated_normal(generator, part, dtype, mean, stddev):
    """Our part of what `keras.random.truncated_normal` draws, on the host."""
    numbers = Normal(generator, TRIALS * math.prod(part.shape), dtype)

    def read(start, stop):
        x = numbers.read(TRIALS * start, TRIALS * stop).view(-1, TRIALS)
        valid = (x > -2) & (x < 2)
        first = valid.max(-1, keepdim=True)[1]
        return x.gather(-1, first).squeeze(-1).mul_(stddev).add_(mean)

    return _read_box(read, part, dtype)


def dropout(generator, part, dtype, rate):
    """Our part of what dropout makes of ones, on the host.

    Args:
        generator: `torch.Generator` of the host, None for torch's global one,
            which goes on as if all of it was drawn.
        part: the `Part`.
        dtype: of the ones.
        rate: float.
    """
    keep = 1.0 - rate
    numbers = _numbers_of_dropout(generator, math.prod(part.shape))

    def read(start, stop):
        return numbers.read(start, stop) < keep

    mask = _read_box(read, part, torch.bool)
    if generator is None:
        numbers.end()
    return mask.to(dtype).div_(keep)


def _numbers_of_dropout(generator, size):
    """What is compared with the share that is kept. Keras draws with its own
    generators from a tensor of this share, and else from the number."""
    if generator is None:
        return Uniform(torch.default_generator, size, torch.float64)
    return Uniform(generator, size, torch.float32)


def can_drop(part, has_generator):
    """As `can_draw`, for `dropout`."""
    return math.prod(part.shape) >= SMALLEST and _drops_as_torch(has_generator)


@functools.cache
def _drops_as_torch(has_generator):
    """Whether this torch drops by uniform numbers: on some hosts another
    library draws for it."""
    size, keep = 5 * BLOCK + 3, 0.7
    ours, torchs = _seeded(), _seeded()
    if has_generator:
        dtype = torch.float32
        expected = torch.full((size,), keep, device="cpu")
        expected = torch.bernoulli(expected, generator=torchs)
    else:
        dtype = torch.float64
        expected = torch.empty(size, device="cpu")
        expected.bernoulli_(keep, generator=torchs)
    mask = Uniform(ours, size, dtype).read(0, size) < keep
    return (
        torch.equal(mask, expected.bool())
        and torch.equal(ours.get_state(), torchs.get_state())
        and is_as_torch_draws(Uniform, dtype)
    )


def can_draw(numbers, part, dtype):
    """Whether our part can be drawn without the whole.

    Args:
        numbers: `Uniform` or `Normal`.
        part: the `Part`.
        dtype: of the numbers.
    """
    return math.prod(part.shape) >= max(SMALLEST, BLOCK) and is_as_torch_draws(
        numbers, dtype
    )


@functools.cache
def is_as_torch_draws(numbers, dtype):
    """Whether numbers read one by one are those that this torch draws."""
    size = 5 * BLOCK + 3
    draw = {Uniform: torch.rand, Normal: _normal}[numbers]
    expected = draw(size, generator=_seeded(), dtype=dtype, device="cpu")
    whole = numbers(_seeded(), size, dtype).read(0, size)
    some = numbers(_seeded(), size, dtype)
    cuts = [BLOCK // 2, BLOCK + 1, 3 * BLOCK + 5, size - BLOCK // 2, size]
    parts = [some.read(a, b) for a, b in zip(cuts, cuts[1:])]
    return torch.equal(whole, expected) and torch.equal(
        torch.cat(parts), expected[cuts[0] :]
    )


def _normal(size, **kwargs):
    return torch.normal(0.0, 1.0, size=(size,), **kwargs)


def _seeded():
    return torch.Generator().manual_seed(11)


@functools.cache
def _constant():
    """Keras's initializers that give each entry one number, by their calls.

    They are imported after variables.
    """
    from keras.src import initializers

    return {
        each.__call__
        for each in (
            initializers.Zeros,
            initializers.Ones,
            initializers.Constant,
        )
    }


@functools.cache
def _random():
    """Keras's initializers that draw one tensor and return it, by their
    calls."""
    from keras.src import initializers

    return {
        each.__call__
        for each in (
            initializers.RandomNormal,
            initializers.RandomUniform,
            initializers.TruncatedNormal,
            initializers.VarianceScaling,
        )
    }


def knows(initializer):
    """Whether a part may be made without the whole."""
    call = type(initializer).__call__
    return call in _random() or _is_constant(initializer)


def _is_constant(initializer):
    # An array would be broadcast.
    return type(initializer).__call__ in _constant() and type(
        getattr(initializer, "value", 0)
    ) in (int, float, bool)


def draw(initializer, part, dtype):
    """What an initializer that is known gives: our part where `part.origin`
    is set afterwards, else the whole.

    Does not communicate.

    Args:
        initializer: one that `knows` says yes of.
        part: the `Part`.
        dtype: string.
    """
    if _is_constant(initializer):
        value = initializer(part.local_shape, dtype=dtype)
        part.origin = f"{getattr(initializer, 'value', '')}"
    else:
        with modes.drawing_part(part):
            value = initializer(part.shape, dtype=dtype)
    if part.origin is not None:
        part.origin = f"{type(initializer).__name__} {part.origin}".strip()
    return value
