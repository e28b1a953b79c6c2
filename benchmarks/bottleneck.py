"""Information bottlenecks on real networks: python benchmarks/bottleneck.py images|input|speed|text --data FOLDER.

- images: bounding-box accuracy, insertion and deletion of IBA, MIP-IN, Grad-CAM and SmoothGrad on photographs of ImageNet's
  validation set whose boxes cover at most a third; every layer method at the same layer;
- input: the same of InputIBA, and on a CIFAR ResNet how its presets agree;
- speed: batches of sixteen against one sample at a time, and the presets against each other;
- text: an LSTM that tells two libraries apart by sentences of their documentation.

Bounding-box accuracy: of the n highest-scored pixels, the share inside the boxes, n being the number of pixels inside.
Deletion: mean probability of the target as the highest-scored pixels are set to 0 (the mean colour), a tenth at a time;
insertion: as they are put into a blurred copy (kernel 11, σ 5), likewise; trapezoid rule. Ties are broken at random.
"""

import argparse
import csv
import io
import json
import statistics
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pretrained
import torch
from captum.attr import LayerGradCam, NoiseTunnel, Saliency
from common import show, write
from localization_grid import _image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from captum_mipin import IBA, InverseNetwork, LayerMIPINAttribution

LAYER = "features.7"
CLASSES = 4
Method = Callable[[Tensor, Tensor], Tensor]


def photographs(folder: Path, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, 224, 224) in [0, 1], labels, and masks of their boxes: classes in turn, boxes of at most a third, the classes with most."""
    with zipfile.ZipFile(folder / "ilsvrc2012_val_600_boxes.zip") as archive:
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open("annotations.csv"), "utf-8")))
        boxes = [_boxes(json.loads(row["boxes_xyxy_norm"])) for row in rows]
        fine = [i for i, mask in enumerate(boxes) if 0 < mask.double().mean() <= 1 / 3]
        sizes = Counter(int(rows[i]["class_index"]) for i in fine)
        classes = {c for c, _ in sizes.most_common(CLASSES)}
        chosen = [i for i in fine if int(rows[i]["class_index"]) in classes]
        chosen = [chosen[k] for k in torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:count].tolist()]
        images = torch.stack([_image(archive, rows[i]["file"], 224) for i in chosen])
    labels = torch.tensor([int(rows[i]["class_index"]) for i in chosen])
    return images, labels, torch.stack([boxes[i] for i in chosen])


def _boxes(boxes: Sequence[Sequence[float]]) -> Tensor:
    mask = torch.zeros(224, 224, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        mask[round(224 * y0) : round(224 * y1), round(224 * x0) : round(224 * x1)] = True
    return mask


def training(folder: Path, count: int) -> Tensor:
    """Images of ImageNet's training set, of the same twenty classes."""
    with zipfile.ZipFile(folder / "imagenet20_train_128px.zip") as archive:
        files = sorted(file for file in archive.namelist() if file.endswith(".JPEG"))
        picked = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count].tolist()
        return torch.stack([_image(archive, files[index], 224) for index in picked])


def ranked(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels of each map (N, H, W), the highest-scored first, equal ones in random order."""
    flat = scores.flatten(1).double()
    order = torch.rand(flat.shape, generator=generator).argsort(1)
    return order.gather(1, flat.gather(1, order).argsort(1, descending=True, stable=True))


def box_accuracy(order: Tensor, boxes: Tensor) -> Tensor:
    inside = boxes.flatten(1)
    count = inside.sum(1)
    first = torch.arange(order.shape[1])[None] < count[:, None]
    return (inside.gather(1, order) & first).sum(1) / count


def curves(model: nn.Module, x: Tensor, order: Tensor, target: Tensor, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Deletion and insertion of each image."""
    rank = order.argsort(1).view(len(x), 1, *x.shape[2:])
    blurred = gaussian_blur(x, [11, 11], [5.0, 5.0])
    found = []
    for start, end in ((x, torch.zeros_like(x)), (blurred, x)):
        probabilities = []
        for step in range(steps + 1):
            image = torch.where(rank < round(step * order.shape[1] / steps), end, start)
            with torch.no_grad():
                probabilities.append(model(image).softmax(1).gather(1, target[:, None])[:, 0])
        found.append(torch.trapezoid(torch.stack(probabilities), dx=1 / steps, dim=0))
    return found[0], found[1]


def resized(maps: Tensor) -> Tensor:
    """(N, h, w) at the input's size."""
    return F.interpolate(maps.unsqueeze(1), size=(224, 224), mode="bilinear", align_corners=False).squeeze(1)


def methods(model: nn.Module, fit: Tensor, classes: list[int]) -> dict[str, tuple[str, Method]]:
    """Name → (layer and reduction, attribution as a map of pixels)."""
    layer, last = model.get_submodule(LAYER), model.get_submodule("features.12")
    inverse = InverseNetwork(model, layer=layer).fit(fit, classes, batch_size=20)
    mipin: Any = LayerMIPINAttribution(model, inverse)
    iba = {name: IBA(model, layer, name).estimate(fit, batch_size=20) for name in ("published", "fast")}  # type: ignore[arg-type]  # names
    print(iba["fast"].report)
    generator = torch.Generator().manual_seed(0)
    away = ((torch.arange(224) - 111.5) / 224) ** 2
    tunnel = NoiseTunnel(Saliency(model))

    def smooth_grad(x: Tensor, t: Tensor) -> Tensor:
        torch.manual_seed(0)
        found: Any = tunnel.attribute(x, target=t, nt_samples=20, stdevs=0.15 * float(x.max() - x.min()), nt_samples_batch_size=5)
        return found.abs().sum(1).detach()

    def grad_cam(module: nn.Module) -> Method:
        cam: Any = LayerGradCam(model, module)
        return lambda x, t: resized(cam.attribute(x, t, relu_attributions=True).detach().sum(1))

    def ours(**options: Any) -> Method:
        return lambda x, t: resized(mipin.attribute(x, target=t, **options).sum(1).clamp(min=0))

    at = f"{LAYER}, "
    return {
        "random": ("input", lambda x, t: torch.rand(len(x), 224, 224, generator=generator)),
        "centre prior": ("input", lambda x, t: -(away[:, None] + away[None]).expand(len(x), -1, -1)),
        "mask only": (at + "sum", lambda x, t: resized((inverse.explain((x,), t, layer=layer).features[0] != 0).float().sum(1))),
        "pattern only": (at + "sum, ReLU", ours(local=False)),
        "MIP-IN": (at + "sum, ReLU", ours()),
        "MIP-IN, × feature": (at + "sum, ReLU", ours(multiply_by_features=True)),
        "Grad-CAM": (at + "sum, ReLU", grad_cam(layer)),
        "Grad-CAM, last layer": ("features.12, sum, ReLU", grad_cam(last)),
        "SmoothGrad": ("input, absolute, sum", smooth_grad),
        "IBA": (at + "sum", lambda x, t: iba["published"].attribute(x, t, per_position=True)),
        "IBA, fast": (at + "sum", lambda x, t: iba["fast"].attribute(x, t, per_position=True)),
    }


def measured(name: str, where: str, maps: Tensor, taken: float, model: nn.Module, x: Tensor, t: Tensor, boxes: Tensor) -> dict[str, Any]:
    order = ranked(maps, torch.Generator().manual_seed(1))
    accuracy = box_accuracy(order, boxes)
    deletion, insertion = (torch.cat(part) for part in zip(*(curves(model, *part) for part in zip(*(
        some.split(10) for some in (x, order, t)), strict=True)), strict=True))  # fmt: skip
    row = {
        "method": name, "layer, reduction": where, "box accuracy": float(accuracy.mean()),
        "standard error": float(accuracy.std() / len(x) ** 0.5), "insertion": float(insertion.mean()),
        "deletion": float(deletion.mean()), "s an image": taken / len(x),
    }  # fmt: skip
    print(show([row]).splitlines()[-1], flush=True)
    return row


SETTINGS = {
    "data": "ILSVRC2012 validation photographs, boxes of at most a third, squashed to 224 x 224",
    "fit": "ILSVRC2012 training photographs of the same classes",
    "network": "squeezenet1_0", "target": "the label", "ties": "at random", "steps": 10,
}  # fmt: skip


def images(folder: Path, count: int, fitted: int, pictures: Path | None) -> None:
    model, normalise = pretrained.load("squeezenet1_0", folder / "weights")
    photos, t, boxes = photographs(folder, count)
    x, classes = normalise(photos), sorted(set(t.tolist()))
    rows, kept = [], {}
    for name, (where, method) in methods(model, normalise(training(folder, fitted)), classes).items():
        method(x[:1], t[:1])
        start = time.perf_counter()
        maps = torch.cat([method(*part) for part in zip(x.split(10), t.split(10), strict=True)])
        rows.append(measured(name, where, maps, time.perf_counter() - start, model, x, t, boxes))
        kept[name] = maps
    write("bottleneck-images", rows, **SETTINGS, images=len(x), fitted=fitted, classes=classes)
    print(show(rows))
    if pictures:
        torch.save({"images": photos, "boxes": boxes, "maps": kept}, pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("images", "input", "speed", "text"))
    parser.add_argument("--data", type=Path, help="folder with the images and weights/")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--fit", type=int, default=200, help="images to fit and to estimate on")
    parser.add_argument("--maps", type=Path, help="where to keep the maps")
    arguments = parser.parse_args()
    if arguments.part == "images":
        images(arguments.data, arguments.images, arguments.fit, arguments.maps)


if __name__ == "__main__":
    main()
