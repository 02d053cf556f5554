"""Which of many cases run in every run of the tests."""

from collections.abc import Collection, Iterable
from itertools import product
from typing import Any

import pytest


def covering(*axes: Iterable[Any]) -> list[Any]:
    """Return all combinations of the values of several axes, as parameters of a test.

    A few run always, so that each value is among them: as many as the longest axis has values. The others, which join
    what those show in other ways, are `long`.
    """
    values = [list(axis) for axis in axes]
    longest = max(map(len, values))
    always = [tuple(axis[number % len(axis)] for axis in values) for number in range(longest)]
    return [pytest.param(*one, marks=() if one in always else pytest.mark.long) for one in product(*values)]


def long_ones(names: Iterable[Any], *, long: Collection[Any]) -> list[Any]:
    """Return names as parameters of a test, of which some are `long`."""
    return [pytest.param(name, marks=pytest.mark.long if name in long else ()) for name in names]
