"""Maps at the input of a layer, at several layers, and at layers of several tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.concept import TCAV, Classifier, Concept
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, check
from captum_mipin.errors import CaptureError, InputError, NotFittedError
from captum_mipin.methods import LRP, GuidedBackprop, LayerPropagation
from captum_mipin.methods.gradients import Gradient

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


def _deep() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    return nn.Sequential(*layers).eval()


class Swap(nn.Module):
    """Uses its second argument first, and returns that result first."""

    def forward(self, b: Tensor, a: Tensor) -> Any:
        first = 2 * torch.relu(a)
        return first, torch.relu(b)


class Pair(nn.Module):
    """A network with a layer of two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.swap, self.last = (
            nn.Linear(6, 4),
            nn.Linear(6, 4),
            Swap(),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Any:
        second, first = self.g(x), self.f(x)
        p, q = self.swap(first, a=second)
        return self.last(p - 3 * q)


@pytest.mark.parametrize("make", [LRP, GuidedBackprop, Gradient])
def test_the_input_of_a_layer(make: Any) -> None:
    model = _deep()
    method = make(model)
    before = LayerPropagation(method, "1").attribute(X, 1)
    assert torch.equal(LayerPropagation(method, "2").attribute(X, 1, None, True), before)
    first = LayerPropagation(method, "0").attribute(X, 1, attribute_to_layer_input=True)
    assert torch.equal(first, method.attribute(X, 1))
    assert torch.equal(LayerPropagation(method, model).attribute(X, 1, None, True), first)
    features = LayerPropagation(method, "2").attribute(X, 1, None, True, multiply_by_features=True)
    assert torch.equal(features, before * model[:2](X).detach())


def test_the_input_of_a_layer_with_mipin() -> None:
    model = _deep()
    whole = InverseNetwork(model).fit(X, progress=False)
    upper = InverseNetwork(model, layer="1").fit(X, progress=False)
    for inverse in (whole, upper):
        before = LayerMIPINAttribution(model, inverse, "1").attribute(X, 1)
        assert torch.equal(
            LayerMIPINAttribution(model, inverse, "2").attribute(X, 1, None, True), before
        )
    first = LayerMIPINAttribution(model, whole, "0").attribute(X, 1, None, True)
    assert torch.equal(first, MIPINAttribution(model, whole).attribute(X, 1, mask_input=True))
    with pytest.raises(NotFittedError, match="needs to reach the input of layer '0'"):
        LayerMIPINAttribution(model, upper, "0").attribute(X, 1, None, True)


def test_a_list_of_layers_gives_a_list_of_maps() -> None:
    model = _deep()
    inverse = InverseNetwork(model).fit(X, progress=False)
    for make in (
        lambda layer: LayerPropagation(LRP(model), layer),
        lambda layer: LayerMIPINAttribution(model, inverse, layer),
    ):
        maps = make(["1", model[3]]).attribute(X, 1)
        assert isinstance(maps, list)
        for one, layer in zip(maps, ("1", "3"), strict=True):
            assert torch.equal(one, make(layer).attribute(X, 1))
    signals = LayerMIPINAttribution(model, inverse, ["1", "3"]).source_signal(X, 1)
    assert [s.shape for s in signals] == [(20, 5), (20, 4)]


def test_layers_of_several_tensors() -> None:
    """Tensors come in the order of the arguments and outputs, not in that of the graph."""
    torch.manual_seed(0)
    model = Pair().eval()
    w = model.last.weight[1].detach().expand(20, -1)
    layer = LayerPropagation(Gradient(model), "swap")
    p, q = layer.attribute(X, 1)
    assert torch.allclose(p, w)
    assert torch.allclose(q, -3 * w)
    b, a = layer.attribute(X, 1, attribute_to_layer_input=True)
    assert torch.allclose(b, -3 * w * (model.f(X) > 0))
    assert torch.allclose(a, 2 * w * (model.g(X) > 0))
    relevance, delta = LayerPropagation(LRP(model, bias="none"), "swap").attribute(
        X, 1, return_convergence_delta=True
    )
    score = model(X)[:, 1].detach()
    assert torch.allclose(sum(r.sum(1) for r in relevance) + delta, score, atol=1e-5)
    inverse = InverseNetwork(model, layer="swap").fit(X, progress=False)
    assert [s.shape for s in LayerMIPINAttribution(model, inverse).attribute(X, 1)] == [(20, 4)] * 2
    assert len(check(model, X, layer="swap").rows) < len(check(model, X).rows)


def test_convergence_delta_at_layers() -> None:
    model = _deep()
    maps, delta = LayerPropagation(LRP(model), "1").attribute(X, 1, None, False, True)
    assert torch.allclose(delta, (model(X)[:, 1] - maps.sum(1)).detach(), atol=1e-6)
    maps, deltas = LayerPropagation(LRP(model), ["1", "3"]).attribute(
        X, 1, return_convergence_delta=True
    )
    assert torch.equal(deltas[0], delta)
    assert len(maps) == len(deltas) == 2
    assert LayerPropagation(LRP(model), "1").has_convergence_delta()
    assert LayerPropagation(LRP(model), "1").multiplies_by_inputs
    guided = LayerPropagation(GuidedBackprop(model), "1")
    assert not guided.multiplies_by_inputs
    with pytest.raises(InputError, match="distributes relevance, such as LRP, but the met"):
        guided.attribute(X, 1, return_convergence_delta=True)


def test_places_that_cannot_be_explained() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(CaptureError, match=r"layer '0' .* dtype torch\.int64, .*explain its out"):
        LayerPropagation(LRP(model), "0").attribute(tokens, 1, None, True)


def test_arguments_in_captums_order(caplog: pytest.LogCaptureFixture) -> None:
    model = _deep()
    maps, delta = LRP(model).attribute(X, 1, None, True)
    expected = LRP(model).attribute(X, 1, return_convergence_delta=True, verbose=False)
    assert torch.equal(maps, expected[0])
    assert torch.equal(delta, expected[1])
    assert not caplog.records
    for method, layer in ((LRP(model), None), (LayerPropagation(LRP(model), "1"), "1")):
        with caplog.at_level("INFO", logger="captum_mipin"):
            found = method.attribute(X, 1, verbose=True)
        assert torch.equal(found, method.attribute(X, 1))
        (record,) = caplog.records
        caplog.clear()
        rules = check(model, X, layer=layer, method=LRP)
        assert record.message == f"rules of LRP\n{rules}"
        assert "LRP-ε" in record.message


class Mean(Classifier):
    """Takes the mean of each concept as its vector."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def train_and_eval(self, dataloader: Any, **options: Any) -> Any:
        xs, labels = zip(*dataloader, strict=True)
        x, label = torch.cat(xs), torch.cat(labels)
        self.rows = {int(c): x[label == c].mean(0) for c in label.unique()}
        return {}

    def weights(self) -> Tensor:
        return torch.stack([*self.rows.values()])

    def classes(self) -> list[int]:
        return [*self.rows]


class Stream(IterableDataset[Tensor]):
    """Eight inputs of a concept."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.randn(8, 6, generator=torch.Generator().manual_seed(self.seed))


def test_tcav(tmp_path: Path) -> None:
    """Captum's TCAV passes ``attribute_to_layer_input`` in each call, and sets the layer."""
    model = _deep()
    inverse = InverseNetwork(model).fit(X, progress=False)
    concepts = [Concept(k, str(k), DataLoader(Stream(k), 4)) for k in range(2)]
    for number, method in enumerate((
        LayerPropagation(LRP(model), "1"), LayerMIPINAttribution(model, inverse, "1"),
    )):  # fmt: skip
        tcav = TCAV(
            model, ["1", "3"], layer_attr_method=method, classifier=Mean(),
            save_path=str(tmp_path / str(number)),
        )  # fmt: skip
        scores = tcav.interpret(X, [concepts], target=1)["0-1"]
        for name in ("1", "3"):
            maps = (
                LayerPropagation(LRP(model), name)
                if number == 0
                else LayerMIPINAttribution(model, inverse, name)
            ).attribute(X, 1)
            vectors = torch.stack(
                [
                    model[: int(name) + 1](torch.stack([*Stream(k)])).mean(0).detach()
                    for k in range(2)
                ]
            )
            positive = (maps @ vectors.T > 0).float().mean(0)
            assert torch.allclose(scores[name]["sign_count"], positive)
