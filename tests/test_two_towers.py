"""Zero-shot classification, as CLIP's: images against a fixed table of embedded texts."""

import pytest
import torch
from captum.attr import GuidedBackprop as CaptumsGuidedBackprop
from small import normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import LRP, InverseNetwork, LayerMIPINAttribution
from captum_mipin.methods import Epsilon, GuidedBackprop

X = normal(40, 4, dtype=torch.float64)


class TwoTowers(nn.Module):
    """The logits s · ĥ t̂ᵀ of an image tower h(x) and a table t of texts, both of length 1."""

    def __init__(self, spelling="matmul"):
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.tower = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
        self.register_buffer("texts", F.normalize(torch.randn(3, 5), dim=-1))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.double().eval()

    def forward(self, x):
        h = self.tower(x)
        if self.spelling == "matmul":
            return self.logit_scale.exp() * F.normalize(h, dim=-1) @ self.texts.T
        h = h / h.norm(dim=-1, keepdim=True)
        return F.linear(h, self.texts) * self.logit_scale.exp()


def test_guided_backprop_is_captums():
    model = TwoTowers()
    with pytest.warns(UserWarning):
        expected = CaptumsGuidedBackprop(model).attribute(X.clone(), target=1)
    torch.testing.assert_close(GuidedBackprop(model).attribute(X, 1), expected)


def test_lrp_is_gradient_times_input_of_a_constant_length():
    model, x = TwoTowers(), X.clone().requires_grad_()
    h = model.tower(x)
    logits = model.logit_scale.exp() * (h / h.norm(dim=-1, keepdim=True).detach()) @ model.texts.T
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    found = LRP(model, rule=Epsilon(0)).attribute(X, 1)
    torch.testing.assert_close(found, X * gradient)


@pytest.mark.parametrize("spelling", ["matmul", "linear"])
def test_the_inverse_of_the_table_by_two_regressions(spelling):
    model = TwoTowers(spelling)
    inverse = InverseNetwork(model, layer="tower", ridge=0).fit([X], 1, progress=False)
    found = LayerMIPINAttribution(model, inverse).attribute(X, 1)
    h, z = model.tower(X).detach(), model(X)[:, 1:2].detach()
    length, unit = h.norm(dim=1, keepdim=True), F.normalize(h, dim=-1)
    w = _slope(z, unit)  # ĥ ≈ w z + b; the length is recorded
    signal = length * (unit.mean(0) + w * (z - z.mean()))
    torch.testing.assert_close(found, _slope(signal, h) * length * w * z)


def _slope(s, x):
    """Return cov(x, s) / var(s) for each feature x."""
    s, x = s - s.mean(0), x - x.mean(0)
    return (x * s).mean(0) / s.square().mean(0)
