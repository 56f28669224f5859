"""Programs of user code that are drawn at random, against one device.

Hypothesis draws the same examples on all processes and in every run. All that
fail are reported, the shortest first. `USER_CODE_EXAMPLES` sets how many are
drawn, of 150; `USER_CODE_SEED` other ones.
"""

import os

import hypothesis
import pytest

from integration_tests.user_code import agreement
from integration_tests.user_code import drawn
from integration_tests.user_code import layouts

EXAMPLES = int(os.environ.get("USER_CODE_EXAMPLES", 80))
SEED = int(os.environ.get("USER_CODE_SEED", 0))
LIMIT = 120 + 2 * EXAMPLES

# Of the examples.
SHARES = {
    "data parallel": 0.5,
    "tensor parallel": 0.15,
    "fully sharded": 0.2,
    "both": 0.15,
}
# Programs that failed once, under any distribution.
FOUND = []


def draw(count, seed):
    """As many programs, the shortest first."""
    found = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(drawn.programs())
    def collect(program):
        found.append(program)

    collect()
    return sorted(found, key=lambda program: len(repr(program)))


def check(world_size, name, seed):
    """Asserts that what is drawn gives one device's numbers.

    Collective: every process calls it.
    """
    count = max(1, round(EXAMPLES * SHARES[name]))
    programs = {
        repr(program): drawn.run(program)
        for program in [*FOUND, *draw(count, seed)]
    }
    make_distribution = layouts.DISTRIBUTIONS[world_size][name]
    agreement.check(programs, make_distribution, key="drawn")


@pytest.mark.world(2)
@pytest.mark.limit(LIMIT)
@pytest.mark.parametrize("name", layouts.DISTRIBUTIONS[2])
def test_on_two_processes(name):
    check(2, name, 10 * SEED + list(SHARES).index(name))


@pytest.mark.world(4)
@pytest.mark.limit(LIMIT)
@pytest.mark.parametrize("name", layouts.DISTRIBUTIONS[4])
def test_on_four_processes(name):
    check(4, name, 10 * SEED + list(SHARES).index(name))
