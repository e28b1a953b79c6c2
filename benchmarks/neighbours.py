"""Neighbourhood fits on photographs: python benchmarks/neighbours.py --data FOLDER.

The head 25088-1024-1024-20 of ``benchmarks/heads.py`` is explained at its input, the features of SqueezeNet 1.0 (512 x 7 x 7,
after a ReLU, so that equation 9 applies to them as well). Inverses are fitted on the 6,600 photographs that it was trained on,
and explain photographs of ImageNet's validation set whose boxes cover at most a third, of the eight classes with most of them,
each for its label. With all photographs as neighbours, the inverse is the global one.

- Box accuracy: of the n hottest pixels, the share inside the boxes, n being the number of pixels inside, ties as chance has it;
  maps are the mean over channels of what is positive in A, of that times the features, and of S, made as large as the image;
- APC: of rightly classified photographs, how far the label's output for S is from that for the features, in percent (mean over
  photographs); shuffled: the inverse is given the output that another photograph has for this label, with the masks of this;
- cosine of A for the label and for another of the eight classes, drawn at random for each photograph;
- time of a photograph, search included: the median over batches of twenty, A and S together, one thread, as the clock has it
  and as spent on the processor.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import heads
import torch
from common import show, write
from networks import accuracy
from torch import Tensor, nn

from captum_mipin import InverseNetwork, NeighbourInverse
from captum_mipin.metrics import bounding_box_accuracy
from captum_mipin.metrics.similarity import cosine

CLASSES = 8
COUNTS = (15, 30, 60, 100, 300, 1000)
BATCH = 20


@dataclass(frozen=True)
class Chosen:
    """What is explained: features, labels, masks of the boxes, and another class for each."""

    x: Tensor
    labels: Tensor
    boxes: Tensor
    others: Tensor
    classes: list[int]


def chosen(found: heads.Features, count: int) -> Chosen:
    """Photographs with small boxes, of the classes with most of them."""
    area = found.boxes.flatten(1).double().mean(1)
    small = ((area > 0) & (area <= 0.33)).nonzero().squeeze(1)
    classes = sorted(c for c, _ in Counter(found.test_labels[small].tolist()).most_common(CLASSES))
    generator = torch.Generator().manual_seed(0)
    rows = small[torch.isin(found.test_labels[small], torch.tensor(classes))]
    rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
    labels = found.test_labels[rows]
    steps = torch.randint(1, CLASSES, (len(rows),), generator=generator)
    others = torch.tensor(classes)[(torch.searchsorted(torch.tensor(classes), labels) + steps) % CLASSES]
    return Chosen(found.test[rows], labels, found.boxes[rows], others, classes)


def boxed(maps: Tensor, these: Chosen) -> tuple[float, float]:
    """Box accuracy of maps (N, 7, 7), and its standard error."""
    images = torch.zeros(len(maps), 3, heads.SIZE, heads.SIZE)
    result = bounding_box_accuracy(maps.unsqueeze(1), images, boxes=these.boxes)
    return result.mean, result.standard_error


def measured(inverse: InverseNetwork, model: nn.Module, these: Chosen) -> dict[str, Any]:
    """One row: everything that is asked of an inverse."""
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
    apc, control = (100 * float(((y - found) / y).abs()[right].mean()) for found in (again, shuffled))
    accuracies = {
        name: boxed(maps.clamp(min=0).mean(1), these)
        for name, maps in (("A", a), ("A × feature", a.clamp(min=0) * these.x), ("S", s))
    }
    return {
        **{f"box accuracy, {name}": value for name, (value, _) in accuracies.items()},
        "standard error": max(error for _, error in accuracies.values()),
        "APC %": apc, "APC %, shuffled output": control, "cosine of two classes": float(cosine(a, other).mean()),
        "s a photograph": sorted(clock)[len(clock) // 2], "s of the processor": sorted(processor)[len(processor) // 2],
    }  # fmt: skip


def references(model: nn.Module, these: Chosen) -> dict[str, Tensor]:
    """Maps (N, 7, 7) of other methods, and controls."""
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


def compare(model: nn.Module, train: Tensor, these: Chosen, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row a method."""
    for name, maps in references(model, these).items():
        score, error = boxed(maps, these)
        yield {"method": name, "box accuracy, A": score, "standard error": error}
    near = NeighbourInverse(model).fit(train, progress=False)
    near.source_signal(these.x[:2], 0)
    for count in counts:
        near.neighbours = count
        yield {"method": "neighbours", "neighbours": count, **measured(near, model, these)}
    near.neighbours, near.metric = 60, "euclidean"
    yield {"method": "neighbours, Euclidean", "neighbours": 60, **measured(near, model, these)}
    for number, path in ((1, "3"), (2, "6")):
        other = NeighbourInverse(model, feature=model.get_submodule(path)).fit(train, progress=False)
        yield {"method": f"neighbours by hidden layer {number}", "neighbours": 60, **measured(other, model, these)}
    start = time.perf_counter()
    everywhere = InverseNetwork(model).fit(train, these.classes, progress=False)
    seconds = time.perf_counter() - start
    near.neighbours = len(train)
    mine, theirs = (i.explain((these.x[:1],), these.labels[:1], mask=True).signals[0][0] for i in (near, everywhere))
    difference = float((mine - theirs).norm() / theirs.norm())
    row = measured(everywhere, model, these)
    yield {"method": "all", "neighbours": len(train), **row, "fit s": seconds, "difference from k = N": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the zip files and weights/")
    parser.add_argument("--images", type=int, default=160, help="photographs to explain, at most")
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS, help="numbers of neighbours")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = heads.features(arguments.data)
    model, these = heads.trained(1024, found), chosen(found, arguments.images)
    rows = []
    for row in compare(model, found.train, these, arguments.counts):
        rows.append(row)
        print(row, flush=True)
    right = accuracy(model, these.x, these.labels)
    settings = {
        "data": "ILSVRC2012 validation photographs, boxes of at most a third", "images": len(these.x), "right": right,
        "fitted on": len(found.train), "network": "head 25088-1024-1024-20 on SqueezeNet 1.0, max-pooled to 7 x 7",
        "held out": accuracy(model, found.test, found.test_labels), "target": "the label", "batch": BATCH,
        "ties": "expected", "classes": these.classes,
    }  # fmt: skip
    write("neighbours", rows, **settings)
    print(show(rows))


if __name__ == "__main__":
    main()
