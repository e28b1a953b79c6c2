"""Maps reduced over channels, resized and sorted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import normal

from captum_mipin.errors import InputError
from captum_mipin.metrics import bounding_box_accuracy
from captum_mipin.metrics.maps import heat, hottest_first, positions


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_reductions_by_hand():
    maps = torch.tensor([1.0, -3.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    found = {
        r: heat(maps, maps, r)[0, 0, 0].item()
        for r in ("sum", "relu_of_sum", "sum_of_relu", "sum_of_abs", "max_of_abs")
    }
    assert found == {
        "sum": -1,
        "relu_of_sum": 0,
        "sum_of_relu": 2,
        "sum_of_abs": 5,
        "max_of_abs": 3,
    }
    assert torch.equal(
        heat(maps, maps, lambda m: m[:, 1])[0], torch.full((2, 2), -3.0, dtype=torch.float64)
    )
    assert heat(maps[:, 0], maps, "sum_of_abs").shape == (1, 2, 2)
    assert heat(normal(2, 5), normal(2, 5)).shape == (2, 5)


def test_tokens_are_not_taken_for_pixels():
    """A transformer's layer gives (examples, tokens, features), like maps without channels."""
    x = torch.zeros(2, 3, 32, 32)
    with pytest.raises(InputError, match="do not have the proportions"):
        bounding_box_accuracy(normal(2, 17, 64), x, boxes=[(0, 0, 8, 8)] * 2)
    for places in ((4, 4), (3, 4), (13, 13), (40, 40)):
        assert bounding_box_accuracy(normal(2, *places), x, boxes=[(0, 0, 8, 8)] * 2).n == 2


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_maps_of_any_dtype(dtype):
    maps = torch.arange(64).view(1, 1, 8, 8).to(dtype)
    result = bounding_box_accuracy(maps, maps.float(), boxes=[(0, 7, 8, 8)])
    assert result.values.dtype == torch.float64
    assert result.mean == pytest.approx(1 if dtype != torch.bool else 1 / 63 * 8)


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_orders_are_those_of_stable_sorts(count, places, levels, seed):
    heat, random = (
        (levels * torch.rand(count, places, generator=generator(seed + i))).round() for i in (0, 1)
    )
    expected = [
        np.lexsort((b, -a)).tolist() for a, b in zip(heat.numpy(), random.numpy(), strict=True)
    ]
    assert hottest_first(heat, random).tolist() == expected
    order = hottest_first(heat, random)
    assert torch.equal(positions(order), order.argsort())
