"""Images are scaled, cropped and normalised; files that are none are refused."""

import numpy as np
import torch
from command import FORM, call, refused
from PIL import Image

from captum_mipin.cli import arguments
from captum_mipin.cli.images import ImageFolder
from captum_mipin.cli.main import COMMANDS


def load(path, options=""):
    words = ["compare", "a:b", str(path), *options.split()]
    return ImageFolder(arguments.parse(words, COMMANDS)).stack()


def test_images_are_scaled_to_cover_and_cropped(tmp_path):
    wide = np.full((4, 16, 3), 255, dtype=np.uint8)
    wide[:, 4:12] = (51, 102, 204)
    Image.fromarray(wide).save(tmp_path / "a.png")
    raw = "--mean 0,0,0 --std 1,1,1"
    expected = torch.tensor([0.2, 0.4, 0.8]).view(1, 3, 1, 1)
    torch.testing.assert_close(load(tmp_path, f"--size 4x8 {raw}"), expected.expand(1, 3, 4, 8))
    torch.testing.assert_close(load(tmp_path, f"--size 6 {raw}"), expected.expand(1, 3, 6, 6))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    imagenet = ((expected - mean) / std).expand(1, 3, 224, 224)
    torch.testing.assert_close(load(tmp_path), imagenet)


def test_images_stand_upright_and_may_be_grey(tmp_path):
    pixels = np.arange(32, dtype=np.uint8).reshape(4, 8)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned right by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    images = load(tmp_path, "--size 8x4 --mean 0.5 --std 2")
    upright = torch.from_numpy(np.rot90(pixels, -1).copy()).float()
    assert torch.equal(images[0, 0], (upright / 255 - 0.5) / 2)


def test_what_is_transparent_is_white(tmp_path):
    """Half of each image is transparent, with black behind; in colours, grey and a palette."""
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :4] = (51, 51, 51, 255)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    image.convert("LA").save(tmp_path / "b.png")
    palette = Image.fromarray((pixels[..., 3] == 0).astype(np.uint8)).convert("P")
    palette.putpalette([51, 51, 51, 0, 0, 0])
    palette.save(tmp_path / "c.png", transparency=1)
    expected = torch.ones(3, 8, 8)
    expected[:, :, :4] = 0.2
    found = load(tmp_path, "--size 8 --mean 0,0,0 --std 1,1,1")
    torch.testing.assert_close(found, expected.expand(3, 3, 8, 8))


def test_grey_networks_take_grey_images():
    grey = "tiny_networks:grey --size 8 --mean 0.5 --std 0.5"
    assert call(f"check {grey}") == 0
    assert call(f"compare {grey} few --methods Saliency --quiet --out grey.png") == 0


def test_files_that_are_no_images_are_refused(folder, capsys):
    for name in ("empty", "bad", "deep"):
        (folder / name).mkdir()
    (folder / "bad" / "a.png").write_bytes(b"not a picture")
    pixels = np.full((8, 8), 20_000, dtype=np.uint16)
    Image.fromarray(pixels).save(folder / "deep" / "a.png")
    for message, images in (
        ("'nowhere' does not exist, expected files of .bmp", "nowhere"),
        ("'empty' holds no image", "empty"),
        ("cannot be read as an image", "bad"),
        ("mode I;16, expected 8 bits", "deep"),
    ):
        line = f"fit tiny_networks:build {FORM} {images} --out no.safetensors --quiet"
        assert message in refused(capsys, line), message
