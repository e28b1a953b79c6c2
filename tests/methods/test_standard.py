"""SmoothGrad and Grad-CAM with the usual settings, and which methods tell classes apart."""

import class_sensitivity
import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from small import normal
from torch import nn
from torch.nn import functional as F

from captum_mipin.errors import InputError
from captum_mipin.methods import GradCAM, SmoothGrad


def _cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def test_smooth_grad_is_the_mean_gradient_over_noise_of_each_examples_range(untouched):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    x = normal(3, 4, dtype=torch.float64) * torch.tensor([[1.0], [10.0], [0.1]])
    with untouched(model, x):
        found = SmoothGrad(model).attribute(x, target=1)
    assert torch.equal(found, SmoothGrad(model).attribute(x, 1))
    random = torch.Generator().manual_seed(0)
    span = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    noisy = [x + 0.15 * span * torch.randn(4, generator=random, dtype=x.dtype) for _ in range(50)]
    expected = (
        sum(Saliency(model).attribute(n.requires_grad_(), target=1, abs=False) for n in noisy) / 50
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(SmoothGrad(model).attribute((x[1:2],), 1)[0], found[1:2])
    plain = SmoothGrad(model, samples=1, noise=0).attribute(x, [0, 1, 0])
    torch.testing.assert_close(
        plain, Saliency(model).attribute(x.clone().requires_grad_(), target=[0, 1, 0], abs=False)
    )
    for options in (
        {"samples": 0},
        {"samples": 2.5},
        {"noise": float("inf")},
        {"noise": float("nan")},
    ):
        with pytest.raises(InputError):
            SmoothGrad(model, **options)
    for bad in (x.long(), x[:0]):
        with pytest.raises(InputError):
            SmoothGrad(model).attribute(bad, 1)


def test_grad_cam_has_the_size_of_the_input():
    model, x = _cnn().eval(), normal(2, 1, 8, 8)
    found = GradCAM(model, model[3]).attribute(x, target=[1, 2])
    inner = LayerGradCam(model, model[3]).attribute(x, target=[1, 2], relu_attributions=True)
    torch.testing.assert_close(found, F.interpolate(inner, (8, 8), mode="bilinear").detach())
    assert GradCAM.get_name() == "Grad-CAM"
    with pytest.raises(
        InputError, match=r"inputs are a tuple, expected one tensor \(batch, channels"
    ):
        GradCAM(model, model[3]).attribute((x,), 1)


def test_which_methods_tell_classes_apart():
    """On handwritten digits: which maps differ between two classes (Sixt et al., 2020)."""
    datasets = pytest.importorskip(
        "sklearn.datasets", reason="the digits come with it; the package does not need it"
    )
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
    model = _cnn()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(model(x[:1500]), y[:1500]).backward()
        optimiser.step()
    model.requires_grad_(False).eval()
    assert (model(x[1500:]).argmax(1) == y[1500:]).float().mean() > 0.85
    rows = class_sensitivity.compare(model, x[:200], x[1500:1540], (3, 8))
    found = {
        row["method"]: row["cosine of absolute values"] for row in rows
    }  # a logit below 0 turns relevance over
    alike = min(
        found[name]
        for name in ("Deconvnet", "Guided Backprop", "Deep Taylor", "LRP-z⁺", "Excitation backprop")
    )
    apart = max(
        found[name] for name in ("Gradient", "LRP-ε", "MIP-IN", "Excitation backprop, contrastive")
    )
    assert alike > apart + 0.1, found
