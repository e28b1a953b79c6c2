"""Class sensitivity, max-sensitivity and the measures of likeness: by hand, against SciPy, scikit-image and Captum."""

import math

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, LayerGradCam, NoiseTunnel, Saliency
from captum.metrics import sensitivity_max as captum_sensitivity_max
from hypothesis import given, settings
from hypothesis import strategies as st
from small import normal

from captum_mipin.errors import InputError, TargetError
from captum_mipin.metrics import class_sensitivity, sensitivity_max
from captum_mipin.metrics.similarity import (
    _percentile,
    _scaled,
    cosine,
    spearman,
    ssim,
    ssim_window,
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
    """One window: two maps that are 0 and 1 in opposite places have means m, 1 − m, variance v, covariance −v."""
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
    assert [ssim_window(h, w) for h, w in ((224, 224), (7, 4), (3, 9), (2, 9), (1, 1))] == [
        5,
        3,
        3,
        None,
        None,
    ]


def test_percentiles_are_those_of_numpy():
    x = normal(3, 1000, dtype=torch.float64)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        np.testing.assert_allclose(
            _percentile(x, share)[:, 0], np.percentile(x.numpy(), 100 * share, axis=1)
        )


def test_cosine_neither_over_nor_underflows():
    a = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    for scale in (1e-200, 1e200, -1.0):
        assert float(cosine(a * scale, a)) == pytest.approx(math.copysign(1, scale))


def by_class(*patterns):
    """A method that knows one map a class."""
    maps = torch.stack(patterns)

    def method(inputs, target):
        return maps[torch.as_tensor(target).expand(len(inputs))] * inputs

    return method


def test_class_sensitivity_by_hand():
    one, two = torch.tensor([3.0, 0.0, 1.0]), torch.tensor([0.0, -4.0, 1.0])
    result = class_sensitivity(by_class(one, two), torch.ones(2, 3), 0, 1)
    assert result.values.tolist() == pytest.approx([5, 5])
    by_sum = math.sqrt(0.75**2 + 0.8**2 + (0.25 - 0.2) ** 2)
    assert result.parts["normalised L2"].values.tolist() == pytest.approx([by_sum] * 2)
    assert result.parts["cosine"].mean == pytest.approx(1 / math.sqrt(10 * 17))
    assert "SSIM" not in result.parts
    assert [r.better for r in (result, *result.parts.values())] == ["neither", "higher", "lower"]
    twice = class_sensitivity(by_class(2 * one, 2 * two), torch.ones(2, 3), 0, 1)
    assert twice.mean == pytest.approx(10)
    assert twice.parts["normalised L2"].mean == pytest.approx(by_sum)


def test_a_method_that_does_not_know_the_class_has_known_scores(cnn):
    x = cnn.x[:3]
    result = class_sensitivity(lambda inputs, target: inputs, x, 0, 1)
    assert result.mean == result.parts["normalised L2"].mean == 0
    assert result.parts["cosine"].mean == pytest.approx(1)
    assert result.parts["SSIM"].mean == pytest.approx(1)
    opposite = class_sensitivity(lambda inputs, target: inputs * (1 - 2 * target), x, 0, 1)
    assert opposite.parts["cosine"].mean == pytest.approx(-1)
    assert opposite.parts["normalised L2"].mean == pytest.approx(
        2 * float((x / x.sum((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1).mean())
    )


def test_another_class_is_drawn_for_each_example(mlp):
    x, own = mlp.x[:30], [0, 1, 2] * 10
    found = class_sensitivity(Saliency(mlp.model), x, own, generator=generator(1)).settings["other"]
    assert all(a != b for a, b in zip(own, found, strict=True))
    assert set(found) == {0, 1, 2}
    again, another = (
        class_sensitivity(Saliency(mlp.model), x, own, generator=generator(s)).settings["other"]
        for s in (1, 2)
    )
    assert again == found != another
    assert set(class_sensitivity(Saliency(mlp.model), x, -1).settings["other"]) == {0, 1}


def test_the_same_class_is_no_other(cnn):
    for target, other in (
        ([0, 1, 2], 1),
        (torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0])),
        (1, [0, 1, 2]),
    ):
        result = class_sensitivity(Saliency(cnn.model), cnn.x[:3], target, other)
        assert result.unscored == result.parts["cosine"].unscored == {"same class": (1,)}
    assert result.parts["SSIM"].settings["reduction"] == "sum"


def test_zero_and_broken_maps_are_counted(cnn):
    x = cnn.x[:3].clone()
    x[1] = 0
    result = class_sensitivity(lambda inputs, target: inputs * (1 + target), x, 0, 1)
    assert (
        result.parts["cosine"].unscored
        == result.parts["normalised L2"].unscored
        == {"zero map": (1,)}
    )
    assert result.unscored == result.parts["SSIM"].unscored == {}
    vanishing = class_sensitivity(
        lambda inputs, target: inputs * (1 - target), x, 0, 1
    )  # the second alone is zero
    assert vanishing.parts["cosine"].unscored == {"zero map": (0, 1, 2)}
    x[2, 0, 0, 0] = math.nan
    result = class_sensitivity(lambda inputs, target: inputs * (1 + target), x, 0, 1)
    assert [part.unscored.get("NaN") for part in (result, *result.parts.values())] == [(2,)] * 4


def test_several_inputs_count_together():
    x = (torch.ones(2, 3), torch.ones(2, 4))
    result = class_sensitivity(
        lambda inputs, target: tuple((1 + target) * one for one in inputs), x, 0, 1
    )
    assert result.mean == pytest.approx(math.sqrt(7))


def test_class_sensitivity_of_a_layer_and_of_mip_in(cnn, untouched):
    with untouched(cnn.model, cnn.x):
        layer = class_sensitivity(LayerGradCam(cnn.model, cnn.model[3]), cnn.x[:4], 0, 2)
        ours = class_sensitivity(cnn.mipin, cnn.x[:4], [0, 1, 2, 0], batch_size=3)
    assert layer.settings["maps"] == "1x4x4"
    assert layer.parts["SSIM"].settings["window"] == 3
    assert ours.n == 4


def test_what_has_no_other_class_is_refused(mlp):
    x = mlp.x[:2]
    for bad, error, message in (
        (lambda: class_sensitivity(x, x, 0, 1), InputError, "not maps"),
        (lambda: class_sensitivity(lambda a, b: a, x, 0), InputError, "pass model="),
        (
            lambda: class_sensitivity(lambda a, b: a, x, 0, model=lambda a: a[:, 0]),
            InputError,
            "pass other=",
        ),
        (lambda: class_sensitivity(Saliency(mlp.model), x, [0]), TargetError, "1 targets"),
        (lambda: class_sensitivity(Saliency(mlp.model), x, 0, [1, 2, 0]), TargetError, "3 targets"),
        (lambda: sensitivity_max(x, x, 0), InputError, "not maps"),
        (lambda: sensitivity_max(Saliency(mlp.model), x, 0, radius=-1), InputError, "radius=-1"),
        (lambda: sensitivity_max(Saliency(mlp.model), x, 0, samples=0), InputError, "samples=0"),
        (
            lambda: sensitivity_max(Saliency(mlp.model), x, 0, batch_size=0),
            InputError,
            "batch_size=0",
        ),
    ):
        with pytest.raises(error, match=message):
            bad()


def test_max_sensitivity_is_captums(mlp):
    x, target = mlp.x[:6], [0, 1, 2, 2, 1, 0]
    method = InputXGradient(mlp.model)
    mine = sensitivity_max(method, x, target, generator=generator(3), samples=5)

    random = generator(3)

    def changed(x):
        return (x[0] if isinstance(x, tuple) else x) + (
            2 * torch.rand(30, 6, generator=random) - 1
        ) * 0.02

    def ask(inputs, target):
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        return (method.attribute(inputs.clone().requires_grad_(), target=target),)

    expected = captum_sensitivity_max(ask, x, changed, n_perturb_samples=5, target=target)
    torch.testing.assert_close(mine.values, expected.double())


def test_max_sensitivity_does_not_depend_on_the_batch_size(mlp):
    found = [
        sensitivity_max(Saliency(mlp.model), mlp.x[:7], 0, batch_size=size).values
        for size in (None, 1, 3, 20)
    ]
    for values in found[1:]:
        torch.testing.assert_close(values, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_max_sensitivity_of_maps_of_any_size(scale):
    x = torch.rand(3, 4) + 1
    found, expected = (
        sensitivity_max(lambda inputs, target, s=s: inputs * s, x).values for s in (scale, 1.0)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_max_sensitivity_of_known_maps():
    x = torch.rand(5, 1) + 1
    linear = sensitivity_max(lambda inputs, target: inputs, x, samples=2000, radius=0.1)
    torch.testing.assert_close(linear.values, (0.1 / x[:, 0]).double(), rtol=1e-2, atol=0)
    assert sensitivity_max(lambda inputs, target: 0 * inputs, x).unscored == {
        "zero map": (0, 1, 2, 3, 4)
    }
    broken = sensitivity_max(
        lambda inputs, target: torch.where(inputs > x[2] - 1e-6, math.nan, inputs), x, radius=0
    )
    assert 2 in broken.unscored["NaN"]
    wide = sensitivity_max(lambda inputs, target: inputs, x, samples=9, batch_size=2, radius=0.1)
    assert ((wide.values > 0) & (wide.values <= 0.1 / x[:, 0].double() + 1e-6)).all()


def test_max_sensitivity_takes_targets_arguments_and_several_inputs():
    x, scale = normal(4, 3), torch.arange(1.0, 5.0)[:, None]

    def method(inputs, target, extras):
        first, second = inputs
        assert len(target) == len(extras[0]) == len(first)
        return first * extras[0], second * torch.tensor(target)[:, None]

    result = sensitivity_max(
        method, (x, x), [1, 2, 3, 4], additional_forward_args=scale, batch_size=3, samples=3
    )
    assert result.n == 4


def test_max_sensitivity_draws_from_the_generator_alone(mlp, untouched):
    with untouched(mlp.model, mlp.x):
        first, again, other = (
            sensitivity_max(mlp.mipin, mlp.x[:3], 0, generator=generator(s), samples=3).values
            for s in (1, 1, 2)
        )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sensitivity_max(NoiseTunnel(Saliency(mlp.model)), mlp.x[:3], 0, samples=2).n == 3
