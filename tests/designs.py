"""Which cases of a product to test, and the rows of a regression that a test writes out."""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest
from torch import Tensor


def pairwise(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return rows of the product in which every two values of two parameters meet.

    Greedy: the next row is the first of those in which most pairs meet that have not met yet.
    """
    rows = [(row, _pairs(row)) for row in product(*parameters)]
    missing = set().union(*(pairs for _, pairs in rows))
    chosen = []
    while missing:
        row, pairs = max(rows, key=lambda entry: len(entry[1] & missing))
        chosen.append(row)
        missing -= pairs
    return chosen


def _pairs(row: tuple[Any, ...]) -> set[tuple[Any, ...]]:
    return set(combinations(enumerate(row), 2))


def covered(*parameters: Sequence[Any], step: int = 1) -> list[Any]:
    """Return the pairwise rows, and every ``step``-th other row for runs with ``-m full``."""
    rows = pairwise(*parameters)
    others = [row for row in list(product(*parameters))[::step] if row not in rows]
    return [*rows, *(pytest.param(row, marks=pytest.mark.full) for row in others)]


def aside(names: Iterable[str], *others: str) -> list[Any]:
    """Return all names; ``others``, which repeat what the rest tests, for runs with ``-m full``."""
    assert {*others} <= {*names}
    marks = dict.fromkeys(others, pytest.mark.full)
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


def rows_of(x: Tensor, groups: int) -> Tensor:
    """Return ``x``, (n, channels, ...), as (groups, n · positions, channels of a group)."""
    return x.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
