"""Networks with one output per pixel: a pixel of a class, and the sum of a class over its mask."""

import pytest
import torch
from rule_checks import behaves
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork
from captum_mipin.methods import LRP, DeepTaylor, ExcitationBackprop, GuidedBackprop
from captum_mipin.methods.gradients import Gradient


class UNet(nn.Module):
    """Two sizes, a path beside them, and one score per class and pixel."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.down = nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect", bias=False)
        self.deep = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(6, 6, 2, 2, bias=False)
        self.out = nn.Conv2d(11, 3, 1, bias=False)

    def forward(self, x):
        side = self.down(x).relu()
        deep = self.deep(F.max_pool2d(side, 2)).relu()
        if self.mode == "transposed":
            deep = self.up(deep)
        else:
            deep = F.interpolate(deep, size=x.shape[2:], mode=self.mode)
        return self.out(torch.cat([side, deep], 1))


class OfItsClass(nn.Module):
    """Captum's usual wrapper: the scores of each class, summed up where it is the largest."""

    def __init__(self, net, spelling):
        super().__init__()
        self.net, self.spelling = net, spelling

    def forward(self, x):
        out = self.net(x)
        largest = out.argmax(1, keepdim=True)
        if self.spelling == "scatter":
            mask = torch.zeros_like(out).scatter_(1, largest, 1)
        elif self.spelling == "one_hot":
            mask = F.one_hot(largest.squeeze(1), 3).permute(0, 3, 1, 2).to(out)
        elif self.spelling == "fixed":
            mask = self.mask
        else:
            mask = (largest == torch.arange(3).view(1, 3, 1, 1)).to(out.dtype)
        return (out * mask).sum((2, 3))


@pytest.fixture
def x():
    return torch.randn(24, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def built(mode="bilinear"):
    torch.manual_seed(0)
    return UNet(mode).double().eval()


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "transposed"])
def test_a_pixel_of_a_class_is_explained(mode, x):
    model, target = built(mode), (1, 5, 6)
    inverse = behaves(model, x, targets=(target, (0, 2, 2)))
    assert inverse.source_signal(x[:2], target).abs().sum() > 0
    relevance, delta = LRP(model).attribute(x[:4], target, return_convergence_delta=True)
    torch.testing.assert_close(delta, torch.zeros(4).double(), rtol=0, atol=1e-4)
    leaf = x[:4].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[(slice(None), *target)].sum(), leaf)
    assert relevance[gradient == 0].abs().sum() == 0, "nothing comes from pixels out of sight"
    for method in (DeepTaylor, ExcitationBackprop, GuidedBackprop):
        assert method(model).attribute(x[:4], target).isfinite().all()


@pytest.mark.parametrize("spelling", ["scatter", "one_hot", "comparison"])
def test_the_sum_over_the_mask_of_a_class_is_the_sum_of_its_pixels(spelling, x):
    """LRP and gradients are linear in their start, so that maps of pixels add up."""
    net, few = built(), x[:1]
    model = OfItsClass(net, spelling).double().eval()
    pixels = (net(few)[0].argmax(0) == 1).nonzero().tolist()
    assert len(pixels) > 3
    for method in (LRP, Gradient):
        one = method(net)
        total = sum(one.attribute(few, (1, *pixel)) for pixel in pixels)
        torch.testing.assert_close(method(model).attribute(few, 1), total, rtol=1e-6, atol=1e-8)
    guided = GuidedBackprop(model).attribute(few, 1)
    fixed = OfItsClass(net, "fixed").eval()
    fixed.mask = F.one_hot(net(few).argmax(1), 3).permute(0, 3, 1, 2).double().detach()
    torch.testing.assert_close(GuidedBackprop(fixed).attribute(few, 1), guided)
    s = InverseNetwork(model).fit(x, 1, progress=False).source_signal(few, 1)
    assert s.isfinite().all()
    assert s.abs().max() > 0
