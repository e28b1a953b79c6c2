"""Arguments that all examples share, in batches of any size, also that of the argument's length."""

from typing import Any

import pytest
import torch
from small import Function, Weighted, normal
from torch import Tensor, nn

from captum_mipin import IBA, InverseNetwork, MIPINAttribution, NeighbourInverse
from captum_mipin.attribution import LayerMIPINAttribution
from captum_mipin.bottleneck import Bottleneck
from captum_mipin.methods import LRP, GuidedBackprop, SmoothGrad

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
WEIGHTS, CLASSES = torch.arange(1.0, 5.0), [1, 0, 1, 0]


def _batches(weights: Tensor, size: int = 8) -> Any:
    """Return data with the argument in each batch, and how it is unpacked."""
    return [(x, weights) for x in X.split(size)], lambda batch: (batch[0], batch[1])


def _mipin(model: nn.Module) -> Any:
    data, unpack = _batches(WEIGHTS)
    inverse = InverseNetwork(model).fit(data, [0, 1], unpack=unpack, progress=False)
    return MIPINAttribution(model, inverse).attribute


def _neighbours(model: nn.Module) -> Any:
    data, unpack = _batches(WEIGHTS)
    inverse = NeighbourInverse(model, layer="first", neighbours=20)
    inverse.fit(data, unpack=unpack, progress=False)
    return LayerMIPINAttribution(model, inverse).attribute


def _iba(model: nn.Module) -> Any:
    data, unpack = _batches(WEIGHTS)
    iba = IBA(model, "first", Bottleneck(steps=2, copies=2))
    iba.estimate(data, unpack=unpack, progress=False)
    return lambda *call: iba.attribute(*call, at="layer", internal_batch_size=1)


@pytest.mark.parametrize("make", [_mipin, _neighbours, _iba, lambda model: LRP(model).attribute])
def test_maps_of_a_batch_as_long_as_the_argument_are_those_of_its_examples(make: Any) -> None:
    """Formerly the argument was sorted by class like the examples, and cut into groups like them.

    The graph was that of a batch of another size, in which nothing looked like rows of examples.
    """
    attribute = make(Weighted().eval())
    attribute(X[:8], 0, WEIGHTS)
    together = attribute(X[:4], CLASSES, WEIGHTS)
    alone = [attribute(X[i : i + 1], label, WEIGHTS) for i, label in enumerate(CLASSES)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_fit_on_single_examples_after_one_on_batches() -> None:
    """Formerly the argument of length 1 was doubled with the example."""
    model, fitted = Weighted().eval(), []
    for size in (8, 1):
        data, unpack = _batches(torch.tensor([2.0]), size)
        inverse = InverseNetwork(model).fit(data, 1, unpack=unpack, progress=False)
        fitted.append(inverse.source_signal(X[:3], 1, torch.tensor([2.0])))
    torch.testing.assert_close(fitted[1], fitted[0])


SHARED = {
    "the matrix of a graph": lambda m, x, a: m["last"]((a @ m["first"](x)).relu()).mean(1),
    "the same by einsum": lambda m, x, a: m["last"](
        torch.einsum("ij,njf->nif", a, m["first"](x)).relu()
    ).sum(1),
    "a table of classes": lambda m, x, a: m["first"](x.mean(1)).relu()[:, :5] @ a.T,
}


@pytest.mark.parametrize("name", SHARED)
def test_an_argument_as_long_as_the_batch_is_shared_if_examples_are_alone_with_it(
    name: str,
) -> None:
    """Formerly its rows were taken for examples, which were then found to depend on each other."""
    torch.manual_seed(0)
    parts = {"first": nn.Linear(4, 6), "last": nn.Linear(6, 3)}
    model = Function(SHARED[name], **parts).double().eval()
    x, matrix = normal(12, 5, 4, dtype=torch.float64), normal(5, 5, seed=3, dtype=torch.float64)
    for make in (LRP, GuidedBackprop):
        expected = make(model).attribute(x[:7], 1, matrix)[:5]
        torch.testing.assert_close(make(model).attribute(x[:5], 1, matrix), expected)
    SmoothGrad(model, samples=2).attribute(x[:5], 1, matrix)
    data = [(x[:5], matrix), (x[5:10], matrix)], [(x[:10], matrix)]
    signals = [
        InverseNetwork(model)
        .fit(batches, 1, unpack=lambda batch: (batch[0], batch[1]), progress=False)
        .source_signal(x[:5], 1, matrix)
        for batches in data
    ]
    torch.testing.assert_close(*signals)


def test_an_argument_with_one_row_for_each_example_keeps_them_if_examples_are_alone() -> None:
    model, x = Weighted().eval(), X[:4]
    rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    together = LRP(model).attribute(x, CLASSES, rows)
    alone = [
        LRP(model).attribute(x[i : i + 1], label, rows[i : i + 1])
        for i, label in enumerate(CLASSES)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
