"""Infidelity and max-sensitivity: against Captum, closed forms, and each other's batch sizes."""

import math

import pytest
import torch
from captum.attr import InputXGradient, NoiseTunnel, Saliency
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max as captum_sensitivity_max
from small import normal

from captum_mipin.metrics import infidelity, sensitivity_max


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_infidelity_is_captums(mlp):
    x, target = mlp.x[:7], [0, 1, 2, 0, 1, 2, 0]
    method = InputXGradient(mlp.model)

    def perturb(x):
        return 0.1 * torch.ones_like(x), x - 0.1

    maps = method.attribute(x.clone().requires_grad_(), target).detach()
    for normalize in (False, True):
        expected = captum_infidelity(
            mlp.model, perturb, x, maps, target=target, normalize=normalize
        )
        for size in (None, 3):
            result = infidelity(
                method, x, target, perturb=perturb, normalize=normalize, batch_size=size
            )
            torch.testing.assert_close(result.values, expected.double())
    assert result.settings["perturb"] == "perturb"


def test_infidelity_of_known_maps():
    x, weight = normal(6, 5), normal(5, seed=1)
    model = lambda x: x @ weight  # noqa: E731
    assert infidelity(weight.expand(6, 5), x, model=model).mean < 1e-10
    off = infidelity(torch.zeros(6, 5), x, model=model, samples=4000, noise=0.5)
    assert off.mean == pytest.approx(
        0.25 * float(weight @ weight), rel=0.05
    )  # the variance of noise · w
    both = infidelity((weight.expand(6, 5),) * 2, (x, x), model=lambda a, b: (a + b) @ weight)
    assert both.mean < 1e-10


def test_infidelity_does_not_depend_on_the_batch_size(mlp):
    found = [
        infidelity(InputXGradient(mlp.model), mlp.x[:7], 0, batch_size=size).values
        for size in (None, 1, 3, 70)
    ]
    for values in found[1:]:
        torch.testing.assert_close(values, found[0])


def test_infidelity_draws_from_the_generator_alone(mlp, untouched):
    with untouched(mlp.model, mlp.x):
        first, again, other = (
            infidelity(Saliency(mlp.model), mlp.x[:4], 0, generator=generator(s)).values
            for s in (1, 1, 2)
        )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


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
