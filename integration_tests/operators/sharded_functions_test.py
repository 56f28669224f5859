"""The rules that torch's DTensors have for the functions of our table.

Each function that `operators` hands to a DTensor rule is called by its own
name, forward and backward, with each dim of what it is handed sharded, on
whatever torch there is. Which calls no rule takes, so that they are gathered,
is written down, as another minor version may have more rules, or other ones.
"""

import pytest
import torch
from torch.distributed.tensor import DTensor

from integration_tests.harness import parity
from integration_tests.operators import operators_test
from integration_tests.operators.operators_test import OTHER
from integration_tests.operators.operators_test import number
from keras.src import tree
from keras.src.backend.torch.distribution.ops import operators

OF_TWO = """
    __add__ __eq__ __ge__ __gt__ __le__ __lt__ __mul__
    __ne__ __pow__ __radd__ __rdiv__ __rmul__ __rpow__ __rsub__ __rtruediv__
    __sub__ __truediv__ add sub subtract mul multiply div divide true_divide
    rsub pow maximum minimum eq ne lt le gt ge not_equal less greater less_equal
    greater_equal
""".split()
OF_NUMBERS_TOO = frozenset(OF_TWO) - {"maximum", "minimum"}
IN_PLACE_OF_TWO = """
    __iadd__ __imul__ __isub__ __itruediv__ add_ sub_ subtract_ mul_ multiply_
    div_ divide_ copy_
""".split()
IN_PLACE_OF_ONE = "square_ rsqrt_ sqrt_ exp_ relu_ neg_ zero_".split()
OF_BOOLEANS = "__and__ __or__ logical_and logical_or logical_xor".split()
OF_ONE = {
    "__abs__": [()],
    "__getitem__": [(0,), ((..., 1),), (slice(1, 3),), ((0, 1),)],
    "__neg__": [()],
    "broadcast_to": [((2, 4, 6, 8),)],
    "chunk": [(2, -1), (3, -2), (3, 1), (2, 0)],
    "expand": [(2, 4, 6, 8)],
    "flatten": [(), (1,), (0, 1), (-2, -1)],
    "log_softmax": [(0,), (1,), (-1,)],
    "mean": [(), (0,), (1,), (-1,), ((0, 2),), ((1,), True)],
    "moveaxis": [(0, -1), (2, 1)],
    "movedim": [(0, -1), (2, 1)],
    "narrow": [(0, 1, 2), (1, 2, 3), (-1, 0, 4)],
    "permute": [(2, 0, 1), (1, 0, 2), (-1, -3, -2)],
    "reshape": [(4, 48), (24, 8), (-1,), (4, 6, 2, 4), (4, 3, 2, 8)],
    "softmax": [(0,), (1,), (-1,)],
    "split": [(2, 0), (3, 1), (4, -1), ([2, 4], 1)],
    "squeeze": [(), (0,), (-1,)],
    "sum": [(), (0,), (1,), (-1,), ((0, 2),), ((1,), True)],
    "swapaxes": [(0, 1), (1, 2), (-1, -2), (0, -1)],
    "swapdims": [(0, 1), (1, 2), (-1, -2), (0, -1)],
    "transpose": [(0, 1), (1, 2), (-1, -2), (0, -1)],
    "unflatten": [(0, (2, 2)), (1, (2, 3)), (1, (3, 2)), (-1, (2, 4))],
    "unsqueeze": [(0,), (1,), (-1,)],
    "view": [(4, 48), (24, 8), (-1,), (4, 6, 2, 4), (4, 3, 2, 8)],
}
LEAST = OTHER.flatten().sort().values[1]
OF_OTHERS = {
    # Without a gradient.
    "__floordiv__": {
        "": lambda x: x.detach() // 0.3,
        "2": lambda x: (x.detach() * 9) // OTHER,
    },
    "__invert__": {"": lambda x: ~(x > 0.5)},
    "__matmul__": {"": lambda x: x @ OTHER.mT, "2": lambda x: x.mT @ x},
    "addcdiv": {"": lambda x: torch.addcdiv(x, OTHER, x + 1, value=0.5)},
    "addcmul": {"": lambda x: torch.addcmul(x, OTHER, x, value=0.5)},
    "bmm": {
        "": lambda x: torch.bmm(x, OTHER.mT),
        "2": lambda x: torch.bmm(OTHER.mT, x),
        "3": lambda x: torch.bmm(x, x.mT),
    },
    "cat": {
        str(dim): lambda x, dim=dim: torch.cat([x, OTHER, x], dim)
        for dim in (0, 1, 2, -1, -2)
    },
    "concat": {"": lambda x: torch.concat([x, OTHER], 1)},
    "concatenate": {"": lambda x: torch.concatenate([OTHER, x], -1)},
    "einsum": {
        "1": lambda x: torch.einsum("abc,adc->abd", x, OTHER),
        "2": lambda x: torch.einsum("abc,cd->abd", x, OTHER[0].T),
        "3": lambda x: torch.einsum("abc->cab", x),
        "4": lambda x: torch.einsum("abc,abc->b", x, x),
    },
    "equal": {
        "": lambda x: torch.tensor(torch.equal(x, x * 1)),
        # Unlike in one number, which lies in one shard.
        "2": lambda x: torch.tensor(torch.equal(x, x + (OTHER < LEAST))),
    },
    "expand_as": {"": lambda x: x.expand_as(torch.zeros(2, 4, 6, 8))},
    "fill_": {"": lambda x: (x * 1).fill_(0.5)},
    "layer_norm": {
        "1": lambda x: torch.nn.functional.layer_norm(x, (8,)),
        "2": lambda x: torch.nn.functional.layer_norm(
            x, (6, 8), OTHER[0], OTHER[1]
        ),
    },
    "linear": {
        "": lambda x: torch.nn.functional.linear(x, OTHER[0], OTHER[0, :, 0]),
        "2": lambda x: torch.nn.functional.linear(OTHER, x[0], x[0, :, 0]),
    },
    "matmul": {
        "": lambda x: torch.matmul(x, OTHER.mT),
        "2": lambda x: torch.matmul(OTHER, x.mT),
        "3": lambda x: torch.matmul(x, OTHER[0, 0]),
    },
    "mm": {
        "": lambda x: torch.mm(x[0], OTHER[0].T),
        "2": lambda x: torch.mm(x[:, 1].T, OTHER[:, 1]),
    },
    "stack": {
        str(dim): lambda x, dim=dim: torch.stack([x, OTHER], dim)
        for dim in (0, 1, -1)
    },
    "t": {"": lambda x: x[0].t(), "2": lambda x: x[:, 1].t()},
    "where": {
        "": lambda x: torch.where(x > 0.5, x, OTHER),
        "2": lambda x: torch.where(OTHER > 0.5, x, 0.0),
    },
}


def call(name, *others):
    """A program: the torch function of this name, of `x` and others."""
    function = getattr(torch.Tensor, name, None) or getattr(torch, name)
    return lambda x: function(x, *others)


def of_two(name):
    yield "a tensor", call(name, OTHER)
    yield "itself", lambda x: call(name, x * 2)(x)
    yield "a row", call(name, OTHER[0, 0])
    yield "a column", call(name, OTHER[:, :, :1])
    yield "of a tensor", lambda x: call(name, x)(OTHER)
    if name in OF_NUMBERS_TOO:
        yield "a number", call(name, 0.5)


def in_place(name, *others):
    return lambda x: call(name, *others)(x * 1)


def programs():
    """`{"name, what it is handed": program}`"""
    found = {}
    for name in OF_TWO:
        for label, program in of_two(name):
            found[f"{name}, {label}"] = program
    for name in IN_PLACE_OF_TWO:
        found[f"{name}, a tensor"] = in_place(name, OTHER)
        found[f"{name}, a row"] = in_place(name, OTHER[0, 0])
        found[f"{name}, itself"] = lambda x, name=name: call(name, x)(x * 1)
    for name in IN_PLACE_OF_ONE:
        found[f"{name}, "] = in_place(name)
    for name in OF_BOOLEANS:
        found[f"{name}, "] = lambda x, name=name: call(name, OTHER > 0.5)(
            x > 0.5
        )
    for name, arguments in OF_ONE.items():
        for others in arguments:
            found[f"{name}, {others}"] = call(name, *others)
    for name, of_this in OF_OTHERS.items():
        for label, program in of_this.items():
            found[f"{name}, {label}"] = program
    return found


# Of those whose rule is not there: other code sees to it that they are right.
# All minor versions of torch that are known are alike.
GATHERED = {
    "reshape, (4, 3, 2, 8) / 1",
    "unflatten, (1, (3, 2)) / 1",
    "view, (4, 3, 2, 8) / 1",
}
KNOWN_TORCH = ("2.13", "2.14", "2.15")


def test_every_function_of_the_table_is_walked():
    assert {name.partition(",")[0] for name in programs()} == operators.SHARDED


@pytest.mark.world(2)
@pytest.mark.parametrize("dim", range(3))
def test_rules(dim):
    distribution = parity.model_parallel((1, 2), {})
    wrong, gathered = [], set()
    for name, program in programs().items():

        def watched(x):
            y = program(x)
            if isinstance(x, DTensor) and not name.startswith("equal,"):
                of_rule = (isinstance(z, DTensor) for z in tree.flatten(y))
                if not all(of_rule):
                    gathered.add(f"{name} / {dim}")
            return y

        expected, expected_gradient = operators_test.run(program)
        with distribution.scope():
            actual, gradient = operators_test.run(watched, dim)
        try:
            parity.assert_same(actual, expected)
            assert (gradient is None) == (expected_gradient is None)
            if gradient is not None:
                parity.assert_same(
                    number(gradient), number(expected_gradient), 1e-4
                )
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong
    if torch.__version__.startswith(KNOWN_TORCH):
        assert gathered == {x for x in GATHERED if x.endswith(str(dim))}
