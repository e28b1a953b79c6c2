"""Measures of similarity: by hand, and against SciPy, scikit-image and NumPy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import normal

from captum_mipin.metrics.similarity import (
    _scaled,
    cosine,
    spearman,
    ssim,
    ssim_inputs,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(2, 12), st.integers(0, 2**31), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_spearman_is_that_of_scipy(size, seed, levels):
    stats = pytest.importorskip(
        "scipy.stats", reason="independent rank correlations to compare with"
    )
    a, b = (
        (levels * torch.rand(2, 3, size, generator=generator(seed), dtype=torch.float64))
        .round()
        .unbind()
    )
    for x, y, found in zip(a, b, spearman(a, b), strict=True):
        if len(x.unique()) == 1 or len(y.unique()) == 1:
            assert found.isnan()
        else:
            assert float(found) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="an independent SSIM to compare with")
    a, b = normal(4, 12, 9, dtype=torch.float64), normal(4, 12, 9, seed=1, dtype=torch.float64)
    for window in (3, 5, 7):
        expected = [
            metrics.structural_similarity(
                _scaled(x[None])[0].numpy(),
                _scaled(y[None])[0].numpy(),
                win_size=window,
                data_range=1,
            )
            for x, y in zip(a, b, strict=True)
        ]
        assert ssim(a, b, window).tolist() == pytest.approx(expected)


def test_ssim_by_hand():
    """One window: maps of opposite 0 and 1 have means m, 1 − m, variance v, covariance −v."""
    a = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])[None]
    m, v = 4 / 9, (4 / 9) * (5 / 9) * 9 / 8
    expected = (
        (2 * m * (1 - m) + 1e-4) * (-2 * v + 9e-4) / ((m**2 + (1 - m) ** 2 + 1e-4) * (2 * v + 9e-4))
    )
    assert float(ssim(a, 1 - a, 3)) == pytest.approx(expected)
    assert float(ssim(a, 7 * a + 2, 3)) == pytest.approx(1)
    constant = torch.full_like(a, 5.0)
    assert float(ssim(constant, constant, 3)) == 1
    assert math.isnan(ssim(torch.full_like(a, math.nan), a, 3))
    for (height, width), window in {(224, 224): 5, (7, 4): 3, (3, 9): 3}.items():
        maps = (torch.zeros(1, height, width),)
        assert ssim_inputs(maps, maps, torch.zeros(1, 1, height, width))[2] == window
    for size in ((2, 9), (1, 1), (9,)):
        maps = (torch.zeros(1, *size),)
        assert ssim_inputs(maps, maps, torch.zeros(1, *size)) is None


def test_maps_are_cut_at_percentiles_1_and_99():
    """Of the numbers from 0 to 100, these are 1 and 99."""
    x = torch.arange(101.0, dtype=torch.float64).flip(0).view(1, 101, 1)
    torch.testing.assert_close(_scaled(x), ((x - 1) / 98).clamp(0, 1))
    assert not _scaled(torch.ones(1, 3, 3)).any()
    x[0, 5] = math.nan
    assert _scaled(x).isnan().all()


def test_cosine_neither_over_nor_underflows():
    a = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    for scale in (1e-200, 1e200, -1.0):
        assert float(cosine(a * scale, a)) == pytest.approx(math.copysign(1, scale))
