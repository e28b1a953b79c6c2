"""Dense heads on frozen features of real photographs.

    python benchmarks/heads.py --data FOLDER [--width 1024]

A photograph, squashed to 224 x 224, goes through SqueezeNet 1.0 with published weights. Its last
features are max-pooled to 512 x 7 x 7, the size at which the dense head of a VGG starts. The head,
25088-width-width-20 with ReLU and dropout, is trained on 6,600 photographs of ImageNet's training
set, mirrored and shifted as features; 600 of its validation set are held out. Features and heads
are computed once and kept in the cache.
"""

import argparse
import csv
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pretrained
import torch
from localization_grid import _image
from networks import accuracy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

SIZE = 224
SHAPE = (512, 7, 7)
CLASSES = 20
CACHE = Path(".cache")


@dataclass(frozen=True)
class Features:
    """Features (N, 512, 7, 7) of photographs and their labels, 0 to 19.

    Attributes:
        train, train_labels: Those to train and fit on.
        test, test_labels: Those to explain.
        boxes: Masks of the objects to explain, (N, 224, 224).
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    boxes: Tensor


def features(folder: Path, cache: Path = CACHE) -> Features:
    """Return the features of all photographs in ``folder``, computed at the first call."""
    path = cache / "features" / "squeezenet1_0-max7.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(_features(folder), str(partial))
        partial.replace(path)
    found = load_file(str(path))
    return Features(
        found["train"], found["train_labels"], found["test"], found["test_labels"], boxes(folder)
    )


def body(folder: Path) -> nn.Module:
    """Return normalised photographs → features: SqueezeNet without its classifier."""
    model, _ = pretrained.load("squeezenet1_0", folder / "weights")
    return nn.Sequential(model.get_submodule("features"), nn.MaxPool2d(3, 2, 1)).eval()


def boxes(folder: Path) -> Tensor:
    """Return masks of the objects of the photographs to explain, (N, 224, 224)."""
    with zipfile.ZipFile(folder / "ilsvrc2012_val_600_boxes.zip") as archive:
        return torch.stack(
            [_mask(json.loads(row["boxes_xyxy_norm"])) for row in _annotations(archive)]
        )


def _annotations(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    return list(csv.DictReader(io.TextIOWrapper(archive.open("annotations.csv"), "utf-8")))


def _mask(found: Sequence[Sequence[float]]) -> Tensor:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for x0, y0, x1, y1 in found:
        mask[round(SIZE * y0) : round(SIZE * y1), round(SIZE * x0) : round(SIZE * x1)] = True
    return mask


def _features(folder: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(folder / "imagenet20_train_128px.zip") as archive:
        files = sorted(file for file in archive.namelist() if file.endswith(".JPEG"))
        names = sorted({_class(file) for file in files})
        train, labels = (
            _through(folder, archive, files),
            [names.index(_class(file)) for file in files],
        )
    with zipfile.ZipFile(folder / "ilsvrc2012_val_600_boxes.zip") as archive:
        rows = _annotations(archive)
        test = _through(folder, archive, [row["file"] for row in rows])
    test_labels = [names.index(row["wnid"]) for row in rows]
    return {
        "train": train,
        "train_labels": torch.tensor(labels),
        "test": test,
        "test_labels": torch.tensor(test_labels),
    }


def _class(file: str) -> str:
    return file.partition("/")[0]


def _through(
    folder: Path, archive: zipfile.ZipFile, files: Sequence[str], size: int = 20
) -> Tensor:
    """Return features of photographs; the channels_last format is the fastest here."""
    model = body(folder).to(memory_format=torch.channels_last)
    _, normalise = pretrained.load("squeezenet1_0", folder / "weights")
    found = torch.empty(len(files), *SHAPE)
    with torch.inference_mode(), tqdm(total=len(files), desc="features", unit="image") as progress:
        for start in range(0, len(files), size):
            images = torch.stack(
                [_image(archive, file, SIZE) for file in files[start : start + size]]
            )
            found[start : start + size] = model(
                normalise(images).contiguous(memory_format=torch.channels_last)
            )
            progress.update(len(images))
    return found


def head(width: int, classes: int = CLASSES) -> nn.Sequential:
    """Build 25088-width-width-classes, with dropout before each layer but the last."""
    inputs = SHAPE[0] * SHAPE[1] * SHAPE[2]
    return nn.Sequential(
        nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(width, classes),
    )  # fmt: skip


def train(width: int, x: Tensor, labels: Tensor, epochs: int = 6, seed: int = 0) -> nn.Sequential:
    """Train a head.

    AdamW, decay 0.1, one-cycle rate with maximum 3e-4, label smoothing 0.1, batches of 128.
    Features are scaled to a standard deviation of 1; the scale then goes into the first layer.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, size, scale = head(width), 128, float(x[:500].std())
    steps = epochs * -(-len(x) // size)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-4, total_steps=steps)
    with tqdm(total=steps, desc=f"train a head of width {width}", unit="batch") as progress:
        for index in _order(len(x), epochs, size, generator):
            loss = F.cross_entropy(
                model(_augment(x[index], generator) / scale), labels[index], label_smoothing=0.1
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            progress.update()
    first = model.get_submodule("2")
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight /= scale
    return model.eval()


def _order(count: int, epochs: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(size)


def _augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the maps and shift all by up to one position, one shift a batch."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    row, column = torch.randint(0, 3, (2,), generator=generator).tolist()
    return F.pad(x, (1, 1, 1, 1), "replicate")[
        ..., row : row + SHAPE[1], column : column + SHAPE[2]
    ]


def trained(width: int, found: Features, cache: Path = CACHE) -> nn.Sequential:
    """Return the head of this width, trained at the first call and kept."""
    path = cache / "networks" / f"head-squeezenet1_0-max7-{width}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(train(width, found.train, found.train_labels).state_dict(), str(partial))
        partial.replace(path)
    model = head(width).eval()
    model.load_state_dict(load_file(str(path)))
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Dense heads on frozen features of real photographs."
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the zip files and weights/"
    )
    parser.add_argument("--width", type=int, default=1024)
    arguments = parser.parse_args()
    photographs = features(arguments.data)
    model = trained(arguments.width, photographs)
    print(f"held out: {accuracy(model, photographs.test, photographs.test_labels):.3f}")
    print(f"trained on: {accuracy(model, photographs.train, photographs.train_labels):.3f}")
