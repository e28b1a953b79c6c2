"""Information bottlenecks on real networks.

    python benchmarks/bottleneck.py images|input|speed --data FOLDER

- images: bounding-box accuracy, insertion and deletion of IBA, MIP-IN, Grad-CAM and SmoothGrad,
  on photographs of ImageNet's validation set whose boxes cover at most a third of the image. All
  methods for layers are asked at the same layer.
- input: the same for InputIBA.
- speed: batches of sixteen against one sample at a time, the published loop, and the presets.

Bounding-box accuracy: let n be the number of pixels inside the boxes; the score is the share of the
n highest-scored pixels that lie inside. Deletion: mean probability of the target while the
highest-scored pixels are set to 0 (the mean colour), an eighth of the image at a time. Insertion:
the same while they are put into a blurred copy (kernel 11, σ 5). Both by the trapezoid rule; ties
are broken at random. ``benchmarks/bottleneck_text.py`` has the same for texts.
"""

import csv
import io
import json
import math
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretrained
import torch
from captum.attr import LayerGradCam, NoiseTunnel, Saliency
from common import parser_of, show, write
from data import load
from localization_grid import _image
from networks import trained
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from captum_mipin import IBA, LRP, InputIBA, InverseNetwork, LayerMIPINAttribution
from captum_mipin.bottleneck.gaussian import information, mask
from captum_mipin.bottleneck.iba import IBA_SETTINGS
from captum_mipin.bottleneck.input_iba import INPUT_IBA_SETTINGS
from captum_mipin.methods import Gamma, LayerPropagation
from captum_mipin.metrics import Baseline, deletion, insertion

LAYER = "features.7"
CLASSES = 4
Method = Callable[[Tensor, Tensor], Tensor]


def photographs(folder: Path, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (N, 3, 224, 224) in [0, 1], labels, and masks of boxes of at most a third."""
    with zipfile.ZipFile(folder / "ilsvrc2012_val_600_boxes.zip") as archive:
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open("annotations.csv"), "utf-8")))
        boxes = [_boxes(json.loads(row["boxes_xyxy_norm"])) for row in rows]
        fine = [i for i, mask in enumerate(boxes) if 0 < mask.double().mean() <= 1 / 3]
        sizes = Counter(int(rows[i]["class_index"]) for i in fine)
        classes = {c for c, _ in sizes.most_common(CLASSES)}
        chosen = [i for i in fine if int(rows[i]["class_index"]) in classes]
        chosen = [
            chosen[k]
            for k in torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[
                :count
            ].tolist()
        ]
        images = torch.stack([_image(archive, rows[i]["file"], 224) for i in chosen])
    labels = torch.tensor([int(rows[i]["class_index"]) for i in chosen])
    return images, labels, torch.stack([boxes[i] for i in chosen])


def _boxes(boxes: Sequence[Sequence[float]]) -> Tensor:
    mask = torch.zeros(224, 224, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        mask[round(224 * y0) : round(224 * y1), round(224 * x0) : round(224 * x1)] = True
    return mask


def training(folder: Path, count: int) -> Tensor:
    """Return images of ImageNet's training set, of the same twenty classes."""
    with zipfile.ZipFile(folder / "imagenet20_train_128px.zip") as archive:
        files = sorted(file for file in archive.namelist() if file.endswith(".JPEG"))
        picked = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[
            :count
        ].tolist()
        return torch.stack([_image(archive, files[index], 224) for index in picked])


def ranked(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Return the pixels of each map (N, H, W) in order, the highest-scored first.

    Equal pixels stand in random order, as they do for deletion.
    """
    flat = scores.flatten(1).double()
    order = torch.rand(flat.shape, generator=generator).argsort(1)
    return order.gather(1, flat.gather(1, order).argsort(dim=1, descending=True, stable=True))


def box_accuracy(order: Tensor, boxes: Tensor) -> Tensor:
    inside = boxes.flatten(1)
    count = inside.sum(1)
    first = torch.arange(order.shape[1])[None] < count[:, None]
    return (inside.gather(1, order) & first).sum(1) / count


def curves(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    seed: int,
    baseline: Baseline,
    steps: int = 8,
) -> tuple[Tensor, Tensor]:
    """Return areas of deletion, to 0, and insertion, from ``baseline``, of each image."""
    options: Any = {"model": model, "step": maps[0].numel() // steps}
    ties = (torch.Generator().manual_seed(seed) for _ in range(2))
    deleted = deletion(maps, x, target, generator=next(ties), **options)
    return deleted.values, insertion(
        maps, x, target, baseline=baseline, generator=next(ties), **options
    ).values


def blurred(x: Tensor) -> Tensor:
    found: Tensor = gaussian_blur(x, [11, 11], [5.0, 5.0])
    return found


def resized(maps: Tensor) -> Tensor:
    """Return maps (N, h, w) at the input's size."""
    return F.interpolate(
        maps.unsqueeze(1), size=(224, 224), mode="bilinear", align_corners=False
    ).squeeze(1)


def methods(
    model: nn.Module, fit: Tensor, known: Tensor, classes: list[int]
) -> dict[str, tuple[str, Method]]:
    """Return name → (layer and reduction, attribution as a map of pixels)."""
    layer, last = model.get_submodule(LAYER), model.get_submodule("features.12")
    inverse = InverseNetwork(model, layer=layer).fit(fit, classes, batch_size=20)
    iba = {
        name: IBA(model, layer, name).estimate(known, batch_size=20)
        for name in ("published", "fast")
    }
    print(iba["fast"].report)
    generator = torch.Generator().manual_seed(0)
    away = ((torch.arange(224) - 111.5) / 224) ** 2
    tunnel = NoiseTunnel(Saliency(model))

    def smooth_grad(x: Tensor, t: Tensor) -> Tensor:
        torch.manual_seed(0)
        found: Any = tunnel.attribute(
            x,
            target=t,
            nt_samples=20,
            stdevs=0.15 * float(x.max() - x.min()),
            nt_samples_batch_size=5,
        )
        total: Tensor = found.abs().sum(1).detach()
        return total

    def present(x: Tensor, t: Tensor) -> Tensor:
        return resized((inverse.explain((x,), t, layer=layer).features[0] != 0).float().sum(1))

    def grad_cam(module: nn.Module) -> Method:
        cam: Any = LayerGradCam(model, module)
        return lambda x, t: resized(cam.attribute(x, t, relu_attributions=True).detach().sum(1))

    def positive(attribute: Any, **options: Any) -> Method:
        return lambda x, t: resized(attribute(x, t, **options).detach().sum(1).clamp(min=0))

    def ours(module: nn.Module, **options: Any) -> Method:
        return positive(LayerMIPINAttribution(model, inverse, module).attribute, **options)

    at, top = f"{LAYER}, ", "features.12, "
    return {
        "random": ("input", lambda x, t: torch.rand(len(x), 224, 224, generator=generator)),
        "centre prior": (
            "input",
            lambda x, t: -(away[:, None] + away[None]).expand(len(x), -1, -1),
        ),
        "mask only": (at + "sum", present),
        "pattern only": (at + "sum, ReLU", ours(layer, local=False)),
        "MIP-IN": (at + "sum, ReLU", ours(layer)),
        "MIP-IN, × feature": (at + "sum, ReLU", ours(layer, multiply_by_features=True)),
        "MIP-IN, × gradient": (at + "sum, ReLU", ours(layer, multiply_by_gradients=True)),
        "MIP-IN, last layer": (top + "sum, ReLU", ours(last)),
        "MIP-IN, × feature, last layer": (top + "sum, ReLU", ours(last, multiply_by_features=True)),
        "MIP-IN, × gradient, last layer": (
            top + "sum, ReLU",
            ours(last, multiply_by_gradients=True),
        ),
        "LRP-γ": (
            at + "sum, ReLU",
            positive(LayerPropagation(LRP(model, rule=Gamma(0.25)), layer).attribute),
        ),
        "Grad-CAM": (at + "sum, ReLU", grad_cam(layer)),
        "Grad-CAM, last layer": (top + "sum, ReLU", grad_cam(last)),
        "SmoothGrad": ("input, absolute, sum", smooth_grad),
        "IBA": (at + "sum", lambda x, t: iba["published"].attribute(x, t, per_position=True)),
        "IBA, fast": (at + "sum", lambda x, t: iba["fast"].attribute(x, t, per_position=True)),
    }


def measured(
    name: str,
    where: str,
    maps: Tensor,
    taken: float,
    *,
    model: nn.Module,
    x: Tensor,
    t: Tensor,
    boxes: Tensor,
) -> dict[str, Any]:
    order = ranked(maps, torch.Generator().manual_seed(1))
    accuracy = box_accuracy(order, boxes)
    deleted, inserted = curves(model, x, maps, t, seed=1, baseline=blurred)
    row = {
        "method": name,
        "layer, reduction": where,
        "box accuracy": float(accuracy.mean()),
        "standard error": float(accuracy.std() / len(x) ** 0.5),
        "insertion": float(inserted.mean()),
        "deletion": float(deleted.mean()),
        "s an image": taken / len(x),
    }
    print(show([row]).splitlines()[-1], flush=True)
    return row


SETTINGS = {
    "data": "ILSVRC2012 validation photographs, boxes of at most a third, squashed to 224 x 224",
    "fit": "ILSVRC2012 training photographs of twenty classes, these among them",
    "network": "squeezenet1_0", "target": "the label", "ties": "at random", "steps": 8,
}  # fmt: skip


def images(folder: Path, count: int, fitted: int, estimated: int, pictures: Path | None) -> None:
    model, normalise = pretrained.load("squeezenet1_0", folder / "weights")
    photos, t, boxes = photographs(folder, count)
    x, classes = normalise(photos), sorted(set(t.tolist()))
    rows, kept, known = [], {}, normalise(training(folder, estimated))
    for name, (where, method) in methods(model, known[:fitted], known, classes).items():
        method(x[:1], t[:1])
        start = time.perf_counter()
        maps = torch.cat([method(*part) for part in zip(x.split(10), t.split(10), strict=True)])
        taken = time.perf_counter() - start
        rows.append(measured(name, where, maps, taken, model=model, x=x, t=t, boxes=boxes))
        kept[name] = maps
    settings = {"images": len(x), "fitted": fitted, "estimated": estimated, "classes": classes}
    write(
        "bottleneck-images",
        rows,
        **SETTINGS,
        **settings,
        fast_rank=rank(kept["IBA, fast"], kept["IBA"]),
    )
    print(show(rows))
    if pictures:
        torch.save({"images": photos, "boxes": boxes, "maps": kept}, pictures)


def inputs(folder: Path, count: int, estimated: int, pictures: Path | None) -> None:
    """Measure InputIBA on the same photographs, with fewer copies than published to save time."""
    model, normalise = pretrained.load("squeezenet1_0", folder / "weights")
    photos, t, boxes = photographs(folder, count)
    x = normalise(photos)
    fast = INPUT_IBA_SETTINGS["fast"]
    how = replace(
        fast, feature=replace(fast.feature, copies=2), input=replace(fast.input, copies=2)
    )
    iba = InputIBA(model, model.get_submodule(LAYER), how).estimate(
        normalise(training(folder, estimated)), batch_size=20
    )
    start = time.perf_counter()
    found = [iba.explain((part,), some) for part, some in zip(x.split(1), t.split(1), strict=True)]
    taken = time.perf_counter() - start
    rows = []
    for kind in ("mask", "information"):
        maps = torch.cat(
            [
                f.input.alpha.sigmoid().mean(1) if kind == "mask" else f.input.information.sum(1)
                for f in found
            ]
        )
        name = f"InputIBA, fast with 2 copies, {kind}"
        where = f"{LAYER} and input, " + ("mean" if kind == "mask" else "sum")
        rows.append(measured(name, where, maps, taken, model=model, x=x, t=t, boxes=boxes))
        if pictures:
            torch.save({"images": photos, "boxes": boxes, "maps": maps}, f"{pictures}.{kind}")
    write("bottleneck-input", rows, **SETTINGS, images=len(x), estimated=estimated)
    print(show(rows))


def rank(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation of maps (N, ...), averaged over the maps."""
    ranks = [m.flatten(1).argsort(1).argsort(1).double() for m in (a, b)]
    return float(
        torch.stack(
            [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]
        ).mean()
    )


def speed(folder: Path) -> None:
    """Measure batches of sixteen, the published loop and the presets."""
    digits = load("digits", folder)
    rows = [
        compared(
            "cnn-digits",
            trained("cnn-digits", digits),
            "features.1",
            known=digits.train[:1000],
            x=digits.test,
            t=digits.test_labels,
        )
    ]
    cifar = load("cifar10", folder)
    resnet, normalise = pretrained.load("resnet20", folder / "weights")
    known, x, t = normalise(cifar.train[:1000]), normalise(cifar.test[:16]), cifar.test_labels[:16]
    rows.append(compared("resnet20", resnet, "layer2", known=known, x=x, t=t))
    write("bottleneck-speed", rows, batch=16)
    print(show(rows))
    presets: list[dict[str, Any]] = []
    maps: list[Tensor] = []
    for name in ("images", "fast"):
        iba = InputIBA(resnet, resnet.get_submodule("layer2"), INPUT_IBA_SETTINGS[name]).estimate(
            known, progress=False
        )
        start = time.perf_counter()
        maps.append(iba.attribute(x[:2], t[:2], per_position=True))
        seconds = (time.perf_counter() - start) / 2
        again = iba.attribute(
            x[:2], t[:2], per_position=True, generator=torch.Generator().manual_seed(5)
        )
        agree = {"rank": rank(maps[-1], maps[0]), "rank, other noise": rank(again, maps[0])}
        presets.append({"settings": name, "s an image": seconds, **agree})
    write(
        "bottleneck-presets", presets, network="resnet20", layer="layer2", data="CIFAR-10 test",
        images=2,
    )  # fmt: skip
    print(show(presets))


def compared(
    network: str, model: nn.Module, path: str, *, known: Tensor, x: Tensor, t: Tensor
) -> dict[str, Any]:
    """Compare ways to explain sixteen images.

    Together, one by one, four by the published loop, with other noise, and by the fast preset.
    """
    x, t, layer = x[:16], t[:16], model.get_submodule(path)
    iba, fast = (
        IBA(model, layer, IBA_SETTINGS[name]).estimate(known, batch_size=20)
        for name in ("published", "fast")
    )
    maps, taken = dict[str, Tensor](), dict[str, float]()
    runs: dict[str, Callable[[], Tensor]] = {
        "one by one": lambda: torch.cat(
            [iba.attribute(*one, at="layer") for one in zip(x.split(1), t.split(1), strict=True)]
        ),
        "batch": lambda: iba.attribute(x, t, at="layer"),
        "loop": lambda: published_loop(model, layer, iba, x[:4], t[:4]),
        "other noise": lambda: iba.attribute(
            x, t, at="layer", generator=torch.Generator().manual_seed(5)
        ),
        "fast": lambda: fast.attribute(x, t, at="layer"),
    }
    for method in (iba, fast):
        method.attribute(x[:1], t[:1], at="layer")
    for name, run in runs.items():
        start = time.perf_counter()
        maps[name] = run()
        taken[name] = (time.perf_counter() - start) / len(maps[name])
    grids = {name: found.sum(1) for name, found in maps.items()}
    row = {
        "network": network,
        "layer": path,
        "images": len(x),
        "batch, s an image": taken["batch"],
        "one by one ÷ batch": taken["one by one"] / taken["batch"],
        "published loop ÷ batch": taken["loop"] / taken["batch"],
        "difference": float(
            (maps["batch"] - maps["one by one"]).norm() / maps["one by one"].norm()
        ),
        "batch ÷ fast": taken["batch"] / taken["fast"],
        "rank, fast": rank(grids["fast"], grids["batch"]),
        "rank, other noise": rank(grids["other noise"], grids["batch"]),
        "rank, loop": rank(grids["loop"], grids["batch"][:4]),
    }
    print(show([row]).splitlines()[-1], flush=True)
    return row


def published_loop(model: nn.Module, layer: nn.Module, iba: IBA, x: Tensor, t: Tensor) -> Tensor:
    """Explain one image at a time, as the released code does.

    Each step runs the whole network and takes the gradients of its parameters as well.
    """
    noise, how, found = iba.noise, iba.settings, []
    mean, std, active = (part.float() for part in (noise.mean, noise.std, noise.active))
    spatial = list(range(2, mean.ndim + 1))
    for image, target in zip(x, t, strict=True):
        alpha = torch.full_like(mean, how.start).unsqueeze(0).requires_grad_()
        adam = torch.optim.Adam([alpha], lr=how.learning_rate)
        told = alpha

        def squeeze(module: nn.Module, arguments: Any, r: Tensor, alpha: Tensor = alpha) -> Tensor:
            nonlocal told
            passed, blocked = mask(alpha, how.sigma, spatial)
            told = information((r[:1] - mean) / std, passed, blocked) * active
            return (passed * r + blocked * (mean + std * torch.randn_like(r))) * active

        handle = layer.register_forward_hook(squeeze)
        for _ in range(how.steps):
            adam.zero_grad()
            logits = model(image.expand(how.copies, *image.shape))
            loss: Any = how.beta * told.mean() - logits.log_softmax(1)[:, int(target)].mean()
            loss.backward()
            adam.step()
        handle.remove()
        found.append(told.detach() / math.log(2))
    model.zero_grad()
    return torch.cat(found)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("part", choices=("images", "input", "speed"))
    parser.add_argument("--data", type=Path, help="folder with the images and weights/")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--fit", type=int, default=60, help="images to fit MIP-IN on")
    parser.add_argument("--estimate", type=int, default=400, help="images to estimate features on")
    parser.add_argument("--maps", type=Path, help="where to keep the maps")
    arguments = parser.parse_args()
    if arguments.part == "images":
        images(arguments.data, arguments.images, arguments.fit, arguments.estimate, arguments.maps)
    elif arguments.part == "input":
        inputs(arguments.data, arguments.images, arguments.estimate, arguments.maps)
    else:
        speed(arguments.data)


if __name__ == "__main__":
    main()
