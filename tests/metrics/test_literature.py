"""Methods that look the same whatever the class, as in the literature, on published weights."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from torch.nn import functional as F

from captum_mipin import LRP, InverseNetwork, MIPINAttribution
from captum_mipin.methods import Deconvnet, DeepTaylor, GuidedBackprop

#: A folder as benchmarks/data.py and benchmarks/pretrained.py lay it out, beside the checkout.
DATA = Path(os.environ.get("CAPTUM_MIPIN_DATA", Path(__file__).parents[3] / "shared" / "data"))
WEIGHTS, IMAGES = (
    DATA / "weights" / "cifar10_resnet20.safetensors",
    DATA / "cifar10_test_images.webp",
)
CLASSES = (3, 8)


@pytest.fixture
def network_and_images():
    """ResNet-20, and forty test images as it takes them."""
    if not (WEIGHTS.exists() and IMAGES.exists()):
        pytest.skip("needs CIFAR-10 and the weights of a network for it")
    image = pytest.importorskip("PIL.Image", reason="images to read; the package does not need it")
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        import pretrained
    finally:
        sys.path.pop(0)
        sys.modules.pop("pretrained", None)
    model, normalise = pretrained.load("resnet20", DATA / "weights")
    row = np.asarray(
        image.open(IMAGES).convert("RGB").crop((0, 0, 40 * 32, 32))
    )  # tiles side by side
    tiles = row.reshape(32, 40, 32, 3).transpose(1, 3, 0, 2)
    return model, normalise(torch.from_numpy(tiles.copy()).float() / 255)


def test_maps_of_two_classes_are_nearly_the_same_for_some_methods_alone(network_and_images):
    model, images = network_and_images
    fit, x = images[:32], images[32:]
    inverse = InverseNetwork(model).fit(fit, list(CLASSES), progress=False)
    same = {
        "Guided Backprop": GuidedBackprop(model),
        "Deconvnet": Deconvnet(model),
        "Deep Taylor": DeepTaylor(model),
    }
    others = {
        "gradient": Saliency(model),
        "LRP-ε": LRP(model),
        "MIP-IN": MIPINAttribution(model, inverse),
    }

    def cosine(method):
        """Mean cosine of the absolute values of the maps for two classes."""
        one, other = (
            method.attribute(x.clone().requires_grad_(), target).abs().flatten(1)
            for target in CLASSES
        )
        return float(F.cosine_similarity(one, other).mean())

    found = {name: cosine(method) for name, method in {**same, **others}.items()}
    assert min(found[name] for name in same) > 0.78, found
    assert max(found[name] for name in others) < 0.72, found
