"""One inverse a class against one for all classes below the first step.

    python benchmarks/sharing.py [NAMES] [--data FOLDER]

Measures completeness with its control, the distance of the maps of two classes, the time of the fit
and the bytes of the file. For resnet20, with its published weights in FOLDER/weights, measures
localization instead: mosaics of 2 x 2 test images of CIFAR-10, at two layers.
"""

import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import pretrained
import torch
from common import parser_of, show, write
from data import load
from networks import RECIPES, trained

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution
from captum_mipin.metrics import class_sensitivity, completeness, grid_pointing_game, mosaics

SHARING: tuple[Literal["nothing", "classes"], ...] = ("nothing", "classes")


def localization(folder: Path, fit: int, test: int) -> None:
    """Measure the grid pointing game on mosaics, at the output of two stages."""
    model, normalise = pretrained.load("resnet20", folder / "weights")
    images = load("cifar10", folder)
    x, labels, classes = normalise(images.test[:test]), images.test_labels[:test], list(range(10))
    generator = torch.Generator().manual_seed(2)
    grid = mosaics(model, x, labels, 2, 100, confidence=0.99, classes=classes, generator=generator)
    with torch.no_grad():
        positive = model(grid.x).gather(1, grid.targets[:, None])[:, 0] > 0
    rows = []
    for sharing in SHARING:
        start = time.process_time()
        inverse = InverseNetwork(model, layer=model.get_submodule("layer2"), sharing=sharing)
        inverse.fit(normalise(images.train[:fit]), classes, batch_size=50, progress=False)
        taken = time.process_time() - start
        for path in ("layer2", "layer3"):
            method = LayerMIPINAttribution(model, inverse, model.get_submodule(path))
            for name, product in (("A", False), ("A × feature", True)):
                result = grid_pointing_game(
                    method.attribute(grid.x, target=grid.targets, multiply_by_features=product),
                    grid,
                )
                rows.append(
                    {
                        "network": "resnet20",
                        "sharing": sharing,
                        "layer": path,
                        "map": name,
                        "fit s": taken,
                        "2x2": result.mean,
                        "standard error": result.standard_error,
                        "positive logit": float(result.values[positive].mean()),
                    }
                )
                print(show(rows[-1:]).splitlines()[-1], flush=True)
    write(
        "sharing-localization", rows, fit=fit, mosaics=len(grid.x), test=test, classes=classes,
        confidence=0.99, target="the class of the cell", reduction="sum over channels, then ReLU",
        seconds="of the processor",
    )  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "networks", nargs="*", default=["mlp-mnist"], choices=[*RECIPES, "resnet20"]
    )
    parser.add_argument(
        "--data",
        help="folder with mnist.npz or the CIFAR-10 sheets; default: download with torchvision",
    )
    parser.add_argument("--fit", type=int, default=3000, help="training images to fit on")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    arguments = parser.parse_args()
    if "resnet20" in arguments.networks:
        localization(Path(arguments.data), min(arguments.fit, 200), arguments.test)
    rows = []
    for name in (name for name in arguments.networks if name in RECIPES):
        images = load(RECIPES[name].data, arguments.data)
        model = trained(name, images)
        x, labels = images.test[: arguments.test], images.test_labels[: arguments.test]
        with torch.no_grad():
            right = model(x).argmax(1) == labels
        for sharing in SHARING:
            start = time.perf_counter()
            inverse = InverseNetwork(model, sharing=sharing).fit(
                images.train[: arguments.fit], batch_size=500, progress=False
            )
            row: dict[str, Any] = {
                "network": name,
                "sharing": sharing,
                "fit s": time.perf_counter() - start,
            }
            with tempfile.TemporaryDirectory() as folder:
                inverse.save(Path(folder) / "inverse")
                row["file MB"] = (Path(folder) / "inverse").stat().st_size / 1e6
            method = MIPINAttribution(model, inverse)
            generator = torch.Generator().manual_seed(0)
            found = completeness(
                method, x[right], labels[right], generator=generator, batch_size=250
            )
            row |= {"APC": found.mean, **{key: part.mean for key, part in found.parts.items()}}
            apart = class_sensitivity(
                method, x[right], labels[right], generator=generator, batch_size=250
            )
            row |= {f"classes: {key}": part.mean for key, part in apart.parts.items()}
            rows.append(row)
            print(show(rows[-1:]).splitlines()[-1], flush=True)
    if not rows:
        return
    write(
        "sharing", rows, fit=arguments.fit, n=arguments.test, split="test, correctly classified",
        target="true class", layer="input", reduction="mean over classes", ties="none needed",
    )  # fmt: skip
    print(show(rows))


if __name__ == "__main__":
    main()
