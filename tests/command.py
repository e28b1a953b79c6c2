"""The command line, and photographs for it, as tests of it and of exported programs use them."""

import logging
import shlex

import numpy as np
import torch
from PIL import Image

from captum_mipin.cli.arguments import build_parser
from captum_mipin.cli.main import COMMANDS, main

MEAN, STD = (
    torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1),
    torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1),
)
FORM = "--size 8 --mean 0.4,0.5,0.6 --std 0.2,0.25,0.3"


def call(*lines):
    """Run a command, given as a shell would take it; return its exit code."""
    return main(shlex.split(" ".join(lines)))


def parsed(*lines):
    return build_parser(COMMANDS).parse_args(shlex.split(" ".join(lines)))


def refused(capsys, *lines):
    """Return the one line on stderr of a command that fails."""
    before = logging.root.manager.disable
    assert call(*lines) == 1
    err = capsys.readouterr().err
    assert err.startswith("captum-mipin: ")
    assert err.count("\n") == 1
    assert logging.root.manager.disable == before
    return err


def take_photos(folders, count=40):
    """Write random images of 8 x 8 pixels, in turn to each of the folders."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folders[number % len(folders)] / f"{number:02}.png")


def photos(folder):
    """Return the images of a folder as a batch, normalised as by FORM."""
    images = [np.array(Image.open(path)) for path in sorted(folder.rglob("*.png"))]
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - MEAN) / STD
