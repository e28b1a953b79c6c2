"""A folder of photographs as a data set of normalised tensors."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_mipin.cli.optional import require_module
from captum_mipin.errors import InputError

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(Dataset[Tensor]):
    """The images of a folder and its subfolders, in the order of their paths.

    Each image is scaled to cover the size, cropped around its centre, and normalised. What is
    transparent becomes white.

    Args:
        path: Path of a folder or of one image; by default ``args.images``.
        args: The command's arguments. These are used: ``images``, the path of a folder or of one
            image; ``size``, (height, width) in pixels; ``mean`` and ``std``, one value per channel
            for pixels in [0, 1], or one value alone for grey images; and ``device``.

    Attributes:
        names: Paths of the images, relative to the folder.

    Raises:
        InputError: There is no image at the path.
        ImportError: Pillow is not installed.
    """

    def __init__(self, args: Namespace, path: str | None = None) -> None:
        self._image, self._operations = (
            require_module(name, "pillow") for name in ("PIL.Image", "PIL.ImageOps")
        )
        self._size, self._device = args.size, args.device
        self._mean, self._std = (torch.tensor(v).view(-1, 1, 1) for v in (args.mean, args.std))
        folder = Path(args.images if path is None else path)
        files = folder.rglob("*") if folder.is_dir() else [folder]
        self._paths = sorted(p for p in files if p.suffix.lower() in _SUFFIXES and p.is_file())
        if not self._paths:
            found = "holds no image" if folder.exists() else "does not exist"
            raise InputError(
                f"{str(folder)!r} {found}, expected files of {', '.join(_SUFFIXES)}: pass "
                "an image, or a folder with images"
            )
        base = folder if folder.is_dir() else folder.parent
        self.names = [path.relative_to(base).as_posix() for path in self._paths]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        """Return image ``index`` (channels, height, width) as float32.

        Raises:
            InputError: The file is not an image, or has more than 8 bits per channel.
        """
        path, (height, width) = self._paths[index], self._size
        try:
            with self._image.open(path) as file:
                # Pillow would clip integer and float pixels to 255 when it converts them
                if file.mode.startswith(("I", "F")):
                    raise ValueError(f"it has mode {file.mode}, expected 8 bits per channel")
                upright = self._operations.exif_transpose(file)
                # what is transparent may have any colour: it is shown on white
                if "A" in upright.getbands() or "transparency" in upright.info:
                    white = self._image.new("RGBA", upright.size, "white")
                    upright = self._image.alpha_composite(white, upright.convert("RGBA"))
                image = upright.convert("L" if len(self._mean) == 1 else "RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises errors of these types
            raise InputError(
                f"{str(path)!r} cannot be read as an image: {error}. Remove or convert this file"
            ) from error
        bilinear = self._image.Resampling.BILINEAR
        pixels = np.array(self._operations.fit(image, (width, height), bilinear))
        x = torch.from_numpy(pixels).view(height, width, -1).permute(2, 0, 1) / 255
        return (x - self._mean) / self._std

    def stack(self) -> Tensor:
        """Return all images as one batch (images, channels, height, width) on the device."""
        return torch.stack([self[index] for index in range(len(self))]).to(self._device)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the images in batches of ``size`` on the device."""
        for start in range(0, len(self), size):
            part = range(start, min(start + size, len(self)))
            yield torch.stack([self[index] for index in part]).to(self._device)

    def denormalise(self, x: Tensor) -> Tensor:
        """Return normalised images as pixels in [0, 1], on the CPU.

        Args:
            x: Normalised images (images, channels, height, width).
        """
        return (x.cpu() * self._std + self._mean).clamp(0, 1)
