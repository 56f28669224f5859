import types
import weakref

import pytest
import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution.gradients import buckets
from keras.src.backend.torch.distribution.gradients import reducer as gradients
from keras.src.backend.torch.distribution.mesh import rows

A, B, C = (0, 1), (2,), (0, 2)


def make_buckets_of(size, monkeypatch):
    """Lets a bucket be full with so many bytes."""
    monkeypatch.setattr(buckets, "LEAST", size)
    monkeypatch.setattr(buckets, "MOST", size)


def make_reducer(size=2):
    context = types.SimpleNamespace(data_size=size, data_group=dist.group.WORLD)
    return gradients.Reducer(context)


@pytest.mark.parametrize(
    "history, expected",
    [
        ([], ()),
        ([A], A),
        ([A, A, A], A),
        # Two models that take turns.
        ([A, B], B),
        ([A, B, A], B),
        ([A, B, A, B], A),
        # A generator that is trained after two steps of a discriminator:
        # what followed the last time.
        ([A, A, B, A, A], A),
        ([A, B, A, C, A], C),
        # New: what was last.
        ([A, A, C], C),
    ],
)
def test_predict(history, expected):
    reducer = make_reducer()
    for reached in history:
        reducer.remember(reached)
    assert reducer.predict() == expected


def test_history_is_bounded():
    reducer = make_reducer()
    for i in range(1000):
        reducer.remember((i,))
    assert len(reducer._history) == gradients.HISTORY


def test_kept_plans_are_bounded():
    reducer = make_reducer()
    owners = registered(reducer, *[(1, torch.float32)] * 1000)
    for i in range(1000):
        reducer.plan((i,))
    assert len(reducer._plans) <= gradients.HISTORY + 1
    plan = reducer.plan((7,))
    assert reducer.plan((7,)) is plan
    del owners


class Owner:
    """Holds a parameter, as a variable does."""

    def __init__(self, size, dtype):
        self.value = torch.nn.Parameter(torch.ones(size, dtype=dtype))


def registered(reducer, *specs):
    owners = [Owner(*spec) for spec in specs]
    for i, owner in enumerate(owners):
        reducer.register(owner.value, f"parameter_{i}")
    return owners


def test_buckets_have_one_dtype_and_begin_with_the_last_created():
    reducer = make_reducer()
    owners = registered(
        reducer,
        (2, torch.float32),
        (3, torch.float64),
        (4, torch.float32),
        (5, torch.float64),
    )
    cut = reducer.buckets((0, 1, 2, 3))
    assert [(b.numbers, b.dtype) for b in cut] == [
        ([3, 1], torch.float64),
        ([2, 0], torch.float32),
    ]
    assert [b.bytes for b in cut] == [8 * 8, 6 * 4]
    assert [b.numbers for b in reducer.buckets((2, 1))] == [[2], [1]]
    del owners


def test_buckets_are_of_limited_size(monkeypatch):
    make_buckets_of(10, monkeypatch)
    reducer = make_reducer()
    owners = registered(reducer, *[(1, torch.float32)] * 7)
    cut = reducer.buckets(range(7))
    # One is closed as soon as it is larger than the limit.
    assert [b.numbers for b in cut] == [[6, 5, 4], [3, 2, 1], [0]]
    del owners


def test_buckets_are_the_same_whatever_was_freed():
    reducer = make_reducer()
    owners = registered(reducer, *[(1, torch.float32)] * 3)
    del owners[1]
    assert [b.numbers for b in reducer.buckets(range(3))] == [[2, 1, 0]]
    # The others keep their numbers.
    owners += registered(reducer, (1, torch.float32))
    assert [b.numbers for b in reducer.buckets(range(4))] == [[3, 2, 1, 0]]


def test_parameters_are_freed_with_their_owners():
    reducer = make_reducer()
    owners = registered(reducer, *[(1, torch.float32)] * 2)
    references = [weakref.ref(owner.value) for owner in owners]
    del owners[0]
    assert references[0]() is None
    assert references[1]() is not None


def test_what_no_process_has_any_more_is_forgotten(on_threads, monkeypatch):
    """Whenever each of them freed it; the others are reduced as before."""
    monkeypatch.setattr(gradients, "PASSES", 4)
    monkeypatch.setattr(gradients, "FLAGS", 8)

    def run(rank):
        reducer = make_reducer()
        owners = registered(reducer, *[(2, torch.float32)] * 3)
        # One is freed on the first process alone, until later.
        late = registered(reducer, (2, torch.float32))
        if not rank:
            late.clear()
        said, sizes = [], []
        for i in range(40):
            short = registered(reducer, *[(3, torch.float32)] * 5)
            used = owners[i % 2 :: 2] + short[:1]
            for owner in owners:
                owner.value.grad = None
            sum((rank + 1) * o.value.sum() for o in used).backward()
            said.append([Model.value(o.value.grad) for o in (*owners, *used)])
            sizes.append(len(reducer._marks))
            if i == 20:
                late.clear()
            assert len(reducer._likes) == len(reducer._names) == sizes[-1]
        return said, sizes, sorted(reducer._kept)

    (said, sizes, kept), other = on_threads(2, run)
    assert (said, sizes, kept) == other
    even, odd = [1.5, None, 1.5], [None, 1.5, None]
    assert said == [
        [*even, 1.5, 1.5, 1.5] if i % 2 == 0 else [*odd, 1.5, 1.5]
        for i in range(40)
    ]
    assert max(sizes) < 50 and kept[:4] == [0, 1, 2, kept[3]] and kept[3] > 100


class Model:
    """Three parameters of a data shard, and a step of one device."""

    def __init__(self, *sizes, size=2):
        self.reducer = make_reducer(size)
        self.owners = registered(
            self.reducer, *[(n, torch.float32) for n in sizes or (2, 3, 4)]
        )
        self.parameters = [owner.value for owner in self.owners]

    def backward(self, factors):
        """Gradients of `factors[i]` for parameter i, where it is given."""
        sum(
            factor * self.parameters[i].sum() for i, factor in factors.items()
        ).backward()

    def grad(self, factors, wanted=(0, 1, 2), **kwargs):
        """The value of what `torch.autograd.grad` returns for `wanted`."""
        grads = torch.autograd.grad(
            sum(f * self.parameters[i].sum() for i, f in factors.items()),
            [self.parameters[i] for i in wanted],
            allow_unused=True,
            **kwargs,
        )
        return [self.value(grad) for grad in grads]

    def zero(self):
        for parameter in self.parameters:
            parameter.grad = None

    @property
    def grads(self):
        """The value of each gradient, all of whose elements are equal."""
        return [self.value(parameter.grad) for parameter in self.parameters]

    @staticmethod
    def value(grad):
        if grad is None:
            return None
        assert len(set(grad.tolist())) == 1
        return grad[0].item()


def test_mean_outside_of_a_step(on_threads):
    def run(rank):
        model = Model()
        model.backward({0: 1 + rank, 1: 10.0, 2: 4.0 * rank})
        return model.grads

    assert on_threads(2, run) == [[1.5, 10.0, 2.0]] * 2


def test_mean_is_weighted_with_rows(on_threads):
    def run(rank):
        model = Model(size=3)
        with rows.current_rows(rows.Rows((3, 1, 0), rank)):
            model.backward({0: (4.0, 8.0, 0.0)[rank]})
        return model.grads

    assert on_threads(3, run) == [[5.0, None, None]] * 3


def test_a_mean_of_no_rows_counts_for_nothing(on_threads):
    def run(rank):
        model = Model()
        with rows.current_rows(rows.Rows((2, 0), rank)):
            model.backward({0: (3.0, float("nan"))[rank]})
        return model.grads

    assert on_threads(2, run) == [[3.0, None, None]] * 2


def test_a_gradient_of_one_shard_alone_reaches_all(on_threads):
    # A branch that only one of them takes: on one device, it has a gradient.
    def run(rank):
        model = Model()
        seen = []
        for _ in range(3):
            model.zero()
            model.backward({0: 2.0, 1: 4.0} if rank else {0: 2.0, 2: 6.0})
            seen.append(model.grads)
        return seen

    expected = [[2.0, 2.0, 3.0]] * 3
    assert on_threads(2, run) == [expected] * 2


def test_no_gradient_anywhere_stays_none(on_threads):
    def run(rank):
        model = Model()
        seen = []
        # Those that were predicted, but not reached, too.
        for factors in ({0: 1.0, 1: 1.0}, {1: 3.0}, {0: 5.0}):
            model.zero()
            model.backward(factors)
            seen.append(model.grads)
        return seen

    expected = [[1.0, 1.0, None], [None, 3.0, None], [5.0, None, None]]
    assert on_threads(2, run) == [expected] * 2


def test_gradients_of_several_passes_add_up(on_threads):
    def run(rank):
        model = Model()
        model.backward({0: 1.0 + rank, 1: 1.0})
        model.backward({0: 3.0 + rank, 2: 1.0})
        model.backward({0: 5.0 + rank} if rank else {1: 8.0})
        return model.grads

    # (1 + 2) / 2 + (3 + 4) / 2 + 6 / 2; what was reduced is not once more.
    assert on_threads(2, run) == [[8.0, 5.0, 1.0]] * 2


def test_several_buckets(on_threads, monkeypatch):
    make_buckets_of(4, monkeypatch)

    def run(rank):
        model = Model(*[3] * 6)
        seen = []
        for step in range(4):
            model.zero()
            model.backward({i: float(i + step + rank) for i in range(6)})
            seen.append(model.grads)
        return seen

    expected = [[i + step + 0.5 for i in range(6)] for step in range(4)]
    assert on_threads(2, run) == [expected] * 2


def test_reduces_while_backward_runs(fake_world, monkeypatch):
    fake_world(2)
    make_buckets_of(4, monkeypatch)
    model = Model(2, 2, 2)
    events = []
    all_reduce = dist.all_reduce

    def logged(tensor, *args, **kwargs):
        events.append(f"reduce {tensor.numel()}")
        return all_reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(buckets.dist, "all_reduce", logged)
    for parameter, name in zip(model.parameters, "012"):
        parameter.register_hook(lambda _, name=name: events.append(name))

    def chain():
        x = torch.ones(2)
        for parameter in model.parameters:
            x = x * parameter
        return x.sum()

    chain().backward()
    # Nothing is known of the first pass: all of it is reduced at its end.
    # Three flags of each of three parameters say which those are.
    assert (
        events
        == ["2", "1", "0", f"reduce {5 * gradients.FLAGS}"] + ["reduce 2"] * 3
    )
    events.clear()
    chain().backward()
    assert events == [
        "2",
        "reduce 2",
        "1",
        "reduce 2",
        "0",
        # With the number of those that have met something else.
        "reduce 3",
    ]


def test_a_failed_pass_leaves_nothing_behind(on_threads):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("out of memory")

    def run(rank):
        model = Model()
        first, second, _ = model.parameters
        # The second parameter, created last, gets its gradient first.
        loss = Fails.apply(first).sum() + second.sum()
        with pytest.raises(RuntimeError, match="out of memory"):
            loss.backward()
        model.zero()
        model.backward({0: 1.0 + rank, 1: 3.0})
        return model.grads

    assert on_threads(2, run) == [[1.5, 3.0, None]] * 2


def test_grad_returns_the_mean(on_threads):
    def run(rank):
        model = Model()
        return model.grad({0: 1 + rank, 1: 10.0, 2: 4.0 * rank}), model.grads

    expected = [1.5, 10.0, 2.0], [None] * 3
    assert on_threads(2, run) == [expected] * 2


def test_grad_is_weighted_with_rows(on_threads):
    def run(rank):
        model = Model(size=3)
        seen = []
        for _ in range(2):
            with rows.current_rows(rows.Rows((3, 1, 0), rank)):
                seen.append(model.grad({0: (4.0, 8.0, float("nan"))[rank]}))
        return seen

    assert on_threads(3, run) == [[[5.0, None, None]] * 2] * 3


def test_grad_leaves_what_was_accumulated(on_threads):
    def run(rank):
        model = Model()
        model.backward({0: 2.0 * rank, 1: 3.0})
        kept = model.parameters[0].grad
        seen = [
            model.grad({0: 4.0 * rank, 2: 1.0}),
            # Predicted is now what is not wanted here.
            model.grad({0: 6.0 * rank, 2: 1.0}, wanted=[0]),
            model.grads,
        ]
        assert model.parameters[0].grad is kept
        return seen

    expected = [[2.0, None, 1.0], [3.0], [1.0, 3.0, None]]
    assert on_threads(2, run) == [expected] * 2


def test_grad_and_backward_take_turns(on_threads):
    def run(rank):
        model = Model()
        seen = []
        for step in range(3):
            model.zero()
            seen.append(model.grad({0: 2.0 * rank + step, 2: 1.0}))
            model.backward({1: 4.0 * rank, 2: float(step)})
            seen.append(model.grads)
            model.backward({0: 2.0 * rank, 1: 1.0})
            seen.append(model.grads)
        return seen

    expected = []
    for step in range(3):
        expected += [
            [1.0 + step, None, 1.0],
            [None, 2.0, float(step)],
            [1.0, 3.0, float(step)],
        ]
    assert on_threads(2, run) == [expected] * 2


def test_grad_of_the_mean_in_several_buckets(on_threads, monkeypatch):
    make_buckets_of(4, monkeypatch)

    def run(rank):
        model = Model(*[3] * 6)
        factors = {i: float(i + rank) for i in range(6)}
        return [model.grad(factors, wanted=range(6)) for _ in range(2)]

    assert on_threads(2, run) == [[[i + 0.5 for i in range(6)]] * 2] * 2


def test_a_gradient_that_grad_returns_to_some_alone_raises(on_threads):
    def run(rank):
        model = Model()
        with pytest.raises(RuntimeError, match="parameter_1") as raised:
            model.grad({0: 1.0, 1: 3.0} if rank else {0: 1.0})
        assert "parameter_0" not in str(raised.value)
        # None of them is left waiting, or behind.
        return model.grad({0: 1.0 * rank, 1: 1.0}), model.grads

    expected = [0.5, 1.0, None], [None] * 3
    assert on_threads(2, run) == [expected] * 2


def test_a_hook_that_replaces_what_grad_returns_raises(on_threads):
    def run(rank):
        model = Model()
        # On one of them alone: the others raise too.
        if rank:
            model.parameters[1].register_hook(lambda grad: 2 * grad)
        with pytest.raises(RuntimeError, match="hook.*parameter_1"):
            model.grad({0: 1.0, 1: 3.0})
        # What is accumulated is what the hook makes of the local gradient.
        model.backward({1: 3.0, 2: 1.0})
        return model.grads

    assert on_threads(2, run) == [[None, 4.5, 1.0]] * 2


def test_a_failed_grad_leaves_nothing_behind(on_threads):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("out of memory")

    def run(rank):
        model = Model()
        first, second, _ = model.parameters
        loss = Fails.apply(first).sum() + second.sum()
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.autograd.grad(loss, [first, second])
        return model.grad({0: 1.0 + rank, 1: 3.0})

    assert on_threads(2, run) == [[1.5, 3.0, None]] * 2


@pytest.fixture
def communicated(monkeypatch):
    """What each all-reduce of gradients and flags had, in order."""
    sizes = []
    all_reduce = dist.all_reduce

    def logged(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(buckets.dist, "all_reduce", logged)
    return sizes


def test_gradients_left_local_are_completed(on_threads, communicated):
    def run(rank):
        model = Model(size=3)
        with rows.current_rows(rows.Rows((3, 1, 0), rank)):
            with model.reducer.accumulating({}, defers=True):
                model.backward({0: 4.0})
                # Here on some alone, and of no rows.
                model.backward(
                    ({0: 8.0}, {1: 4.0}, {0: float("nan"), 2: 1.0})[rank]
                )
                shares = model.grads
        # What was reached before, by whomever, and what is now.
        model.backward({0: 3.0 * rank, 1: 1.0})
        model.backward({2: 1.0})
        return shares, model.grads

    results = on_threads(3, run)
    assert [shares for shares, _ in results] == [
        [9.0, None, None],
        [1.0, 1.0, None],
        [0.0, None, 0.0],
    ]
    for _, grads in results:
        assert grads == [13.0, 2.0, 1.0]
    # Of the last two passes: the flags, and what they reached. That the first
    # of them reached too was predicted of the second, with a number for those
    # that met something else.
    flags = 5 * gradients.FLAGS
    assert sorted(communicated) == sorted(([flags, 5] + [flags, 6, 4]) * 3)


FLAGGED = 5 * gradients.FLAGS


def test_what_all_have_predicted_needs_no_agreement(on_threads, communicated):
    def run(rank):
        model, given = Model(), []
        passes = [
            {0: 1.0, 1: 3.0},
            {0: 1.0 + rank, 1: 3.0},
            # Here on one alone; there more than was predicted.
            {0: 2.0, 1: 4.0} if rank else {0: 2.0},
            {0: 2.0, 1: 4.0, 2: 6.0} if rank else {0: 2.0, 1: 4.0},
            {0: 1.0, 1: 1.0, 2: 1.0},
        ]
        for grads in passes:
            model.zero()
            model.backward(grads)
            given.append(model.grads)
        # And what `grad` returns.
        return given, model.grad({0: 2.0 + rank, 1: 1.0, 2: 1.0})

    for given, returned in on_threads(2, run):
        assert given == [
            [1.0, 3.0, None],
            [1.5, 3.0, None],
            [2.0, 2.0, None],
            [2.0, 4.0, 3.0],
            [1.0, 1.0, 1.0],
        ]
        assert returned == [2.5, 1.0, 1.0]
    # The first, the two in which one met something else, and `grad`.
    assert communicated.count(FLAGGED) == 4 * 2


def test_a_process_without_rows_says_that_it_is_surprised(on_threads):
    def run(rank):
        model = Model()
        for _ in range(2):
            model.zero()
            model.backward({0: 1.0})
        with rows.current_rows(rows.Rows((2, 0), rank)):
            model.zero()
            model.backward({0: 1.0, 1: 1.0} if rank else {0: 1.0})
        return model.grads

    assert on_threads(2, run) == [[1.0, 0.0, None]] * 2


def test_a_share_is_added_to_what_was_reduced(on_threads):
    def run(rank):
        model = Model()
        model.backward({0: 2.0 * rank, 1: 2.0 * rank})
        with model.reducer.accumulating({}, defers=True):
            model.backward({0: 4.0 * rank})
            model.backward({0: 4.0 * rank})
        # Not what `grad` is asked for, but what is accumulated.
        returned = model.grad({0: 2.0 * rank})
        model.backward({0: 1.0})
        return returned, model.grads

    expected = [1.0, None, None], [6.0, 1.0, None]
    assert on_threads(2, run) == [expected] * 2


def test_a_share_that_was_dropped_is_not_added(on_threads):
    def run(rank):
        model = Model()
        with model.reducer.accumulating({}, defers=True):
            model.backward({0: 4.0 * rank, 1: 1.0})
        model.parameters[0].grad = None
        model.parameters[1].grad = torch.ones(3)
        model.backward({0: 2.0 * rank, 1: 1.0})
        return model.grads

    assert on_threads(2, run) == [[1.0, 2.0, None]] * 2


@pytest.mark.parametrize("is_predicted", [False, True])
def test_what_is_owed_is_added_once(on_threads, is_predicted):
    def run(rank):
        model = Model()
        if is_predicted:
            model.backward({0: 1.0, 1: 1.0, 2: 1.0})
            model.zero()
        owed = {
            i: torch.full_like(parameter, 10.0 * (rank + 1)).detach()
            for i, parameter in enumerate(model.parameters)
        }
        kept = dict(owed)
        with model.reducer.accumulating(owed, defers=False):
            returned = model.grad({0: 2.0 * rank})
            # One of them on one shard alone, and one nowhere.
            model.backward({0: 2.0 * rank, 1: 8.0} if rank else {0: 4.0})
            model.backward({0: 2.0 * rank})
        return (
            returned,
            model.grads,
            sorted(owed),
            [model.value(kept[i]) for i in range(3)],
        )

    for rank, result in enumerate(on_threads(2, run)):
        assert result == (
            [1.0, None, None],
            [34.0, 34.0, None],
            [2],
            [0.0, 0.0, 10.0 * (rank + 1)],
        )


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_to_be_differentiated_are_not_left_local(on_threads):
    def run(rank):
        model = Model()
        owed = {0: torch.ones(2)}
        with model.reducer.accumulating(owed, defers=True):
            loss = (model.parameters[0] * (1.0 + rank)).sum()
            loss.backward(create_graph=True)
        grads = model.grads
        model.zero()
        return grads, model.value(owed[0])

    assert on_threads(2, run) == [([1.5, None, None], 1.0)] * 2


def mean_over_rows(parameters, rank, total):
    """A mean over local rows.

    Row r has the loss (r + 1) p^2 q + r s.
    """
    p, q, s = parameters
    ours = range(total) if rank is None else ((0, 1), (2,), (0,))[rank]
    loss = sum(((r + 1) * p**2 * q + r * s).sum() for r in ours)
    return loss / len(ours)


@pytest.mark.parametrize("by_backward", [False, True])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_of_gradients(on_threads, by_backward):
    """Of a loss to which each shard's rows add, too."""

    def step(parameters, rank, total):
        loss = mean_over_rows(parameters, rank, total)
        if by_backward:
            loss.backward(create_graph=True)
            grads = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
        else:
            grads = torch.autograd.grad(loss, parameters, create_graph=True)
        # Of `grads`, times a factor that is another on each shard.
        factor = mean_over_rows(parameters, rank, total) + 1
        norm = sum((grad**2).sum() for grad in grads)
        (factor * norm / 2).backward()
        return [g.tolist() for g in grads], [
            parameter.grad.tolist() for parameter in parameters
        ]

    def fresh():
        return [torch.full((1,), float(i + 1)) for i in range(3)]

    def run(rank):
        model = Model(1, 1, 1, size=3)
        with torch.no_grad():
            for parameter, value in zip(model.parameters, fresh()):
                parameter.copy_(value)
        with rows.current_rows(rows.Rows((2, 1, 0), rank)):
            return [step(model.parameters, rank, 3)] + [
                model.zero() or step(model.parameters, rank, 3)
            ]

    expected = step([x.requires_grad_() for x in fresh()], None, 3)
    for result in on_threads(3, run):
        for got in result:
            torch.testing.assert_close(got, expected)


def test_keep_plain_leaves_plain_gradients_alone():
    parameter = torch.nn.Parameter(torch.ones(2))
    gradients.keep_plain(parameter)
    (parameter * 3).sum().backward()
    assert parameter.grad.tolist() == [3.0, 3.0]
