"""Excitation backprop: by hand, and as the probability that it is."""

import pytest
import torch
from small import Function, SmallResNet, normal, varied
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.resnet import BasicBlock

from captum_mipin.methods import ExcitationBackprop, LayerPropagation


def _choose(p, x, w):
    """P at x from P at the neurons w, by the definition."""
    excited = x.clamp(min=0).unsqueeze(1) * w.clamp(min=0)
    total = excited.sum(2, keepdim=True)
    return (p.unsqueeze(2) * excited / total.masked_fill(total == 0, torch.inf)).sum(1)


@pytest.mark.parametrize("contrastive", [False, True])
def test_a_residual_network_by_hand(contrastive):
    def run(m, x):
        h = F.relu(m["a"](x))
        return m["last"](F.relu(h + m["b"](h)))

    model = (
        Function(run, a=nn.Linear(5, 7), b=nn.Linear(7, 7), last=nn.Linear(7, 3)).double().eval()
    )
    x = normal(6, 5, dtype=torch.float64)
    a, b, last = (model.layers[name].weight.detach() for name in ("a", "b", "last"))
    h = F.relu(model.layers["a"](x)).detach()
    g = model.layers["b"](h).detach()
    top = F.relu(h + g)
    start = torch.ones(6, 1, dtype=x.dtype)
    p = _choose(start, top, last[1:2])
    if contrastive:
        p = p - _choose(start, top, -last[1:2])
    total = (h + g.clamp(min=0)).masked_fill(h + g.clamp(min=0) == 0, torch.inf)
    at_h = p * h / total + _choose(p * g.clamp(min=0) / total, h, b)
    found = ExcitationBackprop(model, contrastive=contrastive).attribute(x, 1)
    torch.testing.assert_close(found, _choose(at_h, x, a))
    beside = LayerPropagation(
        ExcitationBackprop(model, contrastive=contrastive), model.layers["b"]
    ).attribute(x, 1)
    torch.testing.assert_close(beside, p * g.clamp(min=0) / total)


def test_probabilities_of_real_layers_add_up_to_one():
    for make in (
        lambda: SmallResNet(BasicBlock),
        lambda: models.DenseNet(4, (1, 1), 6, num_classes=3),
    ):
        model, x = varied(make(), 3, 32, 32), normal(3, 3, 32, 32, dtype=torch.float64)
        last = model.layer2 if isinstance(model, SmallResNet) else model.features.norm5
        for contrastive, total in ((False, 1.0), (True, 0.0)):
            method = ExcitationBackprop(model, contrastive=contrastive)
            found = LayerPropagation(method, last).attribute(x, [0, 1, 2])
            torch.testing.assert_close(
                found.flatten(1).sum(1), torch.full((3,), total, dtype=x.dtype)
            )
            assert (found >= 0).all() or contrastive
            whole, delta = method.attribute(x, [0, 1, 2], return_convergence_delta=True)
            assert torch.isfinite(whole).all()
            torch.testing.assert_close(delta, 1 - whole.flatten(1).sum(1))


def test_differences_are_chosen_by_what_they_add():
    model = (
        Function(lambda m, x: m["last"](x * 2 - m["b"](x)), b=nn.Linear(4, 4), last=nn.Linear(4, 2))
        .double()
        .eval()
    )
    x = normal(5, 4, dtype=torch.float64)
    g = model.layers["b"](x).detach()
    p = _choose(
        torch.ones(5, 1, dtype=x.dtype), 2 * x - g, model.layers["last"].weight[:1].detach()
    )
    first, second = (2 * x).clamp(min=0), (-g).clamp(min=0)
    total = (first + second).masked_fill(first + second == 0, torch.inf)
    expected = p * first / total + _choose(p * second / total, x, model.layers["b"].weight.detach())
    torch.testing.assert_close(ExcitationBackprop(model).attribute(x, 0), expected)
