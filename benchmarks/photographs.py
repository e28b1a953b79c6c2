"""Which layer and which reading of MIP-IN to propose for photographs.

    python benchmarks/photographs.py NETWORK boxes|mosaics --data FOLDER

Box accuracy on photographs whose boxes cover at most a third, and the grid pointing game on mosaics
of 2 x 2 photographs. MIP-IN, Grad-CAM, LayerCAM and LRP-γ are measured at the layer that
the package picks and at the last one. The photographs are split into two halves: settings are
chosen on the first half, figures are reported on the second. The mosaics of a half are made of its
photographs alone.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import boxes
import pretrained
import torch
from captum.attr import LayerGradientXActivation
from common import show, write
from localization_grid import features, network_and_photos, network_parser
from torch import Tensor, nn

from captum_mipin import LRP, InverseNetwork, LayerMIPINAttribution
from captum_mipin.methods import Gamma, LayerPropagation
from captum_mipin.metrics import Mosaics, bounding_box_accuracy, grid_pointing_game, mosaics
from captum_mipin.metrics.maps import heat

#: Network -> the picked layer, and the last one with places.
LAYERS = {
    "squeezenet1_0": ("features.11", "features.12"),
    "mobilenet_v2": ("features.13", "features.18"),
    "efficientnet_lite0": ("_blocks.10", "_blocks.15"),
}
REDUCTIONS: tuple[Any, ...] = ("relu_of_sum", "sum_of_relu", "sum_of_abs")
#: Reductions that define a method; all others take the best one.
FIXED: dict[str, tuple[Any, ...]] = {"Grad-CAM": ("relu_of_sum",), "LayerCAM": ("sum_of_relu",)}
CONFIDENCE = 0.9


class Maps:
    """All maps of a network at its layers, for one batch at a time."""

    def __init__(self, model: nn.Module, paths: tuple[str, ...], fit: Tensor, classes: list[int]):
        self._model, self._paths = model, paths
        inverse = InverseNetwork(model, layer=model.get_submodule(paths[0]))
        inverse.fit(fit, classes, batch_size=20, progress=False)
        lrp: Any = LRP(model, rule=Gamma(0.25))
        layers = {path: model.get_submodule(path) for path in paths}
        self._mipin = {p: LayerMIPINAttribution(model, inverse, m) for p, m in layers.items()}
        self._lrp = {path: LayerPropagation(lrp, module) for path, module in layers.items()}

    def __call__(self, x: Tensor, t: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (path, method, maps with channels) of a batch."""
        for path in self._paths:
            layer = self._model.get_submodule(path)
            slope: Any = LayerGradientXActivation(self._model, layer, multiply_by_inputs=False)
            g, f = slope.attribute(x, t).detach(), features(self._model, layer, x)
            a = self._mipin[path].attribute(x, t)
            yield path, "MIP-IN, A", a
            yield path, "MIP-IN, A × gradient", a * g
            yield path, "Grad-CAM", g.mean((2, 3), keepdim=True) * f
            yield path, "LayerCAM", g.relu() * f
            yield path, "LRP-γ", self._lrp[path].attribute(x, t)


def reduced(
    maps: Maps, x: Tensor, t: Tensor, batch: int
) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """Yield (path, method, reduction), maps without channels (images, height, width)."""
    found: dict[tuple[str, str, str], list[Tensor]] = {}
    for some, own in zip(x.split(batch), t.split(batch), strict=True):
        for path, method, values in maps(some, own):
            for reduction in FIXED.get(method, REDUCTIONS):
                one = heat(values, some, reduction).float()
                found.setdefault((path, method, reduction), []).append(one)
    yield from ((key, torch.cat(parts)) for key, parts in found.items())


def of_boxes(model: nn.Module, about: boxes.Photographs, maps: Maps) -> list[dict[str, Any]]:
    rows = []
    for (path, method, reduction), found in reduced(maps, about.x, about.labels, 16):
        row: dict[str, Any] = {"layer": path, "method": method, "reduction": reduction}
        for half, index in (("choosing", about.choice), ("reported", about.report)):
            result = bounding_box_accuracy(
                found[index], about.x[index], boxes=about.boxes[index], largest=boxes.LARGEST
            )
            row[half], row[f"{half}, standard error"] = result.mean, result.standard_error
        rows.append(row)
    return rows


def of_mosaics(
    model: nn.Module, x: Tensor, labels: Tensor, classes: list[int], maps: Maps
) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    halves = boxes.halves(labels, torch.Generator().manual_seed(0))
    for half, index in zip(("choosing", "reported"), halves, strict=True):
        for n, count in ((2, 12),):
            make = partial(mosaics, confidence=CONFIDENCE, classes=classes, batch_size=20)
            seed = torch.Generator().manual_seed(n)
            grid: Mosaics = make(model, x[index], labels[index], n, count, generator=seed)
            for key, found in reduced(maps, grid.x, grid.targets, 5):
                row = rows.setdefault(
                    key, dict(zip(("layer", "method", "reduction"), key, strict=True))
                )
                result = grid_pointing_game(found, grid)
                row[f"{half} {n}x{n}"] = result.mean
                row[f"{half} {n}x{n}, standard error"] = result.standard_error
    return list(rows.values())


def main() -> None:
    parser = network_parser(__doc__, fit=60, networks=LAYERS)
    parser.add_argument("part", choices=("boxes", "mosaics"))
    arguments = parser.parse_args()
    model, normalise, images = network_and_photos(arguments)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.inplace = False  # Captum's hooks would see what a later ReLU wrote
    about = boxes.photographs(arguments.network, arguments.data, normalise, arguments.fit)
    maps = Maps(model, LAYERS[arguments.network], about.fit, sorted(about.classes))
    if arguments.part == "boxes":
        rows = of_boxes(model, about, maps)
    else:
        x = normalise(images.test)
        rows = of_mosaics(model, x, images.labels, sorted(about.classes), maps)
    write(
        f"photographs-{arguments.part}-{arguments.network}", rows,
        data="600 ILSVRC2012 validation images of 20 classes", size=224, fit=arguments.fit,
        classes=sorted(about.classes), target="the label; of a mosaic the class of the cell",
        split="two halves, class by class at random", confidence=CONFIDENCE,
        network=arguments.network, title=pretrained.NETWORKS[arguments.network].file,
    )  # fmt: skip
    print(show(rows))


if __name__ == "__main__":
    main()
