"""The paper's tables and figures on real data: python benchmarks/paper.py --data FOLDER [PART ...].

Each part writes its own results file, ``paper-<part>.json``; pictures go beside it.

- boxes-NETWORK: table 2, bounding-box accuracy, for squeezenet1_0, mobilenet_v2, efficientnet_lite0 and "head", a dense head
  of VGG's kind; see ``benchmarks/boxes.py``.

Table 1 is made by ``benchmarks/completeness.py``.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import boxes

PARTS: dict[str, Callable[[Path], None]] = {
    "boxes-efficientnet_lite0": partial(boxes.run, "efficientnet_lite0", count=100, classes=3, perturb=True),
    "boxes-squeezenet1_0": partial(boxes.run, "squeezenet1_0", count=100, classes=3, perturb=False),
    "boxes-head": partial(boxes.run, "head", count=100, classes=0, perturb=False),
    "boxes-mobilenet_v2": partial(boxes.run, "mobilenet_v2", count=100, classes=0, perturb=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--data", type=Path, required=True, help="folder with the images, and weights/ in it")
    arguments = parser.parse_args()
    for part in arguments.parts:
        PARTS[part](arguments.data)


if __name__ == "__main__":
    main()
