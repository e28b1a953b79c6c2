"""The real images of the demo and the benchmarks, as float tensors in [0, 1].

Every loader returns :class:`Images`. ``digits`` comes with scikit-learn. The other data sets come
from torchvision, which downloads them on first use, or with ``folder=`` from these files:

- ``mnist.npz`` with ``train_images, train_labels, test_images, test_labels`` (uint8);
- ``cifar10_test_images.webp`` and ``cifar10_train_images_{1..4}.webp``, grids of 100 x 100 tiles,
  and ``cifar10_{train,test}_labels.txt``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
DIGIT_CLASSES = tuple(str(digit) for digit in range(10))
NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")


@dataclass(frozen=True)
class Images:
    """A data set for classification.

    Attributes:
        name: Its name, one of :data:`NAMES`.
        train, test: Images (N, C, H, W), float32 in [0, 1].
        train_labels, test_labels: Their classes (N,), int64.
        classes: Names of the classes.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


def load(
    name: str, folder: str | Path | None = None, cache: str | Path = ".cache/datasets"
) -> Images:
    """Load a data set by name, from ``folder`` where given, else from its public source."""
    if name == "digits":
        return _digits()
    if folder is not None:
        readers = {"mnist": _mnist_npz, "cifar10": _cifar10_webp}
        try:
            if name in readers:
                return readers[name](Path(folder))
        except FileNotFoundError as error:
            raise SystemExit(
                f"{error.filename} is missing: pass a folder with it, or leave --data (FOLDER= of "
                "make) out to download the data set"
            ) from error
        raise SystemExit(
            f"--data holds no {name!r}; leave it out to download {name!r} with torchvision"
        )
    try:
        return _torchvision(name, Path(cache))
    except (OSError, RuntimeError) as error:  # of torchvision, if all its mirrors fail
        way_out = f"pass --data (FOLDER= of make) with the files of {name}, or take digits"
        way_out = "take digits, which need no download" if name == "fashion-mnist" else way_out
        raise SystemExit(f"{name} cannot be downloaded ({error}): {way_out}") from error


def _digits() -> Images:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16.0
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1397], order[1397:]
    return Images("digits", images[train], labels[train], images[test], labels[test], DIGIT_CLASSES)


def _mnist_npz(folder: Path) -> Images:
    with np.load(folder / "mnist.npz") as files:
        train, test = (
            torch.from_numpy(files[f"{part}_images"]).float().unsqueeze(1) / 255
            for part in ("train", "test")
        )
        train_labels, test_labels = (
            torch.from_numpy(files[f"{part}_labels"]).long() for part in ("train", "test")
        )
    return Images("mnist", train, train_labels, test, test_labels, DIGIT_CLASSES)


def _cifar10_webp(folder: Path) -> Images:
    from PIL import Image

    def tiles(name: str) -> NDArray[np.uint8]:
        grid = np.asarray(Image.open(folder / name))
        return grid.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)

    def tensor(images: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255

    def labels(part: str) -> Tensor:
        return torch.tensor(
            [int(v) for v in (folder / f"cifar10_{part}_labels.txt").read_text().split()]
        )

    train = np.concatenate([tiles(f"cifar10_train_images_{part}.webp") for part in range(1, 5)])
    return Images(
        "cifar10",
        tensor(train),
        labels("train"),
        tensor(tiles("cifar10_test_images.webp")),
        labels("test"),
        CIFAR10_CLASSES,
    )


def _torchvision(name: str, cache: Path) -> Images:
    from torchvision import datasets

    kinds: dict[str, tuple[Any, tuple[str, ...]]] = {
        "mnist": (datasets.MNIST, DIGIT_CLASSES),
        "fashion-mnist": (datasets.FashionMNIST, FASHION_CLASSES),
        "cifar10": (datasets.CIFAR10, CIFAR10_CLASSES),
    }
    if name not in kinds:
        raise SystemExit(f"unknown data set {name!r}; one of {', '.join(NAMES)}")
    kind, classes = kinds[name]
    parts = [kind(cache, train=train, download=True) for train in (True, False)]

    def images(part: Any) -> Tensor:
        pixels = torch.as_tensor(part.data).float() / 255
        return pixels.permute(0, 3, 1, 2).contiguous() if pixels.ndim == 4 else pixels.unsqueeze(1)

    def labels(part: Any) -> Tensor:
        return torch.as_tensor(part.targets).long()

    return Images(
        name, images(parts[0]), labels(parts[0]), images(parts[1]), labels(parts[1]), classes
    )
