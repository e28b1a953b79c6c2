"""Targets: as Captum reads them, and numpy integers besides."""

from typing import Any

import numpy as np
import pytest
import torch
from captum._utils.common import _select_targets
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_mipin.errors import TargetError, TargetRangeError
from captum_mipin.targets import per_example, target_index, target_indices, target_label


@st.composite
def targets(draw: st.DrawFn) -> tuple[Any, tuple[int, ...]]:
    """A target in some form, often a wrong one, and an output shape."""
    batch = draw(st.integers(1, 4))
    dims = draw(
        st.lists(st.integers(1, 3), max_size=1)
        | st.lists(st.integers(2, 3), min_size=2, max_size=2)
    )
    index = st.integers(-4, 4)
    tuples = st.lists(index, min_size=1, max_size=3).map(tuple)
    number = draw(st.sampled_from([batch, batch, batch, 1, batch + 1]))
    indices = st.lists(index, min_size=number, max_size=number)
    target = draw(
        st.one_of(
            st.none(),
            index,
            index.map(torch.tensor),
            tuples,
            indices,
            indices.map(torch.tensor),
            indices.map(lambda values: torch.tensor(values, dtype=torch.int32)),
            st.lists(tuples, min_size=number, max_size=number),
            st.sampled_from(["0", 1.0, [0.5] * batch, slice(0, 1)]),
        )
    )
    return target, (batch, *dims)


@settings(max_examples=300, deadline=None)
@given(targets())
def test_reads_every_target_as_captum_does(case: tuple[Any, tuple[int, ...]]) -> None:
    target, shape = case
    output = torch.arange(float(np.prod(shape))).reshape(shape)
    try:
        expected = _select_targets(output, target)
    except (AssertionError, IndexError, RuntimeError, TypeError):
        expected = None
    if expected is not None and expected.numel() == len(output):
        found = torch.stack(
            [row[index] for row, index in zip(output, per_example(target, output), strict=True)]
        )
        assert torch.equal(found, expected.reshape(-1))
        return
    try:
        found_targets = per_example(target, output)
    except TargetError:
        return
    # What Captum refuses for reasons of form alone may be read here, but then within the output.
    assert len(found_targets) == len(output)
    assert all(0 <= i < n for index in found_targets for i, n in zip(index, shape[1:], strict=True))


@pytest.mark.parametrize("target", [1, -2, (1,), (1, 0), [(1,), (1,)]])
def test_dimensions_of_one_need_no_index_as_in_captum(target: Any) -> None:
    output = torch.arange(6.0).reshape(2, 3, 1, 1)
    assert _select_targets(output, target).flatten().tolist() == [1, 4]
    assert per_example(target, output) == [(1, 0, 0), (1, 0, 0)]


@pytest.mark.parametrize(
    "target",
    [
        np.int64(2),
        np.int32(2),
        np.array(2),
        np.array([2]),
        np.array([2, 2]),
        [np.int64(2), np.int8(2)],
        torch.tensor(2),
        torch.tensor([2]),
        torch.tensor([[2], [2]])[:, 0],
        [torch.tensor(2), torch.tensor([2])],
    ],
)
def test_numpy_integers_and_integer_tensors_count_as_ints(target: Any) -> None:
    assert per_example(target, torch.zeros(2, 5)) == [(2,), (2,)]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, r"no target was given.*\(5,\).*choose"),
        ("1", "'1' is a str, expected integers"),
        (1.0, "is a float, expected integers"),
        (True, "is a bool, expected integers"),
        (np.True_, ", expected integers"),
        (slice(0, 1), "is a slice, expected integers"),
        ({}, "is a dict, expected integers"),
        (torch.tensor([0.0, 1.0]), "dtype torch.float32 and shape"),
        (torch.tensor([True, False]), "dtype torch.bool and shape"),
        (
            torch.zeros(2, 1, dtype=torch.long),
            r"shape \(2, 1\), expected one dimension with one index per example",
        ),
        ([0], "1 targets were given for 2 examples"),
        ([0, 1, 2], "3 targets were given for 2 examples"),
        ([], "0 targets were given for 2 examples"),
        ((0, 1), r"\(0, 1\) has 2 indices, expected 1"),
        ((), "0 indices, expected 1"),
        ((9999,) * 20, "20 indices, expected 1"),
        ([0, "a"], "is a str"),
        (np.array([0.5, 1.0]), "expected integers"),
        (np.array(["a", "b"]), "expected integers"),
        (np.array([None, 1]), "expected integers|no target was given"),
    ],
)
def test_bad_targets_are_assertion_errors_that_say_why(target: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        per_example(target, torch.zeros(2, 5))
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("target", [5, -6, [0, 5], torch.tensor([0, -6]), np.int64(10**12), (5,)])
def test_targets_out_of_range_are_index_errors_that_say_what_there_is(target: Any) -> None:
    with pytest.raises(
        TargetRangeError, match=r"outside the model's outputs of shape \(5,\)"
    ) as caught:
        per_example(target, torch.zeros(2, 5))
    assert isinstance(caught.value, IndexError)


def test_an_output_without_batch_has_no_targets() -> None:
    with pytest.raises(TargetError, match="one number for the whole batch"):
        per_example(0, torch.tensor(1.0))


def test_target_index_counts_from_the_end_for_negative_indices() -> None:
    assert target_index((-1, 0), (2, 3)) == (1, 0)
    assert target_index(None, (1, 1)) == (0, 0)
    assert target_index(None, ()) == ()


def test_target_indices_are_all_or_each_once_in_the_order_given() -> None:
    assert target_indices(None, (2, 2)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert target_indices(None, ()) == [()]
    assert target_indices([2, 0, -1, 2], (3,)) == [(2,), (0,)]
    assert (
        target_indices(1, (3,))
        == target_indices(torch.tensor([1]), (3,))
        == target_indices(np.array(1), (3,))
        == target_indices(range(1, 2), (3,))
        == [(1,)]
    )
    assert target_indices((1, 0), (2, 2)) == [(1, 0)]
    assert target_indices([(1, 0), (0, 0)], (2, 2)) == [(1, 0), (0, 0)]


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([], TargetError, "list of targets is empty"),
        ([0, 7], TargetRangeError, r"target 7 is outside.*\(3,\)"),
        ("all", TargetError, "'all' is a str"),
        (["cat"], TargetError, "'cat' is a str"),
        ((0, 1), TargetError, "2 indices, expected 1"),
        (torch.tensor([0.5]), TargetError, "expected integers"),
    ],
)
def test_target_indices_refuses_unknown_classes(
    targets: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        target_indices(targets, (3,))


def test_target_label_is_what_users_write() -> None:
    assert [target_label(()), target_label((2,)), target_label((1, 2))] == [None, 2, (1, 2)]
