"""Programs of user code give one device's numbers, or fail as it does.

`USER_CODE_ALL=1` runs all of them with each number of rows and each
distribution, not some; `USER_CODE_ONLY` is a regular expression of the names
of those to run.
"""

import os
import re

import pytest

from integration_tests.user_code import agreement
from integration_tests.user_code import catalogue
from integration_tests.user_code import layouts

ALL = "USER_CODE_ALL" in os.environ
ONLY = os.environ.get("USER_CODE_ONLY", "")
ROWS = 7
# Of these, every so many run with other rows, and under each of the layouts.
FEWER = 12
OTHER_ROWS = (1, 22)

# Programs that run on one device and may be an error on several processes,
# the same on all, by kind: `{kind: {name: reason}}`.
KNOWN_ERRORS = {}


def check(kind, rows, make_distribution, first=None):
    """Asserts that programs of a kind give one device's numbers.

    Args:
        first: which of them, if it is not all: every so many from this one.
    """
    programs = catalogue.programs(kind, rows)
    names = [name for name in programs if re.search(ONLY, name)]
    if first is not None and not ALL and not ONLY:
        names = names[first % FEWER :: FEWER]
    agreement.check(
        {name: programs[name] for name in names},
        make_distribution,
        known_errors=KNOWN_ERRORS.get(kind, {}),
        key=(kind, rows),
    )


@pytest.mark.world(2)
@pytest.mark.limit(300)
@pytest.mark.parametrize("kind", catalogue.KINDS)
def test_data_parallel(kind):
    check(kind, ROWS, layouts.DISTRIBUTIONS[2]["data parallel"])


@pytest.mark.world(2)
@pytest.mark.limit(300)
@pytest.mark.parametrize("kind", catalogue.KINDS)
def test_rows(kind):
    for first, rows in enumerate(OTHER_ROWS):
        check(kind, rows, layouts.DISTRIBUTIONS[2]["data parallel"], first)


@pytest.mark.world(2)
@pytest.mark.limit(300)
@pytest.mark.parametrize("name", ["tensor parallel", "fully sharded"])
@pytest.mark.parametrize("kind", catalogue.KINDS)
def test_sharded_weights(kind, name):
    first = 2 if name == "tensor parallel" else 3
    check(kind, ROWS, layouts.DISTRIBUTIONS[2][name], first)


@pytest.mark.world(4)
@pytest.mark.limit(300)
@pytest.mark.parametrize("kind", catalogue.KINDS)
def test_two_axes(kind):
    check(kind, ROWS, layouts.DISTRIBUTIONS[4]["both"], 1)
