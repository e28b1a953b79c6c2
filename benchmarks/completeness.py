"""Completeness of the source signal on the paper's small networks (tables 1 and 3-5), with its controls.

    python benchmarks/completeness.py mlp-mnist cnn-mnist cnn-cifar10 [--data FOLDER]

Fits MIP-IN for every class on all training images, then measures on the test images of each class c how far Φ_c(S) is
from Φ_c(X): APC (equation 10) and positive APC (equation 11). Controls, on the same images:

- mean image: S replaced by the mean training image;
- shuffled output: the inverse is given the Y_c of another test image, with the masks of this one;
- mask only: the inverse is given the mean Y_c of the training images, so that only the masks speak of the image.
"""

import argparse
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from common import show, write
from data import Images, load
from networks import RECIPES, accuracy, trained
from torch import Tensor, nn

from captum_mipin import InverseNetwork

logger = logging.getLogger("completeness")

#: (x of one class, class) → what takes the place of S.
Signal = Callable[[Tensor, int], Tensor]


def apc(model: nn.Module, images: Images, signal: Signal) -> tuple[float, float]:
    """APC and positive APC in percent (equations 10, 11): per class over its test images, then over classes."""
    errors = []
    for label in range(len(images.classes)):
        x = images.test[images.test_labels == label]
        parts = []
        for part in x.split(250):
            with torch.no_grad():
                found = model(signal(part, label))[:, label]
                y = model(part)[:, label]
            parts.append((y - found) / y.abs())
        error = torch.cat(parts)
        errors.append((error.abs().mean(), error.relu().mean()))
    total, positive = torch.tensor(errors).mean(0).mul(100).tolist()
    return total, positive


def controls(model: nn.Module, images: Images, inverse: InverseNetwork) -> dict[str, Signal]:
    """S and what stands beside it. S = A + B with A linear in Y_c, so another Y_c needs no other pass back."""
    with torch.no_grad():
        train = torch.cat([model(x) for x in images.train.split(500)]).mean(0)
        test = torch.cat([model(x) for x in images.test.split(500)])
    mean = images.train.mean(0, keepdim=True)
    generator = torch.Generator().manual_seed(0)

    def restarted(x: Tensor, label: int, y: Tensor) -> Tensor:
        found = inverse.explain((x,), label, biases=(False, True))
        (a,), (s,) = found.signals
        return s - a + a * (y / found.output).view(-1, *(1,) * (x.ndim - 1))

    def shuffled(x: Tensor, label: int) -> Tensor:
        return restarted(x, label, test[torch.randint(len(test), (len(x),), generator=generator), label])

    return {
        "S": lambda x, label: inverse.source_signal(x, target=label),
        "S, input masked": lambda x, label: inverse.source_signal(x, target=label, mask_input=True),
        "mean image": lambda x, label: mean.expand_as(x),
        "shuffled output": shuffled,
        "mask only": lambda x, label: restarted(x, label, train[label].expand(len(x))),
    }


def measure(
    name: str, images: Images, model: nn.Module, count: int, fitted_on: str = "all classes", **options: Any
) -> list[dict[str, Any]]:
    """Fit on ``count`` training images and measure S and the controls, or without controls where only options vary."""
    start = time.perf_counter()
    if fitted_on == "all classes":
        inverse = InverseNetwork(model, **options).fit(images.train[:count], batch_size=500)
        inverses = dict.fromkeys(range(len(images.classes)), inverse)
    else:
        inverses = {}
        for label in range(len(images.classes)):
            own = images.train[:count][images.train_labels[:count] == label]
            inverses[label] = InverseNetwork(model, **options).fit(own, targets=label, batch_size=500)
    seconds = time.perf_counter() - start
    if options or fitted_on != "all classes":
        signals: dict[str, Signal] = {"S": lambda x, label: inverses[label].source_signal(x, target=label)}
    else:
        signals = controls(model, images, inverse)
        logger.info("%s", inverse.report)
    rows = []
    for kind, signal in signals.items():
        total, positive = apc(model, images, signal)
        rows.append(
            {
                "network": name, "signal": kind, "APC %": total, "positive APC %": positive, "fit images": count,
                "fitted on": fitted_on, "ridge": options.get("ridge", 1e-3),
                "ridge scale": options.get("ridge_scale", "relative"), "fit s": seconds,
            }
        )  # fmt: skip
        logger.info("%s", rows[-1])
    return rows


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["mlp-mnist", "cnn-mnist", "cnn-cifar10"], choices=RECIPES)
    parser.add_argument("--data", help="folder with mnist.npz or the CIFAR-10 sheets; default: download with torchvision")
    parser.add_argument("--variants", type=int, default=10_000, help="training images for the rows that vary an option")
    arguments = parser.parse_args()
    for name in arguments.networks:
        images = load(RECIPES[name].data, arguments.data)
        model = trained(name, images)
        rows = measure(name, images, model, len(images.train))
        few = arguments.variants
        rows += measure(name, images, model, few, ridge_scale="relative")
        rows += measure(name, images, model, few, ridge_scale="mean")
        rows += measure(name, images, model, few, ridge_scale="sum")
        rows += measure(name, images, model, few, ridge=1e-1)
        rows += measure(name, images, model, few, fitted_on="own class")
        settings = {
            "data": images.name, "fitted on split": "train", "evaluated on split": "test", "n": len(images.test),
            "target": "true class", "layer": "input", "reduction": "mean over a class, then over classes",
            "tie policy": "none needed", "test accuracy": accuracy(model, images.test, images.test_labels),
        }  # fmt: skip
        write(f"completeness-{name}", rows, **settings)
        print(show(rows))


if __name__ == "__main__":
    main()
