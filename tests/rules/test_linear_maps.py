"""Copies and mixtures: what comes back, derived from the matrix of each operation."""

import pytest
import torch
from operation_cases import SELECTIONS, Headed, Together, step_of

from captum_mipin.methods import LRP, ExcitationBackprop, GuidedBackprop
from captum_mipin.methods.patterns.table import pattern_rules
from captum_mipin.rules import MIPIN, Options
from captum_mipin.rules.linear_maps import COPIES, MIXES

MAPS = [*COPIES, *MIXES]


def sent_back(name, rule):
    """Return what a rule sends back for a signal, the signal, and the matrix of the operation.

    The matrix is (outputs, inputs), measured input by input on unit vectors.
    """
    step, x = step_of(name)
    one, zero = x[:1], step(torch.zeros_like(x[:1]))
    units = torch.eye(one.numel(), dtype=x.dtype).view(-1, *one.shape)
    matrix = torch.stack([(step(unit) - zero).flatten() for unit in units], 1)
    value, back = rule.run(Options(), lambda parts: step(parts[0]), (one,))
    torch.testing.assert_close(value, step(one))
    s = torch.randn(value.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    (result,) = back(s)
    return result.flatten(), s.flatten(), matrix


@pytest.mark.parametrize("name", MAPS)
def test_copies_and_mixtures_come_back_as_weighted_means(name):
    """Σ_j L_ji S_j / (Σ_i' |L_ji'|), divided by Σ_j |L_ji|; 0 where a sum is 0."""
    result, s, matrix = sent_back(name, MIPIN[name])
    rows, columns = matrix.abs().sum(1), matrix.abs().sum(0)
    expected = matrix.T @ torch.where(rows > 0, s / rows, 0)
    torch.testing.assert_close(result, torch.where(columns > 0, expected / columns, 0))
    assert result.abs().max() <= s.abs().max() * (1 + 1e-9)


@pytest.mark.parametrize("name", MIXES)
def test_pattern_attribution_divides_a_mixture_among_its_terms(name):
    result, s, matrix = sent_back(name, pattern_rules(None, None, attribution=True)[name])
    rows = matrix.abs().sum(1)
    torch.testing.assert_close(result, matrix.T @ torch.where(rows > 0, s / rows, 0))


@pytest.fixture(scope="module")
def networks():
    """A linear layer, one operation without weights, a linear layer: as one network, with inputs.

    All biases are 0, and inputs and weights are positive, so that excitation is defined.
    """
    torch.manual_seed(0)
    names = [*MAPS, *(f"aten.{name}" for name in SELECTIONS), *NEW]
    parts = {name.replace(".", " "): Headed(*step_of(name)) for name in names}
    model = Together(parts).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_() if parameter.ndim == 1 else parameter.abs_()
    return model, tuple(step_of(name)[1][:4].abs() for name in names)


NEW = [
    f"aten.{name}"
    for name in (
        "slice_scatter.default",
        "select_scatter.default",
        "diagonal_scatter.default",
        "scatter.src",
        "index_copy.default",
        "pixel_unshuffle.default",
        "tril.default",
        "diagonal.default",
        "diag_embed.default",
        "rot90.default",
    )
]


def parts_of(model, inputs):
    """Return the output of each part for target 1, (batch,)."""
    pairs = zip(model.parts.values(), inputs, strict=True)
    with torch.no_grad():
        return [part(x)[:, 1] for part, x in pairs]


def test_lrp_conserves_the_relevance_of_every_operation(networks):
    model, inputs = networks
    maps = LRP(model, bias="none").attribute(inputs, target=1)
    for name, a, y in zip(model.parts, maps, parts_of(model, inputs), strict=True):
        torch.testing.assert_close(a.flatten(1).sum(1), y, rtol=1e-4, atol=1e-4, msg=name)


def test_excitation_conserves_the_probability_of_every_operation(networks):
    model, inputs = networks
    maps = ExcitationBackprop(model).attribute(inputs, target=1)
    assert all(bool((a >= 0).all()) for a in maps)
    outputs = parts_of(model, inputs)
    for name, a, y in zip(model.parts, maps, outputs, strict=True):
        torch.testing.assert_close(a.flatten(1).sum(1), y / sum(outputs), msg=name)


def test_guided_backprop_is_the_gradient_where_nothing_rectifies(networks):
    model, inputs = networks
    maps = GuidedBackprop(model).attribute(inputs, target=1)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    gradients = torch.autograd.grad(model(*leaves)[:, 1].sum(), leaves)
    for name, a, g in zip(model.parts, maps, gradients, strict=True):
        torch.testing.assert_close(a, g, msg=name)
