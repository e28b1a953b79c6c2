"""Time of ``compare`` for a method: a few photographs, MobileNetV2, the default metrics.

    python benchmarks/speed_compare.py [--images 6] [--threads 1] [--exact] [--data FOLDER]

Photographs and weights are those of the folder, or without it smooth noise of 224 x 224 and random
weights: the time hardly depends on either. "32 steps" is the default of ``compare``, "one row a
step" the published protocol (``steps=None``), which takes several times longer and is timed
with ``--exact``. Each is timed once per method, in turn; wall time and processor time of all
threads.
"""

import os
import time
from pathlib import Path
from typing import Any

import pretrained
import torch
import torchvision
from common import parser_of, show, write
from localization_grid import photos
from torch.nn import functional as F

from captum_mipin import compare

METHODS = ("Saliency", "Grad-CAM", "LRP", "random")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--exact", action="store_true", help="time one row of pixels a step too")
    parser.add_argument("--data", type=Path, help="folder with photographs and weights/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    x = F.interpolate(torch.rand(arguments.images, 3, 28, 28), (224, 224), mode="bilinear")
    if arguments.data is not None:
        model, normalise = pretrained.load("mobilenet_v2", arguments.data / "weights")
        images = photos("mobilenet_v2", arguments.data, 1, torch.Generator().manual_seed(0)).test
        x = normalise(images[: arguments.images])
    with torch.no_grad():
        model(x)  # the first call allocates memory
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"method": method}
        for title, steps in (("32 steps", 32), ("one row a step", None))[: 1 + arguments.exact]:
            wall, processor = time.perf_counter(), time.process_time()
            compare(
                [method], x, 0, model=model, layer="features.18", steps=steps, controls=False,
                progress=False,
            )  # fmt: skip
            row[f"{title}, wall s"] = time.perf_counter() - wall
            row[f"{title}, processor s"] = time.process_time() - processor
        rows.append(row)
        print(show(rows), flush=True)
    write(
        "speed-compare", rows, images=arguments.images, network="mobilenet_v2", side=224,
        photographs=arguments.data is not None, load=round(os.getloadavg()[0], 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
