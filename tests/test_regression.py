import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_mipin.regression import Moments, solve

FIELDS = ("mean_x", "mean_s", "xx", "xs", "ss")


def rows(seed, groups=2, n=60, dx=3, ds=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(groups, n, ds, generator=generator, dtype=dtype)
    x = torch.randn(groups, n, dx, generator=generator, dtype=dtype) + s[..., :dx] + 2
    return x, s


def moments(x, s):
    result = Moments.zeros(len(x), x.shape[2], s.shape[2])
    result.update(x, s)
    return result


def close(a, b, tolerance=1e-10):
    assert a.count == b.count
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)


def test_moments_are_those_of_numpy():
    x, s = rows(0)
    found = moments(x, s)
    for g in range(2):
        a, b = x[g].numpy(), s[g].numpy()
        np.testing.assert_allclose(found.mean_x[g], a.mean(0))
        np.testing.assert_allclose(found.ss[g] / 60, np.cov(b.T, bias=True))
        np.testing.assert_allclose(found.xs[g] / 60, np.cov(a.T, b.T, bias=True)[:3, 3:])
        np.testing.assert_allclose(found.xx[g] / 60, a.var(0))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.randoms())
def test_chunks_and_order_do_not_matter(seed, sizes, random):
    x, s = rows(seed, n=sum(sizes))
    whole, parts = moments(x, s), Moments.zeros(2, 3, 4)
    chunks = list(zip(x.split(sizes, 1), s.split(sizes, 1), strict=True))
    random.shuffle(chunks)
    for a, b in chunks:
        parts.update(a, b)
    close(whole, parts)


def test_merging_is_updating():
    x, s = rows(1)
    merged = moments(x[:, :10], s[:, :10])
    merged.add(moments(x[:, 10:], s[:, 10:]))
    merged.add(Moments.zeros(2, 3, 4))
    close(merged, moments(x, s))


def test_no_rows_change_nothing():
    x, s = rows(2)
    found = moments(x, s)
    found.update(x[:, :0], s[:, :0])
    close(found, moments(x, s))


def test_float32_rows_far_from_zero_keep_their_covariance():
    x, s = rows(3, n=4000)
    far = moments((x + 1000).float(), (s + 1000).float())
    exact = moments((x + 1000).float().double(), (s + 1000).float().double())
    torch.testing.assert_close(far.ss, exact.ss, rtol=1e-4, atol=1e-4 * float(exact.ss.abs().max()))


@pytest.mark.parametrize(("scale", "unit"), [("relative", None), ("mean", 1.0), ("sum", 1 / 60)])
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_ridge_is_the_normal_equations(scale, unit, ridge):
    x, s = rows(4)
    solution = solve(moments(x, s), ridge, scale)
    for g in range(2):
        a, b = x[g].numpy(), s[g].numpy()
        covariance = np.cov(b.T, bias=True)
        added = ridge * (unit or covariance.diagonal().mean()) * np.eye(4)
        weight = np.cov(a.T, b.T, bias=True)[:3, 3:] @ np.linalg.inv(covariance + added)
        np.testing.assert_allclose(solution.weight[g], weight, rtol=1e-9)
        np.testing.assert_allclose(solution.bias[g], a.mean(0) - weight @ b.mean(0), rtol=1e-9)
        predicted = b @ weight.T + solution.bias[g].numpy()
        assert np.abs((a - predicted).mean(0)).max() < 1e-12


def test_without_ridge_it_is_least_squares():
    x, s = rows(5, groups=1)
    solution = solve(moments(x, s), 0)
    design = np.hstack([s[0].numpy(), np.ones((60, 1))])
    expected = np.linalg.lstsq(design, x[0].numpy(), rcond=None)[0]
    np.testing.assert_allclose(solution.weight[0], expected[:4].T, rtol=1e-8)
    np.testing.assert_allclose(solution.bias[0], expected[4], rtol=1e-8)
    residual = x[0].numpy() - design @ expected
    assert solution.explained_variance == pytest.approx(1 - (residual**2).sum() / ((x[0] - x[0].mean(0)) ** 2).sum().item())


def test_explained_variance_of_a_ridge_fit_is_that_of_its_predictions():
    x, s = rows(6, groups=1)
    solution = solve(moments(x, s), 0.7)
    residual = x - (s @ solution.weight.mT + solution.bias.unsqueeze(1))
    total = (x - x.mean(1, keepdim=True)).square().sum()
    assert solution.explained_variance == pytest.approx(float(1 - residual.square().sum() / total))


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_signals_that_never_vary_get_zero_and_are_counted(ridge):
    x, s = rows(7)
    s[0, :, 1] = 3.0
    s[:, :, 2] = 0.0
    solution = solve(moments(x, s), ridge)
    assert solution.dead == 3
    assert not solution.weight[0, :, [1, 2]].any()
    assert not solution.weight[1, :, 2].any()
    assert solution.weight[1, :, 1].any()
    assert torch.isfinite(solution.weight).all()
    assert torch.isfinite(solution.bias).all()
    alone = solve(moments(x[:1], s[:1, :, [0, 3]]), ridge)
    torch.testing.assert_close(solution.weight[:1, :, [0, 3]], alone.weight)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_nothing_varies(ridge):
    x, s = torch.ones(1, 9, 2, dtype=torch.float64), torch.zeros(1, 9, 3, dtype=torch.float64)
    solution = solve(moments(x, s), ridge)
    assert not solution.weight.any()
    assert solution.bias.tolist() == [[1.0, 1.0]]
    assert solution.explained_variance == 1.0


def test_scaling_the_signals_does_not_change_a_relative_ridge():
    x, s = rows(8)
    first, second = solve(moments(x, s), 0.1), solve(moments(x, 1e6 * s), 0.1)
    torch.testing.assert_close(first.weight, 1e6 * second.weight)


def test_condition_is_the_1_norm_condition_number():
    x, s = rows(9, groups=1)
    gram = np.cov(s[0].numpy().T, bias=True)
    ridged = gram + 1e-3 * gram.diagonal().mean() * np.eye(4)
    assert solve(moments(x, s)).condition == pytest.approx(np.linalg.cond(ridged, 1))


def test_collinear_signals_without_ridge_give_the_smallest_coefficients():
    x, s = rows(10, groups=1)
    s = torch.cat([s, s[..., :1]], 2)
    solution = solve(moments(x, s), 0)
    torch.testing.assert_close(solution.weight[..., 0], solution.weight[..., 4])


def test_not_finite_is_noticed():
    x, s = rows(11)
    assert moments(x, s).finite()
    s[0, 3, 1] = float("nan")
    assert not moments(x, s).finite()
