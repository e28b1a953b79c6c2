"""Time of ``compare`` for a method: a few photographs, MobileNetV2, the default metrics.

    python benchmarks/speed_compare.py [--images 6] [--threads 1] [--exact]

Images are smooth noise of 224 x 224 and weights are torchvision's random ones: the time depends on
neither. "32 steps" is the default of ``compare``, "one row a step" the published protocol
(``steps=None``), which takes about seven times as long and is timed with ``--exact``. Each is timed
once per method, in turn; wall time and processor time of all threads.
"""

import time
from typing import Any

import torch
import torchvision
from common import parser_of, show, write
from torch.nn import functional as F

from captum_mipin import compare

METHODS = ("Saliency", "Grad-CAM", "LRP", "random")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--exact", action="store_true", help="time one row of pixels a step too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    x = F.interpolate(torch.rand(arguments.images, 3, 28, 28), (224, 224), mode="bilinear")
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
    write("speed-compare", rows, images=arguments.images, network="mobilenet_v2", side=224)


if __name__ == "__main__":
    main()
