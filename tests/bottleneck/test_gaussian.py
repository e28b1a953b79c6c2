"""The bottleneck's formulas and its optimisation, against other derivations of them."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm
from small import normal
from torch.nn import functional as F

from captum_mipin.bottleneck.gaussian import (
    Bottleneck,
    CrossEntropy,
    Noise,
    information,
    mask,
    optimise,
    smooth,
)
from captum_mipin.errors import FitError, InputError, TargetError
from captum_mipin.regression.statistics import Statistics

DOUBLE = torch.float64


def standard(*shape, dtype=DOUBLE):
    return Noise(
        torch.zeros(shape, dtype=dtype),
        torch.ones(shape, dtype=dtype),
        torch.ones(shape, dtype=torch.bool),
    )


def double(value):
    return torch.tensor(value, dtype=DOUBLE)


# ---------------------------------------------------------------------- information


@pytest.mark.parametrize("prior", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("passed", [1e-6, 0.2, 0.7, 0.999])
@pytest.mark.parametrize("r", [-3.0, 0.0, 1.5])
def test_information_is_the_kl_divergence_by_numerical_integration(r, passed, prior):
    p = norm(passed * r, 1 - passed)
    q = norm(prior * passed * r, 1 - prior * passed)
    low, high = p.ppf(1e-15), p.isf(1e-15)
    expected, _ = quad(
        lambda z: p.pdf(z) * (p.logpdf(z) - q.logpdf(z)), low, high, epsabs=1e-12, limit=400
    )
    found = information(double(r), double(passed), double(1 - passed), double(prior))
    assert float(found) == pytest.approx(expected, abs=1e-9)


def test_nothing_is_told_where_nothing_passes():
    passed, blocked = mask(torch.full((3,), -60.0), 0.0, ())
    assert torch.equal(information(normal(3), passed, blocked), torch.zeros(3))


def test_nothing_is_told_beyond_what_is_known():
    alpha = normal(50, seed=1)
    found = information(3 * normal(50), *mask(alpha, 0.0, ()), prior=torch.ones(50))
    torch.testing.assert_close(found, torch.zeros(50), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_wide_open_mask_tells_much_and_finitely(dtype):
    """As λ → 1 the information is −log(1 − λ) + (r² − 1)/2, and 1 − λ = exp(−α)."""
    r = normal(5, dtype=dtype)
    for alpha in (20.0, 40.0, 80.0):
        found = information(r, *mask(torch.full((5,), alpha, dtype=dtype), 0.0, ()))
        torch.testing.assert_close(found, alpha + (r**2 - 1) / 2, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(information(r, *mask(torch.full((5,), 1e9, dtype=dtype), 0.0, ()))).all()


def test_its_gradient_is_finite_however_open_the_mask():
    for start in (-200.0, 0.0, 79.0, 200.0):
        alpha = torch.full((4, 6, 6), start, requires_grad=True)
        told = information(normal(4, 6, 6), *mask(alpha, 1.0, (1, 2)))
        (gradient,) = torch.autograd.grad(told.sum(), alpha)
        assert torch.isfinite(gradient).all()


# ---------------------------------------------------------------------- smoothing


def test_smoothing_is_a_two_dimensional_gaussian_of_five_by_five():
    x = normal(2, 3, 6, 7, dtype=DOUBLE)
    at = torch.arange(5, dtype=DOUBLE) - 2
    kernel = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 5, 5)
    expected = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    torch.testing.assert_close(smooth(x, 1.0, (2, 3)), expected)


def test_both_sides_of_a_smoothed_mask_sum_to_one():
    passed, blocked = mask(5 * normal(2, 3, 6, 7, dtype=DOUBLE), 1.0, (2, 3))
    torch.testing.assert_close(passed + blocked, torch.ones_like(passed), rtol=1e-14, atol=1e-14)


def test_a_map_too_small_to_smooth():
    with pytest.raises(
        InputError,
        match=r"map of 2 positions cannot be smoothed with sigma=1.*Bottleneck\(sigma=0\)",
    ):
        smooth(normal(1, 2, 2, 2), 1.0, (2, 3))


# ---------------------------------------------------------------------- optimisation


def linear(weight, bias=60.0):
    """Return the cross entropy of logits (0, y) and class 0: about y = bias + w z if y is large."""
    return lambda z: F.softplus(bias + (z * weight).flatten(2).sum(2)).mean(0)


def best(slope, r, beta):
    """Return the λ that minimises slope · λ + β KL.

    There, slope + β (1/(1 − λ) − (1 − λ) + λ r²) = 0.
    """

    def derivative(passed):
        return slope + beta * (1 / (1 - passed) - (1 - passed) + passed * r**2)

    return brentq(derivative, 0, 1 - 1e-12) if derivative(0) < 0 else 0.0


def test_the_mask_of_a_linear_model_with_gaussian_noise_is_the_best_one():
    """The expected cross entropy is linear in λ: each element has an equation of its own."""
    x = double([[1.5, -0.7, 2.0, 0.4, -1.2]])
    weight = double([-2.0, 3.0, 0.0, 5.0, 0.5])
    noise = replace(
        standard(5), mean=double([0.5, 0.0, 1.0, -0.2, 0.0]), std=double([1.0, 2.0, 0.5, 0.7, 1.0])
    )
    how = Bottleneck(beta=4.0, steps=1500, learning_rate=0.05, copies=300, sigma=0, start=0)
    found = optimise(x, noise, linear(weight), how)
    r = (x[0] - noise.mean) / noise.std
    expected = [
        best(float(w * s * q), float(q), 4.0 / 5)
        for w, s, q in zip(weight, noise.std, r, strict=True)
    ]
    assert sum(value > 0.1 for value in expected) == 3  # two of the five are of no use
    assert found.alpha[0].sigmoid().tolist() == pytest.approx(expected, abs=0.015)
    told = [norm_kl(value, float(q)) / math.log(2) for value, q in zip(expected, r, strict=True)]
    assert found.information[0].tolist() == pytest.approx(told, abs=0.03)


def norm_kl(passed, r):
    return -0.5 * (1 + 2 * math.log(1 - passed) - (1 - passed) ** 2 - (passed * r) ** 2)


def test_total_information_falls_as_beta_rises():
    x, weight = 2 * normal(3, 20, dtype=DOUBLE), normal(20, seed=1, dtype=DOUBLE)
    found = [
        optimise(
            x,
            standard(20),
            linear(weight),
            Bottleneck(beta=beta, steps=400, copies=50, sigma=0, learning_rate=0.1),
        )
        for beta in (0.1, 1.0, 10.0, 100.0)
    ]
    totals = torch.stack([part.information.sum(1) for part in found])
    assert (totals[1:] < totals[:-1]).all()
    assert (totals[-1] < 0.02 * totals[0]).all()


@pytest.mark.parametrize("start", [-60.0, 40.0])
def test_limits_of_the_mask(start):
    """λ → 0 leaves noise alone, λ → 1 the tensor itself."""
    seen = []

    def cross_entropy(z):
        seen.append(z.detach())
        return z.flatten(2).sum(2).mean(0)

    x = normal(4, 3, 5, 5, dtype=DOUBLE)
    noise = replace(standard(3, 5, 5), mean=torch.full((3, 5, 5), 7.0, dtype=DOUBLE))
    found = optimise(
        x, noise, cross_entropy, Bottleneck(steps=1, start=start, copies=200), positions=(2, 3)
    )
    if start > 0:
        torch.testing.assert_close(seen[0], x.expand(200, -1, -1, -1, -1))
        assert float(found.information.min()) > 40  # bits: −log2(1 − λ), all but
    else:
        assert torch.equal(seen[0][:, 0], seen[0][:, 1]), "every sample meets the same noise"
        assert float(seen[0].mean()) == pytest.approx(7, abs=0.1)
        assert float(seen[0].std()) == pytest.approx(1, abs=0.1)
        assert torch.equal(found.information, torch.zeros_like(x))


def test_inactive_elements_pass_nothing_and_tell_nothing():
    seen = []

    def cross_entropy(z):
        seen.append(z.detach())
        return z.sum(2).mean(0)

    noise = replace(standard(4), active=torch.tensor([True, False, True, False]))
    found = optimise(normal(2, 4, dtype=DOUBLE), noise, cross_entropy, Bottleneck(steps=2, sigma=0))
    assert all((z[..., 1::2] == 0).all() and (z[..., ::2] != 0).all() for z in seen)
    assert (found.information[:, 1::2] == 0).all()
    assert (found.information[:, ::2] > 0).all()


def test_samples_have_no_part_in_each_other():
    x, weight = normal(5, 2, 6, 6, dtype=DOUBLE), normal(2, 6, 6, seed=1, dtype=DOUBLE)
    how = Bottleneck(tolerance=0.02, steps=40, learning_rate=0.5)
    together = optimise(x, standard(2, 6, 6), linear(weight), how, positions=(2, 3))
    alone = [
        optimise(part, standard(2, 6, 6), linear(weight), how, positions=(2, 3))
        for part in x.split(1)
    ]
    for name in ("information", "alpha"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(part, name) for part in alone])
        )
    losses = torch.cat([part.losses for part in alone], 1)
    torch.testing.assert_close(together.losses, losses, equal_nan=True)
    stops = (~losses.isnan()).sum(0)
    assert len(set(stops.tolist())) > 1, "the samples should stop at different steps"
    assert stops.max() < 40
    assert stops.min() >= 6


def test_a_sample_that_has_settled_stays_as_it_is():
    x, weight = normal(1, 8, dtype=DOUBLE), normal(8, seed=1, dtype=DOUBLE)
    how = Bottleneck(tolerance=0.02, steps=40, learning_rate=0.5, sigma=0)
    found = optimise(x, standard(8), linear(weight), how)
    taken = int((~found.losses.isnan()).sum())
    assert taken < 40
    same = optimise(x, standard(8), linear(weight), replace(how, tolerance=None, steps=taken - 1))
    assert torch.equal(found.alpha, same.alpha)
    torch.testing.assert_close(found.losses[: taken - 1], same.losses)


def test_bits_are_those_of_the_last_forward_pass_and_masks_have_taken_its_step():
    """As in the released code: it reports what the last forward pass measured."""
    x, weight = normal(3, 8, dtype=DOUBLE), normal(8, seed=1, dtype=DOUBLE)
    how = Bottleneck(sigma=0, learning_rate=0.5)
    results = [
        optimise(x, standard(8), linear(weight), replace(how, steps=steps)) for steps in (4, 5)
    ]
    before, after = (information(x, *mask(result.alpha, 0, ())) / math.log(2) for result in results)
    torch.testing.assert_close(results[1].information, before)
    assert float((results[1].information - after).abs().max()) > 0.1


def test_a_sample_that_has_settled_may_overflow_while_others_go_on():
    """Alone it would not be asked again."""
    steps = []

    def cross_entropy(z):
        steps.append(len(steps))
        first = float("nan") if len(steps) == 9 else 1.0
        return z.sum(2).mean(0) * 0 + torch.tensor([first, 10.0 ** len(steps)])

    how = Bottleneck(beta=0.0, steps=12, sigma=0, tolerance=1e-3)
    found = optimise(normal(2, 3), standard(3, dtype=torch.float32), cross_entropy, how)
    assert (~found.losses.isnan()).sum(0).tolist() == [6, 12]
    assert torch.isfinite(found.information).all()


def test_it_stops_at_no_step_by_default():
    how = Bottleneck(steps=30, beta=0.0, sigma=0)
    found = optimise(
        normal(2, 3), standard(3, dtype=torch.float32), lambda z: z.sum(2).mean(0) * 0, how
    )
    assert not found.losses.isnan().any()


def test_a_loss_that_is_not_finite_names_the_sample_and_the_step():
    x = normal(4, 6)
    calls = []

    def cross_entropy(z):
        calls.append(z)
        bad = torch.tensor([1.0, 1.0, float("nan") if len(calls) == 3 else 1.0, 1.0])
        return z.sum(2).mean(0) * bad

    message = (
        r"loss of sample 12 or its gradient is NaN or Inf at step 2.*overflow when the "
        "bottleneck's noise"
    )
    with pytest.raises(InputError, match=message):
        optimise(x, standard(6, dtype=torch.float32), cross_entropy, Bottleneck(sigma=0), first=10)


def test_adam_is_the_published_one():
    """The first steps by hand: with bias correction, each has the length of the learning rate."""
    x = normal(1, 4, dtype=DOUBLE)
    found = optimise(
        x,
        standard(4),
        lambda z: 0 * z.sum(2).mean(0),
        Bottleneck(steps=3, sigma=0, learning_rate=0.25),
    )
    torch.testing.assert_close(
        found.alpha, torch.full((1, 4), 5 - 3 * 0.25, dtype=DOUBLE), rtol=0.02, atol=0
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", -1),
        ("beta", float("nan")),
        ("steps", -1),
        ("learning_rate", 0),
        ("copies", 0),
        ("sigma", -1),
        ("start", float("inf")),
        ("start", 100),
        ("tolerance", 0),
        ("steps", 2.5),
        ("copies", 2.0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(InputError, match=rf"{name}=.* must be"):
        Bottleneck(**{name: value})


# ---------------------------------------------------------------------- cross entropy


def test_cross_entropy_is_torchs():
    copies, targets = normal(6, 4, 3, dtype=DOUBLE), [2, 0, 1, 2]
    entropy = CrossEntropy(copies[0], [(t,) for t in targets])
    labels = torch.tensor(targets).repeat(6)
    expected = F.cross_entropy(copies.flatten(0, 1), labels, reduction="none").view(6, 4).mean(0)
    torch.testing.assert_close(entropy(copies.flatten(0, 1)), expected)


@pytest.mark.parametrize("classes", [1, 2, -1])
def test_cross_entropy_of_outputs_of_more_dimensions(classes):
    copies, targets = normal(6, 4, 3, 5, dtype=DOUBLE), [(2, 4), (0, 0), (1, 3), (2, 1)]
    found = CrossEntropy(copies[0], targets, classes)(copies.flatten(0, 1))
    logs = copies.log_softmax(2 if classes == 1 else 3)
    expected = torch.stack([-logs[:, i, a, b].mean() for i, (a, b) in enumerate(targets)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_single_logit_says_yes_or_no(shape):
    logits = double([2.0, -1.0, 0.5, -3.0]).view(shape)
    entropy = CrossEntropy(logits, [(0,) * (len(shape) - 1)] * 4)
    copies = normal(6, *shape, dtype=DOUBLE)
    labels = (logits > 0).to(DOUBLE).expand(6, *shape)
    expected = (
        F.binary_cross_entropy_with_logits(copies, labels, reduction="none").reshape(6, 4).mean(0)
    )
    torch.testing.assert_close(entropy(copies.flatten(0, 1)), expected)


@pytest.mark.parametrize("classes", [0, 1, 3, -4])
def test_a_dimension_that_holds_no_classes(classes):
    with pytest.raises(
        TargetError,
        match=rf"shape \(2, 1, 5\), so dimension {classes} cannot hold the classes.*classes=",
    ):
        CrossEntropy(normal(2, 1, 5), [(0, 0), (0, 1)], classes)


# ---------------------------------------------------------------------- statistics


@pytest.mark.parametrize("across", [(), (1,), (2, 3)])
def test_statistics_are_those_of_all_data_however_it_is_cut(across):
    x = normal(50, 3, 4, 5, dtype=DOUBLE).relu() * 3 + 1e6 * (
        normal(1, 3, 4, 5, seed=1, dtype=DOUBLE) > 0
    )
    dims = (0, *across)
    for cuts in ([50], [1] * 50, [20, 1, 29]):
        parts = [Statistics.of(part, across) for part in x.split(cuts)]
        found = parts[0]
        for part in parts[1:]:
            found = found.merged(part)
        torch.testing.assert_close(found.mean, x.mean(dims, keepdim=True)[0], rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(found.std, x.std(dims, keepdim=True)[0], rtol=1e-7, atol=1e-7)
        assert torch.equal(found.nonzero, (x != 0).sum(dims, keepdim=True)[0])
        assert found.count == x.numel() // found.mean.numel()


def test_float32_data_far_from_zero_keeps_its_standard_deviation():
    x = (normal(1000, 2) + 3e4).float()
    torch.testing.assert_close(Statistics.of(x).std, x.double().std(0))


def test_one_value_has_no_standard_deviation():
    with pytest.raises(FitError, match="1 example, expected at least two"):
        _ = Statistics.of(normal(1, 4)).std
