"""One function, many spellings, one explanation."""

import pytest
import torch
from captum.attr import GuidedBackprop
from designs import aside
from invariance import REFERENCE, SPELLINGS, Spelling, captum, difference, images, network

from captum_mipin import InverseNetwork


def explained(spelling: Spelling) -> tuple[InverseNetwork, list[torch.Tensor]]:
    """Return the inverse of the network in this spelling, and all that it answers."""
    x, inverse = (
        images(48),
        InverseNetwork(network(spelling)).fit(images(48), targets=1, progress=False),
    )
    found = inverse.explain((x[:6],), 1, biases=(False, True))
    return inverse, [found.output, *(s for (s,) in found.signals), inverse.class_attribution(1)]


def fits(inverse: InverseNetwork) -> list[tuple[float, ...]]:
    """Return how well each layer was inverted, without the names and order of the layers."""
    return sorted(
        (fit.rows, fit.features, fit.signals, fit.explained_variance)
        for fit in inverse.report.layers
    )


@pytest.fixture(scope="module")
def reference() -> tuple[InverseNetwork, list[torch.Tensor]]:
    return explained(SPELLINGS[REFERENCE])


@pytest.mark.parametrize(
    "name",
    aside(
        [name for name in SPELLINGS if name != REFERENCE], "F.relu", "torch.relu", "y += x",
        "y.add_(x)", "shortcut first", "F.adaptive_avg_pool2d", "reshape", "nn.Dropout",
    ),
)  # fmt: skip
def test_spelling_of_a_residual_network_does_not_matter(name, reference):
    inverse, found = explained(SPELLINGS[name])
    for ours, expected in zip(found, reference[1], strict=True):
        assert expected.abs().max() > 0
        assert difference(ours, expected) <= 1e-6
    assert torch.tensor(fits(inverse)).numpy() == pytest.approx(
        torch.tensor(fits(reference[0])).numpy(), rel=1e-6
    )


def test_what_looks_at_modules_differs_between_spellings():
    """A method that looks at modules differs: the comparison above can fail."""
    x = images(6)
    one, other = (
        captum(GuidedBackprop, network(SPELLINGS[name]), x, 1) for name in (REFERENCE, "F.relu")
    )
    assert difference(other, one) > 0.1


def test_spellings_are_of_one_function_with_batch_statistics():
    x = images(6)
    outputs = [network(spelling)(x) for spelling in SPELLINGS.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    bn = network(SPELLINGS[REFERENCE]).bn
    assert bn.running_mean.abs().min() > 0
    assert (bn.running_var - 1).abs().min() > 0
    assert (bn.weight - 1).abs().min() > 0
