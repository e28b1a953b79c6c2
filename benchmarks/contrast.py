"""What a class has beyond all others: MIP-IN's contrast against contrastive excitation backprop.

    python benchmarks/contrast.py NETWORK --data FOLDER [--boxes]

The mosaics of ``localization_grid.py``, with the methods at the same places. The last row but one
is the gradient of the same contrast times the features, without an inverse: what the question
alone gives. Differences are those from contrastive excitation backprop, mosaic by mosaic.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import boxes
import photographs
import pretrained
import torch
from common import show, write
from localization_grid import Method, network_and_photos, network_parser
from torch import Tensor, nn

from captum_mipin import (
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINAttribution,
    for_photographs,
)
from captum_mipin.methods import ExcitationBackprop, LayerPropagation
from captum_mipin.methods.gradients import Gradient
from captum_mipin.metrics import Mosaics, bounding_box_accuracy, grid_pointing_game, mosaics

PEER = "Excitation backprop, contrastive"


def methods(
    model: nn.Module, inverse: InverseNetwork, layer: nn.Module | None
) -> dict[str, Method]:
    """Return the methods that are compared at a layer, or at the input for None."""
    peer: Any = ExcitationBackprop(model, contrastive=True)
    ours: Any = MIPINAttribution(model, inverse)
    if layer is not None:
        peer, ours = LayerPropagation(peer, layer), LayerMIPINAttribution(model, inverse, layer)
    gradient = Gradient(model, contrast=True)

    def by_gradient(x: Tensor, target: Tensor) -> Any:
        explanation = gradient.explain(x, target, (), layer)
        return explanation.signals[0] * explanation.features[0]

    def reading(*options: str) -> Method:
        return partial(ours.attribute, **dict.fromkeys(options, True))

    features = f"multiply_by_{'features' if layer else 'inputs'}"
    return {
        PEER: peer.attribute,
        "MIP-IN, A × gradient": reading("multiply_by_gradients"),
        "MIP-IN, evidence × gradient": reading("evidence", "multiply_by_gradients"),
        "MIP-IN, contrast": reading("contrast"),
        "MIP-IN, contrast × feature": reading("contrast", features),
        "gradient of the contrast × feature": by_gradient,
        "MIP-IN, contrast × gradient": reading("contrast", "multiply_by_gradients"),
    }


def values(method: Method, grid: Mosaics, batch: int) -> Tensor:
    """Return the score of each mosaic."""
    parts = zip(grid.x.split(batch), grid.targets.split(batch), strict=True)
    maps = torch.cat([method(x, target).detach().sum(1, keepdim=True) for x, target in parts])
    return grid_pointing_game(maps, grid).values


def in_boxes(name: str, folder: Path, count: int) -> None:
    """Measure the box accuracy of the map for photographs, with and without the contrast."""
    chain = boxes.chain(name, folder)
    about = boxes.photographs(name, folder, chain.normalise, count)
    layer, number = list(photographs.LAYERS[name].items())[1]  # what `for_photographs` picks
    mipin = for_photographs(
        chain.steps, about.fit, sorted(about.classes), layer=chain.steps[number], batch_size=20
    )
    x, labels, masks = (t[about.report] for t in (about.x, about.labels, about.boxes))
    found = {}
    for contrast in (False, True):
        parts = zip(x.split(20), labels.split(20), strict=True)
        maps = torch.cat([mipin.attribute(*part, contrast=contrast) for part in parts])
        found[contrast] = bounding_box_accuracy(maps, x, boxes=masks, largest=boxes.LARGEST).values
    away = found[True] - found[False]
    row = {
        "n": len(away),
        "A × gradient": float(found[False].mean()),
        "contrast × gradient": float(found[True].mean()),
        "away": float(away.mean()),
        "error": float(away.std() / len(away) ** 0.5),
    }
    write(
        f"contrast-boxes-{name}", [row], fit=count, layer=layer, target="the label",
        data="ILSVRC2012 validation photographs at 224 x 224, boxes of at most 33 %",
        split="the second half, as in boxes.py", reduction="sum of absolute values over channels",
    )  # fmt: skip
    print(show([row]))


def main() -> None:
    parser = network_parser(__doc__, fit=400)
    parser.add_argument("--boxes", action="store_true", help="box accuracy, not mosaics")
    parser.add_argument("--classes", type=int, default=10, help="number of classes to fit")
    parser.add_argument("--confidence", type=float, default=0.99)
    parser.add_argument("--mosaics", type=int, default=200)
    parser.add_argument("--batch", type=int, default=10)
    arguments = parser.parse_args()
    if arguments.boxes:
        in_boxes(arguments.network, arguments.data, arguments.fit)
        return
    about = pretrained.NETWORKS[arguments.network]
    model, normalise, images = network_and_photos(arguments)
    present = sorted(set(images.labels.tolist()))
    classes = present[:: max(1, len(present) // arguments.classes)]
    grids = [
        mosaics(
            model, normalise(images.test), images.labels, n, arguments.mosaics,
            confidence=arguments.confidence, classes=classes,
            generator=torch.Generator().manual_seed(n),
        )
        for n in (2, 3)
    ]  # fmt: skip
    inverse = InverseNetwork(model).fit(normalise(images.fit), classes, batch_size=50)
    rows = []
    for place, path in (("input", None), ("middle", about.middle), ("last", about.last)):
        layer = None if path is None else model.get_submodule(path)
        peer: dict[int, Tensor] = {}
        for name, method in methods(model, inverse, layer).items():
            row: dict[str, Any] = {"layer": place, "path": path or "", "method": name}
            for grid in grids:
                key, scores = f"{grid.n}x{grid.n}", values(method, grid, arguments.batch)
                away = scores - peer.setdefault(grid.n, scores)
                row |= {key: float(scores.mean()), f"{key} away": float(away.mean())}
                row[f"{key} error"] = float(away.std() / len(away) ** 0.5)
            rows.append(row)
            print(show([row]).splitlines()[-1], file=sys.stderr, flush=True)
    write(
        f"contrast-{arguments.network}", rows,
        data="CIFAR-10 test" if about.size == 32
        else "600 ILSVRC2012 validation images of 20 classes",
        size=about.size, fit=len(images.fit), classes=classes, mosaics=arguments.mosaics,
        confidence=arguments.confidence, target="the class of the cell",
        reduction="sum over channels, then ReLU",
    )  # fmt: skip
    print(show(rows))


if __name__ == "__main__":
    main()
