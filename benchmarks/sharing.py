"""One inverse a class against one for all classes below the first step: python benchmarks/sharing.py [NAMES] [--data FOLDER].

Completeness with its control, distance of the maps of two classes, time of the fit and bytes of the file.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from common import show, write
from data import load
from networks import RECIPES, trained

from captum_mipin import InverseNetwork, MIPINAttribution
from captum_mipin.metrics import class_sensitivity, completeness

SHARING: tuple[Literal["nothing", "classes"], ...] = ("nothing", "classes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["mlp-mnist"], choices=RECIPES)
    parser.add_argument("--data", help="folder with mnist.npz or the CIFAR-10 sheets; default: download with torchvision")
    parser.add_argument("--fit", type=int, default=3000, help="training images to fit on")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.networks:
        images = load(RECIPES[name].data, arguments.data)
        model = trained(name, images)
        x, labels = images.test[: arguments.test], images.test_labels[: arguments.test]
        with torch.no_grad():
            right = model(x).argmax(1) == labels
        for sharing in SHARING:
            start = time.perf_counter()
            inverse = InverseNetwork(model, sharing=sharing).fit(images.train[: arguments.fit], batch_size=500, progress=False)
            row: dict[str, Any] = {"network": name, "sharing": sharing, "fit s": time.perf_counter() - start}
            with tempfile.TemporaryDirectory() as folder:
                inverse.save(Path(folder) / "inverse")
                row["file MB"] = (Path(folder) / "inverse").stat().st_size / 1e6
            method = MIPINAttribution(model, inverse)
            generator = torch.Generator().manual_seed(0)
            found = completeness(method, x[right], labels[right], generator=generator, batch_size=250)
            row |= {"APC": found.mean, **{key: part.mean for key, part in found.parts.items()}}
            apart = class_sensitivity(method, x[right], labels[right], generator=generator, batch_size=250)
            row |= {f"classes: {key}": part.mean for key, part in apart.parts.items()}
            rows.append(row)
            print(show(rows[-1:]).splitlines()[-1], flush=True)
    write(
        "sharing", rows, fit=arguments.fit, n=arguments.test, split="test, correctly classified", target="true class",
        layer="input", reduction="mean over classes", ties="none needed",
    )  # fmt: skip
    print(show(rows))


if __name__ == "__main__":
    main()
