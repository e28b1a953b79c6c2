"""The contrast of a class: what it has at each position beyond all other classes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution
from captum_mipin.errors import InputError, UnsupportedOperationError
from captum_mipin.methods import LayerPropagation
from captum_mipin.methods.gradients import Gradient
from captum_mipin.rules.pooling import margins

#: How class maps (batch, classes, height, width) become outputs (batch, classes).
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.mean((2, 3)),
    "sum": lambda y: y.sum((2, 3)),
    "adaptive": lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1),
    "window": lambda y: F.avg_pool2d(y, 4)[:, :, 0, 0],
    "channels last": lambda y: y.permute(0, 2, 3, 1).mean((1, 2)),
    "tokens": lambda y: y.flatten(2).transpose(1, 2).mean(1),
}


class Pooled(nn.Module):
    """Convolutions, and a dense layer behind an average, or in front of it on class maps."""

    def __init__(self, end: str, dense: bool, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.end = end
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, classes) if dense else nn.Conv2d(6, classes, 1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        y = ENDS[self.end](h if isinstance(self.head, nn.Linear) else self.head(h))
        return self.head(y) if isinstance(self.head, nn.Linear) else y

    def at_places(self, x: Tensor) -> Tensor:
        """Return the class maps (batch, classes, height, width) whose average the output is."""
        h, count = self.body(x), 16 if self.end == "sum" else 1
        if not isinstance(self.head, nn.Linear):
            return count * self.head(h)
        weight = count * self.head.weight
        return torch.einsum("nchw,kc->nkhw", h, weight) + self.head.bias[:, None, None]


def beyond(y: np.ndarray, target: list[int]) -> np.ndarray:
    """Return (y_c − max_{k ≠ c} y_k)⁺ of class maps, by loops; (batch, height, width)."""
    result = np.zeros((len(y), *y.shape[2:]))
    for n, c in enumerate(target):
        for i, j in np.ndindex(*y.shape[2:]):
            others = [y[n, k, i, j] for k in range(y.shape[1]) if k != c]
            result[n, i, j] = max(y[n, c, i, j] - max(others), 0)
    return result


def setting(end: str, dense: bool) -> tuple[Pooled, Tensor, list[int]]:
    """Return a network whose classes win at some places each, images, and their targets."""
    model = Pooled(end, dense)
    x = torch.rand(60, 3, 8, 8, dtype=torch.float64) - 0.5
    count = 16 if end == "sum" and not dense else 1
    model.head.bias.data -= model.at_places(x).mean((0, 2, 3)).detach() / count
    target = [0, 1, 2] * 4
    places = beyond(model.at_places(x[:12]).detach().numpy(), target)
    assert (places > 0).any((1, 2)).all()
    assert (places == 0).any((1, 2)).all()
    return model, x, target


def autograd(model: Pooled, x: Tensor, target: list[int], layer: nn.Module | None) -> Tensor:
    """Return the gradient of mean_p (y_pc − max_{k ≠ c} y_pk)⁺, by autograd and sorting."""
    x, kept = x.clone().requires_grad_(), list[Tensor]()
    hook = None
    if layer is not None:
        hook = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    y = model.at_places(x)
    if hook is not None:
        hook.remove()
    rows = range(len(x))
    own = y[rows, target]
    others = y.clone()
    others[rows, target] = -torch.inf
    score = (own - others.sort(1).values[:, -1]).clamp(min=0).mean((1, 2)).sum()
    (gradient,) = torch.autograd.grad(score, kept[0] if kept else x)
    return gradient


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("dense", [True, False])
def test_the_map_at_the_last_layer_is_that_of_what_the_class_has_beyond_the_others(
    end: str, dense: bool
) -> None:
    model, x, target = setting(end, dense)
    inverse = InverseNetwork(model, layer=model.body).fit(x, progress=False)
    mipin = LayerMIPINAttribution(model, inverse)
    found = mipin.attribute(x[:12], target, contrast=True)
    y = model.at_places(x[:12]).detach()
    # for averages of what the class alone says, evidence=True sends (y_c)⁺ through the same inverse
    evidence = mipin.attribute(x[:12], target, evidence=True)
    speaks = torch.from_numpy(beyond(y.numpy(), target))
    own = y[range(12), target].clamp(min=0)
    at = (own > 0)[:, None].expand_as(found)
    ratio = (speaks / own)[:, None].expand_as(found)
    torch.testing.assert_close(found[at], (evidence * ratio)[at])
    features = model.body(x[:12]).detach()
    assert found.any()
    assert not found[(speaks == 0)[:, None].expand_as(found)].any()
    assert not found[features == 0].any()
    for n in range(12):
        alone = mipin.attribute(x[n : n + 1], target[n], contrast=True)
        torch.testing.assert_close(alone[0], found[n])


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("dense", [True, False])
def test_its_gradient_is_that_of_the_average_of_the_differences(end: str, dense: bool) -> None:
    model, x, target = setting(end, dense)
    few = x[:12]
    expected = autograd(model, few, target, None)
    gradient = Gradient(model, contrast=True)
    torch.testing.assert_close(gradient.attribute(few, target), expected)
    assert not torch.allclose(Gradient(model).attribute(few, target), expected)
    layer = model.body[0]
    at_layer = LayerPropagation(gradient, layer).attribute(few, target)
    torch.testing.assert_close(at_layer, autograd(model, few, target, layer))
    mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False))
    product = mipin.attribute(few, target, contrast=True, multiply_by_gradients=True)
    plain = mipin.attribute(few, target, contrast=True)
    assert plain.flatten(1).any(1).all()
    torch.testing.assert_close(product, plain * expected)
    at_layer = LayerMIPINAttribution(model, mipin.inverse, layer)
    torch.testing.assert_close(
        at_layer.attribute(few, target, contrast=True, multiply_by_gradients=True),
        at_layer.attribute(few, target, contrast=True) * autograd(model, few, target, layer),
    )


def test_the_class_itself_may_have_a_negative_output() -> None:
    model, x, target = setting("mean", True)
    model.head.bias.data -= 100  # of all classes: the differences stay
    inverse = InverseNetwork(model, layer=model.body).fit(x, progress=False)
    mipin = LayerMIPINAttribution(model, inverse)
    places = beyond(model.at_places(x[:12]).detach().numpy(), target)
    speaks = torch.from_numpy(places > 0)[:, None] & (model.body(x[:12]) > 0)
    assert not mipin.attribute(x[:12], target, evidence=True).any()
    assert torch.equal(mipin.attribute(x[:12], target, contrast=True) != 0, speaks)


def test_a_margin_is_positive_for_the_largest_class_alone() -> None:
    y = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    assert margins(y, 1).tolist() == [[1, -2, -1], [0, 0, -1]]
    assert torch.equal(margins(y.T, 0), margins(y, 1).T)


def refused(model: nn.Module, x: Tensor, target: Any, match: str) -> None:
    """Check that the inverse and the gradient refuse the contrast, and explain the output."""
    mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False))
    assert mipin.attribute(x[:2], target).any()
    with pytest.raises(UnsupportedOperationError, match=match):
        mipin.attribute(x[:2], target, contrast=True)
    with pytest.raises(UnsupportedOperationError, match=match):
        Gradient(model, contrast=True).attribute(x[:2], target)


class Ends(nn.Module):
    """Class maps whose average is changed by a function."""

    def __init__(self, end: Callable[[Tensor], Tensor], classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.end = nn.Conv2d(3, classes, 3), end
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x).mean((2, 3)))


@pytest.mark.parametrize(
    "end",
    [lambda y: F.silu(y), lambda y: y - y.mean(1, keepdim=True), lambda y: torch.cat([y, y], 1)],
)
def test_outputs_that_are_no_averages_are_refused_by_name(
    end: Callable[[Tensor], Tensor],
) -> None:
    x = torch.rand(40, 3, 6, 6, dtype=torch.float64)
    refused(Ends(end), x, 0, r"contrast=True is set, but the output is that of .*: it has to be an")


def test_a_dense_head_and_a_single_class_are_refused() -> None:
    x = torch.rand(40, 3, 6, 6, dtype=torch.float64)
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    refused(flat.double().eval(), x, 0, "output is that of 3/linear: it has to be an average")
    one = Ends(lambda y: y, classes=1)
    refused(one, x, 0, "for two or more classes. Pass contrast=False")
    alone = Ends(lambda y: y[:, 0], classes=1)
    refused(alone, x, None, "for two or more classes")


def test_an_average_of_averages_is_refused() -> None:
    x = torch.rand(40, 3, 6, 6, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AvgPool2d(2), nn.AvgPool2d(2), nn.Flatten())
    mipin = MIPINAttribution(model.double().eval(), InverseNetwork(model).fit(x, progress=False))
    assert mipin.attribute(x[:2], 0).any()
    with pytest.raises(UnsupportedOperationError, match="it has to be an average"):
        mipin.attribute(x[:2], 0, contrast=True)


def test_a_grid_of_averages_is_refused() -> None:
    x = torch.rand(40, 3, 6, 6, dtype=torch.float64)
    torch.manual_seed(0)
    grid = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    refused(grid.double().eval(), x, 10, "it has to be an average")


@pytest.mark.filterwarnings("ignore::captum_mipin.errors.LogitsWarning")
@pytest.mark.parametrize("final", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_a_final_softmax_is_left_out(final: nn.Module) -> None:
    model, x, target = setting("mean", True)
    ends = nn.Sequential(model, final).eval()
    mipin = [
        MIPINAttribution(network, InverseNetwork(network).fit(x, progress=False))
        for network in (model, ends)
    ]
    options = {"contrast": True, "multiply_by_gradients": True}
    expected = mipin[0].attribute(x[:4], target[:4], **options)
    torch.testing.assert_close(mipin[1].attribute(x[:4], target[:4], **options), expected)


def test_options_that_exclude_the_contrast_are_named() -> None:
    model, x, target = setting("mean", True)
    mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, progress=False))
    with pytest.raises(InputError, match='contrast=True needs local=True and pooling="shares"'):
        mipin.attribute(x[:12], target, contrast=True, local=False)
    with pytest.raises(InputError, match="evidence=True and contrast=True are two questions"):
        mipin.attribute(x[:12], target, contrast=True, evidence=True)
    with pytest.raises(InputError, match="contrast=True explains only a part"):
        mipin.attribute(x[:12], target, contrast=True, return_convergence_delta=True)
    even = MIPINAttribution(model, InverseNetwork(model, pooling="even").fit(x, progress=False))
    with pytest.raises(InputError, match='contrast=True needs local=True and pooling="shares"'):
        even.attribute(x[:12], target, contrast=True)
