"""Completeness of the source signal on the paper's small networks (tables 1 and 3 to 5).

    python benchmarks/completeness.py mlp-mnist cnn-mnist cnn-cifar10 [--data FOLDER] [--seeds N]

Fits MIP-IN for every class on all training images. Then measures, on the test images of each class
c, how far Φ_c(S) is from Φ_c(X): APC (equation 10) and positive APC (equation 11). Both divide by
|Φ_c(X)|, so that one misclassified image with a logit near zero can outweigh a thousand others.
Beside them stand the median error, the APC of the correctly classified images, and the APC of each
image for the class that the network predicts.

Controls on the same images, where Y_c is the logit of the class c that is explained:

- mean image: S replaced by the mean training image, of all classes or of class c;
- shuffled output: the inverse gets the Y_c of another test image, of any class or of class c, with
  the masks of the image itself;
- mask only: the inverse gets the mean Y_c of the training images, all or of class c, so that only
  the masks depend on the image.

The controls of class c keep the information of the label; only what is particular to the image is
withheld.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from common import parser_of, show, write
from data import Images, load
from networks import RECIPES, accuracy, trained
from torch import Tensor, nn

from captum_mipin import InverseNetwork

logger = logging.getLogger("completeness")

#: (x of one class, class) → what takes the place of S.
Signal = Callable[[Tensor, int], Tensor]


def apc(model: nn.Module, images: Images, signal: Signal) -> dict[str, float]:
    """Return APC and positive APC in percent (equations 10, 11).

    They are averaged over each class's test images, then over classes.
    """
    with torch.no_grad():
        logits = torch.cat([model(x) for x in images.test.split(500)])
    predicted, columns = logits.argmax(1), []
    for label in range(len(images.classes)):
        chosen = (images.test_labels == label) | (predicted == label)
        with torch.no_grad():
            found = torch.cat(
                [model(signal(x, label))[:, label] for x in images.test[chosen].split(250)]
            )
        y, true, named = (
            logits[chosen, label],
            images.test_labels[chosen] == label,
            predicted[chosen] == label,
        )
        error = (y - found) / y.abs()
        pairs = [
            (e.abs().mean(), e.relu().mean())
            for e in (error[true], error[true & named], error[named])
        ]
        columns.append([*(value for pair in pairs for value in pair), error[true].abs().median()])
    names = [
        f"{kind} %{of}"
        for of in ("", " (correct)", " (predicted)")
        for kind in ("APC", "positive APC")
    ]
    values = torch.tensor(columns).mean(0).mul(100).tolist()
    return dict(zip([*names, "median error %"], values, strict=True))


def controls(model: nn.Module, images: Images, inverse: InverseNetwork) -> dict[str, Signal]:
    """Return S and its controls.

    S = A + B with A linear in Y_c, so that another Y_c needs no other pass back.
    """
    with torch.no_grad():
        train, test = (
            torch.cat([model(x) for x in part.split(500)]) for part in (images.train, images.test)
        )
    generator = torch.Generator().manual_seed(0)

    def restarted(x: Tensor, label: int, y: Tensor) -> Tensor:
        found = inverse.explain((x,), label, biases=(False, True))
        (a,), (s,) = found.signals
        return s - a + a * (y / found.output).view(-1, *(1,) * (x.ndim - 1))

    def shuffled(x: Tensor, label: int, logits: Tensor) -> Tensor:
        return restarted(
            x, label, logits[torch.randint(len(logits), (len(x),), generator=generator)]
        )

    def own(values: Tensor, labels: Tensor, label: int) -> Tensor:
        return values[labels == label]

    return {
        "S": lambda x, c: inverse.source_signal(x, target=c),
        "S, input masked": lambda x, c: inverse.source_signal(x, target=c, mask_input=True),
        "mean image": lambda x, c: images.train.mean(0).expand_as(x),
        "shuffled output": lambda x, c: shuffled(x, c, test[:, c]),
        "mask only": lambda x, c: restarted(x, c, train[:, c].mean().expand(len(x))),
        "mean image of the class": lambda x, c: (
            own(images.train, images.train_labels, c).mean(0).expand_as(x)
        ),
        "shuffled output within the class": lambda x, c: shuffled(
            x, c, own(test[:, c], images.test_labels, c)
        ),
        "mask only, mean of the class": lambda x, c: restarted(
            x, c, own(train[:, c], images.train_labels, c).mean().expand(len(x))
        ),
    }


def measure(
    name: str,
    images: Images,
    model: nn.Module,
    count: int,
    *,
    plain: bool = True,
    own: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Fit on ``count`` training images; measure S, and unless ``plain`` its controls.

    Each class is fitted on its own images alone if ``own``.
    """
    start = time.perf_counter()
    x, labels, classes = (
        images.train[:count],
        images.train_labels[:count],
        range(len(images.classes)),
    )
    if own:
        inverses = [
            InverseNetwork(model, **options).fit(x[labels == c], targets=c, batch_size=500)
            for c in classes
        ]
    else:
        inverses = [InverseNetwork(model, **options).fit(x, batch_size=500)] * len(classes)
    seconds = time.perf_counter() - start
    logger.info("%s", inverses[0].report)
    signals = (
        {"S": lambda x, c: inverses[c].source_signal(x, target=c)}
        if plain
        else controls(model, images, inverses[0])
    )
    rows = []
    for kind, signal in signals.items():
        settings = {
            "fit images": count,
            "fitted on": "own class" if own else "all classes",
            "ridge": options.get("ridge", 1e-3),
            "ridge scale": options.get("ridge_scale", "relative"),
            "fit s": seconds,
        }
        rows.append({"network": name, "signal": kind, **apc(model, images, signal), **settings})
        logger.info("%s", rows[-1])
    return rows


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = parser_of(__doc__)
    parser.add_argument(
        "networks", nargs="*", default=["mlp-mnist", "cnn-mnist", "cnn-cifar10"], choices=RECIPES
    )
    parser.add_argument(
        "--data",
        help="folder with mnist.npz or the CIFAR-10 sheets; default: download with torchvision",
    )
    parser.add_argument(
        "--variants",
        type=int,
        default=10_000,
        help="training images for the rows that vary an option",
    )
    parser.add_argument(
        "--few", action="store_true", help="leave out the fits on all training images"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="networks trained, with seeds 0, 1, ..."
    )
    arguments = parser.parse_args()
    for name in arguments.networks:
        images = load(RECIPES[name].data, arguments.data)
        rows, accuracies = [], []
        for seed in range(0 if arguments.few else arguments.seeds):
            model = trained(name, images, seed=seed)
            accuracies.append(accuracy(model, images.test, images.test_labels))
            new = measure(name, images, model, len(images.train), plain=False)
            rows += [{"seed": seed, **row} for row in new]
        model, few = trained(name, images), arguments.variants
        for options in (
            {},
            {"ridge_scale": "mean"},
            {"ridge_scale": "sum"},
            {"ridge": 0.1},
            {"own": True},
        ):
            rows += [
                {"seed": 0, **row}
                for row in measure(name, images, model, few, plain=bool(options), **options)
            ]
        settings = {
            "data": images.name,
            "fitted on split": "train",
            "evaluated on split": "test",
            "n": len(images.test),
            "target": "true class",
            "layer": "input",
            "reduction": "mean over a class, then over classes",
            "tie policy": "none needed",
            "test accuracy": accuracies or [accuracy(model, images.test, images.test_labels)],
        }
        write(f"completeness-{name}", rows, **settings)
        print(show(rows))


if __name__ == "__main__":
    main()
