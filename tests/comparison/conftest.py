"""Comparisons that several test modules look at."""

import math

import pytest

from captum_mipin import compare
from captum_mipin.comparison import Comparison

BOXES = [(0, 0, 4, 4), (2, 2, 6, 6), (4, 4, 8, 8)]


@pytest.fixture(scope="session")
def side_by_side(cnn):
    """``compare`` for three images of the convolutional network, with an inverse and boxes."""

    def run(methods=("MIP-IN", "Saliency", "LRP"), **options):
        options = {
            "inverse": cnn.inverse,
            "boxes": BOXES,
            "progress": False,
            "titles": ["a", "<b>&", "c"],
            **options,
        }
        return compare(methods, cnn.x[:3], [0, 1, 2], **options)

    return run


def failing(inputs, target):
    raise ValueError("this network <i>is not</i> supported\nsecond line")


@pytest.fixture(scope="session")
def found(cnn, side_by_side) -> Comparison:
    methods = {
        "MIP-IN": cnn.mipin,
        "S": "Saliency",
        "broken": failing,
        "nan": lambda x, t: x * math.nan,
        "0": lambda x, t: 0 * x,
    }
    return side_by_side(methods, metrics=["bounding_box_accuracy", "deletion", "completeness"])
