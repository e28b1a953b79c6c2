"""Neighbourhood fits on photographs.

    python benchmarks/neighbours.py --data FOLDER

The head 25088-1024-1024-20 of ``benchmarks/heads.py`` is explained at its input, the features of
SqueezeNet 1.0 (512 x 7 x 7, after a ReLU, so that equation 9 applies to them as well). Inverses are
fitted on the 6,600 photographs that the head was trained on. They explain photographs of ImageNet's
validation set whose boxes cover at most a third, of the eight classes with most of them, each for
its label; with 1,000 neighbours only sixty of them, to save time. With all photographs as
neighbours the inverse is the global one, and is fitted as such. Neighbours are searched among the
features, or by the output of a hidden layer.

- Box accuracy: let n be the number of pixels inside the boxes; the score is the share of the n
  hottest pixels that lie inside, with ties as chance has it. Maps are the mean over channels of the
  positive part of A, of A times the features, and of S, resized to the image.
- APC of rightly classified photographs: how far the label's output for S is from its output for the
  features, in percent, averaged over photographs. Shuffled: the inverse gets the output that
  another photograph has for this label, with the masks of the photograph itself.
- Cosine of A for the label and for another of the eight classes, drawn for each photograph.
- Time of a photograph, search included: the median over batches of twenty, A and S together, on one
  thread, both wall and processor time.
"""

import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import heads
import torch
from common import RESULTS, parser_of, show, write
from networks import accuracy
from torch import Tensor, nn

from captum_mipin import InverseNetwork, NeighbourInverse
from captum_mipin.inverse.base import ModelInverse
from captum_mipin.metrics import bounding_box_accuracy
from captum_mipin.metrics.similarity import cosine

CLASSES = 8
BATCH = 20
FEW = 60
PARTS = (
    "references",
    "15",
    "30",
    "60",
    "100",
    "300",
    "1000",
    "Euclidean",
    "hidden 1",
    "hidden 2",
    "all",
)


@dataclass(frozen=True)
class Chosen:
    """The photographs to explain: features, labels, masks of the boxes, and another class."""

    x: Tensor
    labels: Tensor
    boxes: Tensor
    others: Tensor
    classes: list[int]


def chosen(found: heads.Features) -> Chosen:
    """Return photographs with small boxes, of the classes with most of them."""
    area = found.boxes.flatten(1).double().mean(1)
    small = ((area > 0) & (area <= 0.33)).nonzero().squeeze(1)
    classes = sorted(c for c, _ in Counter(found.test_labels[small].tolist()).most_common(CLASSES))
    generator = torch.Generator().manual_seed(0)
    rows = small[torch.isin(found.test_labels[small], torch.tensor(classes))]
    rows = rows[torch.randperm(len(rows), generator=generator)]
    labels = found.test_labels[rows]
    steps = torch.randint(1, CLASSES, (len(rows),), generator=generator)
    others = torch.tensor(classes)[
        (torch.searchsorted(torch.tensor(classes), labels) + steps) % CLASSES
    ]
    return Chosen(found.test[rows], labels, found.boxes[rows], others, classes)


def boxed(maps: Tensor, these: Chosen) -> tuple[float, float]:
    """Return the box accuracy of maps (N, 7, 7), and its standard error."""
    images = torch.zeros(len(maps), 3, heads.SIZE, heads.SIZE)
    result = bounding_box_accuracy(maps.unsqueeze(1), images, boxes=these.boxes)
    return result.mean, result.standard_error


def measured(inverse: ModelInverse[Any], model: nn.Module, these: Chosen) -> dict[str, Any]:
    """Return one row: all measurements of an inverse."""
    parts, clock, processor = [], [], []
    for x, t in zip(these.x.split(BATCH), these.labels.split(BATCH), strict=True):
        start = time.perf_counter(), time.process_time()
        parts.append(inverse.explain((x,), t, biases=(False, True), mask=True))
        clock.append((time.perf_counter() - start[0]) / len(x))
        processor.append((time.process_time() - start[1]) / len(x))
    a, s = (torch.cat([part.signals[bias][0] for part in parts]) for bias in (0, 1))
    other = torch.cat([
        inverse.explain((x,), t, mask=True).signals[0][0]
        for x, t in zip(these.x.split(BATCH), these.others.split(BATCH), strict=True)
    ])  # fmt: skip
    rows = torch.arange(len(these.x))
    with torch.no_grad():
        logits = model(these.x)
        y, swapped = logits[rows, these.labels], logits.roll(1, 0)[rows, these.labels]
        again = model(s)[rows, these.labels]
        shuffled = model(s + a * (swapped / y - 1).view(-1, 1, 1, 1))[rows, these.labels]
    right = logits.argmax(1) == these.labels
    apc, control = (
        100 * float(((y - found) / y).abs()[right].mean()) for found in (again, shuffled)
    )
    accuracies = {
        name: boxed(maps.clamp(min=0).mean(1), these)
        for name, maps in (("A", a), ("A × feature", a.clamp(min=0) * these.x), ("S", s))
    }
    return {
        **{f"box accuracy, {name}": value for name, (value, _) in accuracies.items()},
        "standard error": max(error for _, error in accuracies.values()),
        "photographs": len(these.x),
        "APC %": apc,
        "APC %, shuffled output": control,
        "cosine of two classes": float(cosine(a, other).mean()),
        "s a photograph": sorted(clock)[len(clock) // 2],
        "s of the processor": sorted(processor)[len(processor) // 2],
    }


def references(model: nn.Module, these: Chosen) -> dict[str, Tensor]:
    """Return maps (N, 7, 7) of other methods, and controls."""
    x = these.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).gather(1, these.labels[:, None]).sum(), x)
    x = x.detach()
    away = (torch.arange(7) - 3.0) ** 2
    return {
        "random": torch.rand(len(x), 7, 7, generator=torch.Generator().manual_seed(0)),
        "centre prior": -(away[:, None] + away[None]).expand(len(x), -1, -1),
        "mask only": (x > 0).float().sum(1),
        "sum of features": x.sum(1),
        "Grad-CAM": (gradient.mean((2, 3), keepdim=True) * x).sum(1).clamp(min=0),
        "LayerCAM": (gradient.clamp(min=0) * x).sum(1),
    }


def compare(part: str, model: nn.Module, train: Tensor, these: Chosen) -> list[dict[str, Any]]:
    """Yield the rows of one part."""
    if part == "references":
        scores = {name: boxed(maps, these) for name, maps in references(model, these).items()}
        return [
            {"method": name, "box accuracy, A": score, "standard error": error}
            for name, (score, error) in scores.items()
        ]
    if part == "all":
        return [everywhere(model, train, these)]
    path = {"hidden 1": "3", "hidden 2": "6"}.get(part)
    inverse = NeighbourInverse(
        model,
        neighbours=int(part) if part.isdecimal() else 60,
        metric="euclidean" if part == "Euclidean" else "cosine",
        feature=None if path is None else model.get_submodule(path),
    ).fit(train, progress=False)
    inverse.source_signal(these.x[:2], 0)
    if inverse.neighbours >= 1000:  # for time
        these = replace(
            these, **{key: getattr(these, key)[:FEW] for key in ("x", "labels", "boxes", "others")}
        )
    name = "neighbours" if part.isdecimal() else f"neighbours, {part}"
    return [{"method": name, "neighbours": inverse.neighbours, **measured(inverse, model, these)}]


def everywhere(model: nn.Module, train: Tensor, these: Chosen) -> dict[str, Any]:
    """Return the row of the global fit."""
    start = time.perf_counter()
    inverse = InverseNetwork(model).fit(train, these.classes, progress=False)
    seconds = time.perf_counter() - start
    return {
        "method": "all",
        "neighbours": len(train),
        **measured(inverse, model, these),
        "fit s": seconds,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        help=f"what to measure, other rows stay as they were: {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the zip files and weights/"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = heads.features(arguments.data)
    model, these = heads.trained(1024, found), chosen(found)
    settings = {
        "data": "ILSVRC2012 validation photographs, boxes of at most a third",
        "images": len(these.x),
        "fitted on": len(found.train),
        "network": "head 25088-1024-1024-20 on SqueezeNet 1.0, max-pooled to 7 x 7",
        "held out": accuracy(model, found.test, found.test_labels),
        "right": accuracy(model, these.x, these.labels),
        "target": "the label",
        "batch": BATCH,
        "ties": "expected",
        "classes": these.classes,
    }
    path = RESULTS / "neighbours.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() and arguments.parts else []
    for part in arguments.parts or PARTS:
        new = [{"part": part, **row} for row in compare(part, model, found.train, these)]
        rows = sorted(
            [row for row in rows if row["part"] != part] + new,
            key=lambda row: PARTS.index(row["part"]),
        )
        write("neighbours", rows, **settings)
        print(show(new), flush=True)


if __name__ == "__main__":
    main()
