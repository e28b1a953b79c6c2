"""Explain photographs by EfficientNet-Lite0, trained on ImageNet; ``benchmarks/demo.py`` runs this.

Weights and photographs are those of installed packages: nothing is downloaded at run time.
"""

import importlib
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pretrained
import torch
from captum.attr import LayerGradCam
from PIL import Image, ImageOps
from torch import Tensor, nn

from captum_mipin import compare, for_photographs
from captum_mipin.comparison import Comparison
from captum_mipin.metrics import deletion, insertion

SIZE = 224
#: Photographs that are explained and drawn at most, and crops of each to fit on.
SHOWN, CROPS = 8, 8
#: Seed of the crops: the typical one of several, see ``typical.py``.
SEED = 1
METRICS: Any = {
    "insertion": partial(insertion, steps=12),
    "deletion": partial(deletion, steps=12),
}
#: Package, folder and files of photographs that may be copied: of NASA and the US Navy (public
#: domain), CC0 by their authors, and CC BY 2.0 (china and flower).
PACKAGED = (
    ("skimage", "data", ("chelsea.png", "coffee.png", "camera.png", "rocket.jpg")),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    ("matplotlib", "mpl-data/sample_data", ("grace_hopper.jpg",)),
    ("skimage", "data", ("astronaut.png",)),
)
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def packaged() -> list[Path]:
    """Return the paths of the photographs that ship in installed packages."""
    found = []
    for package, folder, files in PACKAGED:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, f"{package} is not installed"
        found += [Path(spec.origin).parent / folder / file for file in files]
    return found


def photographs(folder: Path | None) -> list[Image.Image]:
    """Return the photographs of a folder, or those of installed packages."""
    if folder is None:
        paths = packaged()
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    images = [image for image in map(_opened, paths) if image is not None]
    if not images:
        raise SystemExit(
            f"{folder} holds no photograph that can be read: pass PHOTOS=, a folder with files of "
            f"{', '.join(SUFFIXES)}"
        )
    return images


def _opened(path: Path) -> Image.Image | None:
    """Return a photograph, upright, in colours and on white where it is transparent.

    None if the file is no image, which is printed.
    """
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):  # Pillow would clip such pixels to 255
                raise ValueError(f"it has mode {file.mode}, expected 8 bits per channel")
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises errors of these types
        print(f"left out {path}: {error}")
        return None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def whole(image: Image.Image) -> Tensor:
    """Return the middle of a photograph (3, height, width) in [0, 1]."""
    return _tensor(ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BILINEAR))


def crops(image: Image.Image, count: int, generator: torch.Generator) -> list[Tensor]:
    """Return random squares of 60 to 100 % of the shorter side, half of them mirrored."""
    found = []
    for _ in range(count):
        scale, left, top, turned = torch.rand(4, generator=generator).tolist()
        side = int(min(image.size) * (0.6 + 0.4 * scale))
        x, y = int(left * (image.width - side)), int(top * (image.height - side))
        square = image.crop((x, y, x + side, y + side)).resize(
            (SIZE, SIZE), Image.Resampling.BILINEAR
        )
        found.append(_tensor(ImageOps.mirror(square) if turned < 0.5 else square))
    return found


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def to_fit(images: Sequence[Image.Image], seed: int = SEED) -> Tensor:
    """Return images to fit on: of many photographs all, of few random crops of each."""
    if len(images) >= SHOWN * CROPS:
        return torch.stack([whole(image) for image in images])
    count, generator = -(-SHOWN * CROPS // len(images)), torch.Generator().manual_seed(seed)
    return torch.stack([crop for image in images for crop in crops(image, count, generator)])


def imagenet() -> Sequence[str]:
    """Return the names of ImageNet's classes."""
    weights: Any = importlib.import_module("torchvision.models").ResNet18_Weights.DEFAULT
    names: Sequence[str] = weights.meta["categories"]
    return names


def compared(
    model: nn.Module, fit: Tensor, x: Tensor, pictures: Tensor, names: Sequence[str]
) -> tuple[Comparison, str]:
    """Return the comparison of MIP-IN with Grad-CAM, Saliency and controls, and MIP-IN's label.

    Args:
        model: The network.
        fit: Normalised images to fit on.
        x: Normalised images to explain, each for the class that the network predicts.
        pictures: The same images in [0, 1].
        names: Names of the classes.
    """
    with torch.no_grad():
        targets = model(x).argmax(1)
    mipin = for_photographs(model, fit, targets.unique().tolist(), batch_size=16)
    cam: Any = LayerGradCam(model, model.get_submodule("_bn1"))
    methods: dict[str, Any] = {
        mipin.picked: mipin,
        "Grad-CAM at _bn1": partial(cam.attribute, relu_attributions=True),
        "Saliency": "Saliency",
    }
    found = compare(methods, x, targets, model=model, metrics=METRICS, names=names)
    return replace(found, images=pictures), mipin.picked


def run(out: Path, folder: Path | None) -> None:
    """Write ``photographs.png``, ``photographs.html`` and ``photographs.md`` to ``out``."""
    begin, images = time.perf_counter(), photographs(folder)
    shown, fitted = images[:SHOWN], to_fit(images)
    model, normalise = pretrained.efficientnet_lite0()
    pictures = torch.stack([whole(image) for image in shown])
    found, label = compared(
        model, normalise(fitted), normalise(pictures), pictures, imagenet()
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    found.figure(across=True).savefig(out / "photographs.png", dpi=100)
    found.save_html(out / "photographs.html", "Photographs, EfficientNet-Lite0")
    counts = f"{len(shown)} photographs, fitted on {len(fitted)} images"
    text = f"""EfficientNet-Lite0, {counts}; {label}

{found.table("markdown")}

Each photograph is explained for the class that the network predicts, right or wrong.
{_worth(len(images), len(fitted), folder)}
"""
    (out / "photographs.md").write_text(text)
    print(f"\n{text}\nwrote {out}/photographs.png, .html and .md in "
          f"{time.perf_counter() - begin:.0f} s")  # fmt: skip


def _worth(images: int, fitted: int, folder: Path | None) -> str:
    """Return what the results are worth."""
    if folder is not None and images == fitted:
        return (
            "MIP-IN was fitted on the photographs of the folder, the explained ones among them. "
            "Look at the controls: a method that scores no better shows nothing of the image."
        )
    few = "" if folder else (
        "Installed packages ship few photographs of what ImageNet knows. The picture tripod shows "
        "a man with a camera on one, the flower is a dahlia, and the astronaut is no bobsled: look "
        "there at what misled the network.\n"
    )  # fmt: skip
    return (
        f"{few}MIP-IN was fitted on {fitted} crops and mirror images of the same {images} "
        "photographs. This shows how the package is called and what its maps look like. It does "
        "not show how well MIP-IN works: crops of a photograph are not new photographs, and a few "
        "photographs cannot rank methods. docs/results.md has figures on photographs that were "
        "held out. A method that scores no better than the controls (random, centre prior, mask "
        "only, pattern only) shows nothing of the image."
    )
