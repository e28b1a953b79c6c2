from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_mipin.regression.dual import Rows, solve_rows, solve_table
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import solve

FIELDS = ("mean_z", "mean_s", "zz", "zs", "ss")


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
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance
        )


def test_moments_are_those_of_numpy():
    x, s = rows(0)
    result = moments(x, s)
    for g in range(2):
        a, b = x[g].numpy(), s[g].numpy()
        np.testing.assert_allclose(result.mean_z[g, 0], a.mean(0))
        np.testing.assert_allclose(result.ss[g] / 60, np.cov(b.T, bias=True))
        np.testing.assert_allclose(result.zs[g, 0] / 60, np.cov(a.T, b.T, bias=True)[:3, 3:])
        np.testing.assert_allclose(result.zz[g, :, 0, 0] / 60, a.var(0))


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
    result = moments(x, s)
    result.update(x[:, :0], s[:, :0])
    close(result, moments(x, s))


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
    assert solution.explained_variance == pytest.approx(
        1 - (residual**2).sum() / ((x[0] - x[0].mean(0)) ** 2).sum().item()
    )


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


@pytest.mark.parametrize("size", [1, 2, 7, 60])
def test_the_condition_of_ill_scaled_signals_is_hardly_underestimated(size):
    torch.manual_seed(size)
    s = (
        torch.randn(1, 100, size, dtype=torch.float64)
        * torch.logspace(0, 3, size, dtype=torch.float64)
        @ torch.randn(size, size).double()
    )
    gram = np.cov(s[0].numpy().T, bias=True).reshape(size, size)
    exact = np.linalg.cond(gram + 1e-6 * gram.diagonal().mean() * np.eye(size), 1)
    assert exact / 2 <= solve(moments(s, s), 1e-6).condition <= exact * (1 + 1e-9)


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


def with_own(seed, groups=2, n=70, dx=3, ds=4, branches=2):
    """Rows whose own signals go together with x, with s and with each other."""
    x, s = rows(seed, groups, n, dx, ds)
    own = [x * (j + 1) + torch.randn_like(x) + s[..., :dx] + 3 for j in range(branches)]
    return x, s, own


def moments_with_own(x, s, own):
    result = Moments.zeros(len(x), x.shape[2], s.shape[2], len(own))
    result.update(x, s, own)
    return result


def one_design(x, s, own, penalty, own_penalty):
    """Each feature regressed alone, by NumPy, on all its signals at once, shared and own."""
    weights, owns, biases = [], [], []
    for feature in range(x.shape[2]):
        design = np.hstack([s[0].numpy(), *(o[0, :, feature : feature + 1].numpy() for o in own)])
        target = x[0, :, feature].numpy()
        centred = design - design.mean(0)
        added = np.diag([penalty] * s.shape[2] + [own_penalty(feature)] * len(own))
        gram = centred.T @ centred / len(target) + added
        theta = np.linalg.solve(gram, centred.T @ (target - target.mean()) / len(target))
        weights.append(theta[: s.shape[2]])
        owns.append(theta[s.shape[2] :])
        biases.append(target.mean() - theta @ design.mean(0))
    return np.stack(weights), np.stack(owns), np.stack(biases)


@pytest.mark.parametrize("scale", ["relative", "mean", "sum"])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_shared_and_own_signals_are_one_regression(ridge, scale):
    x, s, own = with_own(12, groups=1)
    solution = solve(moments_with_own(x, s, own), ridge, scale)
    unit = {"relative": s[0].var(0, correction=0).mean().item(), "mean": 1.0, "sum": 1 / 70}[scale]

    def own_unit(feature):
        variance = torch.stack([o[0, :, feature] for o in own]).var(1, correction=0).mean().item()
        return ridge * {"relative": variance, "mean": 1.0, "sum": 1 / 70}[scale]

    weight, of_own, bias = one_design(x, s, own, ridge * unit, own_unit)
    np.testing.assert_allclose(solution.weight[0], weight, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(solution.own[0], of_own, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(solution.bias[0], bias, rtol=1e-7)
    predicted = (
        s @ solution.weight.mT
        + solution.bias
        + sum(o * solution.own[..., j] for j, o in enumerate(own))
    )
    total = (x - x.mean(1, keepdim=True)).square().sum()
    assert solution.explained_variance == pytest.approx(
        float(1 - (x - predicted).square().sum() / total)
    )


def test_own_signals_alone_are_a_regression_a_feature():
    x, s, own = with_own(13, groups=1)
    solution = solve(moments_with_own(x, s[..., :0], own), 0)
    for feature in range(3):
        design = np.hstack(
            [*(o[0, :, feature : feature + 1].numpy() for o in own), np.ones((70, 1))]
        )
        expected = np.linalg.lstsq(design, x[0, :, feature].numpy(), rcond=None)[0]
        np.testing.assert_allclose(solution.own[0, feature], expected[:2])
        np.testing.assert_allclose(solution.bias[0, feature], expected[2])


def test_moments_with_own_signals_merge():
    x, s, own = with_own(14)
    merged = moments_with_own(x[:, :9], s[:, :9], [o[:, :9] for o in own])
    merged.add(moments_with_own(x[:, 9:], s[:, 9:], [o[:, 9:] for o in own]))
    close(merged, moments_with_own(x, s, own))


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_own_signals_that_bring_nothing_are_harmless(ridge):
    """One that never varies, one that a shared signal equals: no division by nothing."""
    x, s, own = with_own(15, groups=1)
    own = [torch.full_like(x, 2.0), s[..., :3].contiguous()]
    solution = solve(moments_with_own(x, s, own), ridge)
    assert not solution.own[..., 0].any()
    assert solution.dead == 3
    predicted = s @ solution.weight.mT + solution.bias + own[1] * solution.own[..., 1]
    alone = solve(moments(x, s), ridge)
    torch.testing.assert_close(
        predicted, s @ alone.weight.mT + alone.bias, rtol=1e-2, atol=1e-2 if ridge else 1e-9
    )
    assert abs(solution.own[..., 1]).max() < (
        1 if ridge else 1e-12
    )  # without ridge, what s explains gets nothing


def test_moments_put_in_their_places():
    x, s = rows(16)
    wide = torch.zeros(2, 60, 7, dtype=torch.float64)
    wide[..., [5, 0, 2, 3]] = s
    places = (torch.tensor([5, 0, 2, 3]), 7)
    some = replace(moments(x, s), live=places)
    close(some.whole(), moments(x, wide))
    for ridge in (0.0, 1e-3):
        expected, result = solve(moments(x, wide), ridge), solve(some, ridge)
        torch.testing.assert_close(
            result.weight, expected.weight[..., places[0]], rtol=1e-9, atol=1e-12
        )
        assert (result.dead, result.live.tolist()) == (expected.dead, [5, 0, 2, 3])
    more = moments(x, s)
    more.live = places
    more.add(some)
    assert more.live is places
    more.add(moments(x, wide))
    assert more.live is None
    three = moments(x, wide)
    three.add(some)
    three.add(some)
    close(more, three)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("scale", ["relative", "mean", "sum"])
@pytest.mark.parametrize("count", [2, 5, 11])
def test_the_dual_is_the_same_regression(ridge, scale, count):
    torch.manual_seed(count)
    x, s = (
        torch.randn(count, 7, dtype=torch.float64) + 3,
        torch.randn(count, 12, dtype=torch.float64) @ torch.randn(12, 12).double() - 2,
    )
    s[:, 4], s[:, 7] = 5.0, 0.0  # never vary
    gathered = Moments.zeros(1, 7, 12)
    gathered.update(x[None], s[None])
    primal = solve(gathered, ridge, scale)
    rows = Rows(x)
    dual = solve_rows(rows, s, ridge, scale)
    weight = rows.x.mT @ dual.coefficients
    torch.testing.assert_close(weight, primal.weight[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(dual.bias, primal.bias[0], rtol=1e-6, atol=1e-8)
    assert dual.explained_variance == pytest.approx(primal.explained_variance, abs=1e-7)
    assert dual.dead == primal.dead == 2
    assert not weight[:, [4, 7]].any()
    assert dual.condition >= 1 - 1e-12


@pytest.mark.parametrize("scale", ["relative", "mean", "sum"])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("branches", [0, 1, 2])
def test_the_dual_with_own_signals_is_the_same_regression(ridge, scale, branches):
    x, s, own = with_own(20, groups=1, n=9, ds=12, branches=branches)
    s[..., 4], s[..., 7] = 5.0, 0.0  # never vary
    primal = solve(moments_with_own(x, s, own), ridge, scale)
    dual = solve_table(torch.cat([x, *own]), s[0], ridge, scale)
    for name in ("weight", "own", "bias"):
        torch.testing.assert_close(getattr(dual, name), getattr(primal, name), rtol=1e-9, atol=1e-9)
    assert dual.explained_variance == pytest.approx(primal.explained_variance, abs=1e-10)
    assert dual.dead == primal.dead == 2
    assert not dual.weight[..., [4, 7]].any()


def test_float32_rows_far_from_zero_are_solved_as_in_float64():
    x, s, own = with_own(21, groups=1, n=9, ds=12)
    z, s = (torch.cat([x, *own]) + 1000).float(), (s[0] + 1000).float()
    single, exact = solve_table(z, s), solve_table(z.double(), s.double())
    torch.testing.assert_close(single.weight, exact.weight, rtol=1e-12, atol=1e-12)


def test_the_dual_of_constant_features_or_signals_is_their_mean():
    rows, s = Rows(torch.ones(3, 2, dtype=torch.float64)), torch.randn(3, 9, dtype=torch.float64)
    solution = solve_rows(rows, s)
    assert solution.explained_variance == 1.0
    assert solution.bias.tolist() == [1.0, 1.0]
    x = torch.randn(3, 2, dtype=torch.float64)
    solution = solve_rows(Rows(x), torch.ones(3, 9, dtype=torch.float64))
    assert not solution.coefficients.any()
    torch.testing.assert_close(solution.bias, x.mean(0))
    assert solution.explained_variance == pytest.approx(0.0)


def hard(rows, dtype):
    """Nearly collinear signals on scales from 1e-3 to 1e3, far from zero.

    Returns their moments in chunks, the sums of all at once in float64, and the scales.
    """
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-3, 3, 6, dtype=torch.float64)
    mixed = torch.eye(6, dtype=torch.float64)
    mixed[0, 1] = mixed[2, 3] = 30.0
    s = torch.randn(rows, 6, dtype=torch.float64, generator=generator) @ mixed
    s = ((s + 3) * scales).to(dtype)
    x = (s.double() / scales) @ torch.randn(6, 4, dtype=torch.float64, generator=generator) + 2
    x = (x + 0.1 * torch.randn(rows, 4, dtype=torch.float64, generator=generator)).to(dtype)
    gathered = Moments.zeros(1, 4, 6)
    for start in range(0, rows, 4096):
        part = slice(start, start + 4096)
        gathered.update(x[None, part], s[None, part])
    a, b = s.double() - s.double().mean(0), x.double() - x.double().mean(0)
    return gathered, a.mT @ a, b.mT @ a, scales


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", [1000, 1_000_000])
def test_streamed_moments_of_hard_data_are_within_the_stated_bound(rows, dtype, bound):
    """Relative to the standard deviations of what is multiplied."""
    gathered, ss, xs, _ = hard(rows, dtype)
    of_s, of_x = ss.diagonal().sqrt(), gathered.zz[0, :, 0, 0].sqrt()
    assert ((gathered.ss[0] - ss).abs() / of_s / of_s[:, None]).max() < bound
    assert ((gathered.zs[0, 0] - xs).abs() / of_s / of_x[:, None]).max() < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_solution_for_hard_data_is_as_exact_as_its_condition_lets_it_be(dtype, bound):
    gathered, ss, xs, _ = hard(100_000, dtype)
    solution = solve(gathered, 1e-3)
    scaled = ss / 100_000
    reference = torch.linalg.solve(
        scaled + 1e-3 * scaled.diagonal().mean() * torch.eye(6), (xs / 100_000).mT
    ).mT
    assert ((solution.weight[0] - reference).norm() / reference.norm()) < bound * solution.condition
