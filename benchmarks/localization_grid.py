"""The grid pointing game on networks with published weights.

    python benchmarks/localization_grid.py NETWORK --data FOLDER

A mosaic has n x n images of different classes, each of which the network classifies rightly with a
confidence of at least 0.99. It is explained for the class in one of its cells. Score: positive
attribution inside that cell / all positive attribution, after the sum over channels; 0 where
nothing is positive. Chance is 1 / n². All methods are asked at the same layers.

Source: Rao et al., CVPR 2022.
"""

import argparse
import csv
import io
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pretrained
import torch
from captum.attr import (
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Saliency,
)  # fmt: skip
from common import parser_of, show, write
from data import load
from PIL import Image
from torch import Tensor, nn

from captum_mipin import LRP, InverseNetwork, LayerMIPINAttribution, MIPINAttribution
from captum_mipin.methods import ExcitationBackprop, Gamma, GuidedBackprop, LayerPropagation
from captum_mipin.metrics import Mosaics, grid_pointing_game, mosaics

CONFIDENCE = 0.99
#: Options of an inverse: pooling and forks. The first pair is the default.
KINDS: tuple[tuple[Literal["shares", "even"], Literal["joint", "sum"]], ...] = (
    ("shares", "joint"),
    ("even", "joint"),
    ("shares", "sum"),
    ("even", "sum"),
)
Method = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Photos:
    """Images (N, 3, H, W) in [0, 1] to fit on, images to explain, and labels of the latter."""

    fit: Tensor
    test: Tensor
    labels: Tensor


def photos(name: str, folder: Path, count: int, generator: torch.Generator) -> Photos:
    """Return CIFAR-10, or photographs of twenty ImageNet classes; ``count`` of them to fit on."""
    size = pretrained.NETWORKS[name].size
    if size == 32:
        images = load("cifar10", folder)
        chosen = torch.randperm(len(images.train), generator=generator)[:count]
        return Photos(images.train[chosen], images.test, images.test_labels)
    with zipfile.ZipFile(folder / "ilsvrc2012_val_600_boxes.zip") as archive:
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open("annotations.csv"), "utf-8")))
        test = torch.stack([_image(archive, row["file"], size) for row in rows])
        labels = torch.tensor([int(row["class_index"]) for row in rows])
    with zipfile.ZipFile(folder / "imagenet20_train_128px.zip") as archive:
        files = sorted(file for file in archive.namelist() if file.endswith(".JPEG"))
        picked = torch.randperm(len(files), generator=generator)[:count].tolist()
        fit = torch.stack([_image(archive, files[index], size) for index in picked])
    return Photos(fit, test, labels)


def _image(archive: zipfile.ZipFile, file: str, size: int) -> Tensor:
    image = (
        Image.open(io.BytesIO(archive.read(file)))
        .convert("RGB")
        .resize((size, size), Image.Resampling.BILINEAR)
    )
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def features(model: nn.Module, layer: nn.Module | None, x: Tensor) -> Tensor:
    """Return the output of a layer; x itself for None."""
    if layer is None:
        return x
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    return kept[0]


def peers(model: nn.Module, layer: nn.Module | None, seed: int, steps: int) -> dict[str, Method]:
    """Return the methods that MIP-IN is compared with, at a layer or the input."""
    generator = torch.Generator().manual_seed(seed)

    def centre(x: Tensor, target: Tensor) -> Tensor:
        h, w = features(model, layer, x[:1]).shape[2:]
        away = [(torch.arange(k) - (k - 1) / 2) / k for k in (h, w)]
        return torch.exp(-8 * (away[0][:, None] ** 2 + away[1][None] ** 2)).expand(len(x), 1, h, w)

    def gradient(x: Tensor, target: Tensor) -> Any:
        if layer is None:
            return Saliency(model).attribute(x.clone().requires_grad_(), target).detach()
        bare: Any = LayerGradientXActivation(model, layer, multiply_by_inputs=False)
        return bare.attribute(x, target).detach().abs()

    def by_gradient(x: Tensor, target: Tensor) -> Any:
        if layer is None:
            return InputXGradient(model).attribute(x.clone().requires_grad_(), target).detach()
        product: Any = LayerGradientXActivation(model, layer)
        return product.attribute(x, target).detach()

    def integrated(x: Tensor, target: Tensor) -> Any:
        method: Any = (
            IntegratedGradients(model) if layer is None else LayerIntegratedGradients(model, layer)
        )
        return method.attribute(
            x, target=target, n_steps=steps, internal_batch_size=len(x)
        ).detach()

    def grad_cam(x: Tensor, target: Tensor) -> Any:
        assert layer is not None
        cam: Any = LayerGradCam(model, layer)
        return cam.attribute(x, target, relu_attributions=True).detach()

    found: dict[str, Method] = {
        "random": lambda x, target: torch.rand(
            len(x), 1, *features(model, layer, x).shape[2:], generator=generator
        ),
        "centre prior": centre,
        "mask only": lambda x, target: (features(model, layer, x) != 0).float(),
        "Saliency": gradient,
        "Input×Gradient": by_gradient,
        "Integrated Gradients": integrated,
    }
    propagated: dict[str, Any] = {
        "Guided Backprop": GuidedBackprop(model),
        "LRP-ε": LRP(model),
        "LRP-γ": LRP(model, rule=Gamma(0.25)),
        "Excitation backprop, contrastive": ExcitationBackprop(model, contrastive=True),
    }
    for name, method in propagated.items():
        found[name] = (method if layer is None else LayerPropagation(method, layer)).attribute
    if layer is not None:
        found["Grad-CAM"] = grad_cam
    return found


def ours(
    model: nn.Module, inverse: InverseNetwork, layer: nn.Module | None, name: str
) -> dict[str, Method]:
    """Return MIP-IN's maps: A, A × feature, A × gradient, and the pattern without the image."""
    method: Any = (
        MIPINAttribution(model, inverse)
        if layer is None
        else LayerMIPINAttribution(model, inverse, layer)
    )
    product = "multiply_by_inputs" if layer is None else "multiply_by_features"
    found: dict[str, Method] = {
        f"MIP-IN, {name}": lambda x, target: method.attribute(x, target=target),
        f"MIP-IN, {name}, × feature": lambda x, target: method.attribute(
            x, target=target, **{product: True}
        ),
        f"MIP-IN, {name}, × gradient": lambda x, target: method.attribute(
            x, target=target, multiply_by_gradients=True
        ),
    }
    if name == "shares, joint":
        evidence = partial(method.attribute, evidence=True)
        found["MIP-IN, evidence"] = lambda x, target: evidence(x, target=target)
        found["MIP-IN, evidence, × feature"] = lambda x, target: evidence(
            x, target=target, **{product: True}
        )
        found["MIP-IN, evidence, × gradient"] = lambda x, target: evidence(
            x, target=target, multiply_by_gradients=True
        )
        found["pattern only"] = lambda x, target: method.attribute(x, target=target, local=False)
    return found


def network_parser(
    doc: str | None, fit: int, networks: Iterable[str] = pretrained.NETWORKS
) -> argparse.ArgumentParser:
    """Return a parser for a network with published weights and the images to fit it on."""
    parser = parser_of(doc)
    parser.add_argument("network", choices=networks)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the images and weights/"
    )
    parser.add_argument("--fit", type=int, default=fit, help="images to fit on")
    return parser


def network_and_photos(
    arguments: argparse.Namespace,
) -> tuple[nn.Module, Callable[[Tensor], Tensor], Photos]:
    """Return the network of a command line, the normalisation of its images, and the images."""
    model, normalise = pretrained.load(arguments.network, arguments.data / "weights")
    generator = torch.Generator().manual_seed(0)
    images = photos(arguments.network, arguments.data, arguments.fit, generator)
    return model, normalise, images


def scored(model: nn.Module, method: Method, grid: Mosaics, batch: int) -> dict[str, float]:
    """Return the scores of a method on mosaics: of all, and of those with a positive logit."""
    parts = zip(grid.x.split(batch), grid.targets.split(batch), strict=True)
    result = grid_pointing_game(torch.cat([method(x, target) for x, target in parts]), grid)
    with torch.no_grad():
        logits = torch.cat([model(x) for x in grid.x.split(batch)])
    positive = logits.gather(1, grid.targets[:, None])[:, 0] > 0
    name = f"{grid.n}x{grid.n}"
    return {
        name: result.mean,
        f"{name} standard error": result.standard_error,
        f"{name}, positive logit": float(result.values[positive].mean()),
        f"{name}, positive logits": float(positive.double().mean()),
    }


def main() -> None:
    parser = network_parser(__doc__, fit=400)
    parser.add_argument("--classes", type=int, default=10, help="number of classes to fit")
    parser.add_argument(
        "--confidence", type=float, default=CONFIDENCE, help="with which each image is recognised"
    )
    parser.add_argument("--mosaics", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20, help="of Integrated Gradients")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument(
        "--variants", action="store_true", help="even spread and summed forks as well"
    )
    arguments = parser.parse_args()
    about = pretrained.NETWORKS[arguments.network]
    model, normalise, images = network_and_photos(arguments)
    fit, test = normalise(images.fit), normalise(images.test)
    classes = sorted(set(images.labels.tolist()))[
        :: max(1, len(set(images.labels.tolist())) // arguments.classes)
    ]
    grids = [
        mosaics(
            model,
            test,
            images.labels,
            n,
            arguments.mosaics,
            confidence=arguments.confidence,
            classes=classes,
            generator=torch.Generator().manual_seed(n),
        )
        for n in (2, 3)
    ]
    inverses = {
        f"{pooling}, {forks}": InverseNetwork(model, pooling=pooling, forks=forks).fit(
            fit, classes, batch_size=50
        )
        for pooling, forks in KINDS[: len(KINDS) if arguments.variants else 1]
    }
    rows = []
    for place, path in (("input", None), ("middle", about.middle), ("last", about.last)):
        layer = None if path is None else model.get_submodule(path)
        methods = peers(model, layer, 0, arguments.steps)
        for name, inverse in inverses.items():
            methods.update(ours(model, inverse, layer, name))
        for name, method in methods.items():
            row: dict[str, Any] = {"layer": place, "path": path or "", "method": name}
            for grid in grids:
                row |= scored(model, method, grid, arguments.batch)
            rows.append(row)
            print(show([row]).splitlines()[-1], flush=True)
    write(
        f"localization-{arguments.network}", rows,
        data="CIFAR-10 test" if about.size == 32
        else "600 ILSVRC2012 validation images of 20 classes",
        size=about.size, fit=arguments.fit, classes=classes, mosaics=arguments.mosaics,
        steps=arguments.steps, confidence=arguments.confidence, target="the class of the cell",
        reduction="sum over channels, then ReLU", ties="none: shares of a sum",
    )  # fmt: skip
    print(show(rows))


if __name__ == "__main__":
    main()
