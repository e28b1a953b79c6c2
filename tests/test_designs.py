"""The cases that stand for a product: every pair of values is among them, in far fewer rows."""

from itertools import combinations, product

import pytest
from designs import covered, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_every_pair_of_values_is_in_some_row(sizes):
    parameters = [range(size) for size in sizes]
    rows = pairwise(*parameters)
    assert set(rows) <= set(product(*parameters))
    assert len(rows) == len(set(rows))
    for i, j in combinations(range(len(sizes)), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(parameters[i], parameters[j]))


def test_the_rows_are_few():
    assert len(pairwise(*[range(3)] * 4)) <= 12, "of 81; 9 is the least there can be"


def test_the_other_rows_are_there_for_full_runs():
    parameters = [(1, 2, 3), (False, True), (0, 1)]
    cases = covered(*parameters)
    rows = pairwise(*parameters)
    others = [case.values[0] for case in cases if getattr(case, "marks", None)]
    assert cases[: len(rows)] == rows
    assert sorted([*others, *rows]) == sorted(product(*parameters))
    assert all(case.marks == (pytest.mark.full,) for case in cases[len(rows) :])
