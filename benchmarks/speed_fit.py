"""Cost of a fit of a whole network, beside a pass forward and beside another checkout.

    python benchmarks/speed_fit.py --data FOLDER [--base CHECKOUT] [NAMES]

Each row is a process of its own, so that its peak of memory is its own: processor time on one
thread of ``fit`` down to the pixels, ÷ that of one pass forward over the same 32 photographs of 224
x 224. The weights of torchvision's networks are random: the time does not depend on them. Those
marked *weights* are published. With ``--base``, the folder of another checkout, its fit stands in
the same row; rows alternate between the two.

The limit is the time that the matrix products of the fit take at the rate that a product of two
matrices of 3,000 x 3,000 has in the same process: per convolution of k taps, the (2k − 1)^d lags of
its signal, by symmetry half of them, and the products with its input; signals down; one pass
forward. Fast Fourier transforms need fewer operations than the lags, systems of equations more.
"""

import io
import json
import os
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pretrained
import torch
from common import parser_of, read, show, write
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

IMAGES, BATCH = 32, 32
#: Network and number of classes; networks with weights report what they explain of other images.
ROWS = (
    ("resnet18", 1), ("resnet18", 10), ("resnet50", 1), ("vgg16_bn", 1),
    ("mobilenet_v2 (weights)", 1), ("efficientnet_lite0 (weights)", 1),
)  # fmt: skip


def network(name: str, data: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, photographs to fit on, and other photographs."""
    known = name.split()[0]
    weights = known if name.endswith("(weights)") else "mobilenet_v2"
    model, normalise = pretrained.load(weights, data / "weights")
    if not name.endswith("(weights)"):
        torch.manual_seed(0)
        model = models.get_model(known, weights=None).eval()
    names = "imagenet20_train_128px.zip", "ilsvrc2012_val_600_boxes.zip"
    first, other = (normalise(photographs(data / name)) for name in names)
    return model, first, other


def photographs(archive: Path) -> Tensor:
    """Return some of the photographs of an archive, evenly spread, as (images, 3, 224, 224)."""
    images = []
    with zipfile.ZipFile(archive) as files:
        names = sorted(n for n in files.namelist() if n.lower().endswith((".jpeg", ".jpg", ".png")))
        for name in names[:: len(names) // IMAGES][:IMAGES]:
            image = Image.open(io.BytesIO(files.read(name))).convert("RGB").resize((224, 224))
            images.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255)
    return torch.stack(images)


def processor(run: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def limit(model: nn.Module, x: Tensor) -> float:
    """Return the operations of the fit's matrix products for one class, see above."""
    lags: list[float] = []

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        k = prod(2 * n - 1 for n in module.kernel_size)
        positions, channels = output.numel() / output.shape[1], output.shape[1]
        lags.append(2 * positions * channels * channels / module.groups * (k + 1) / 2)

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    for hook in hooks:
        hook.remove()
    return float(sum(lags) + 3 * counter.get_total_flops())


def measure(name: str, classes: int, data: Path) -> dict[str, Any]:
    """Return the times and the peak of memory of one fit, in this process."""
    from captum_mipin import InverseNetwork

    model, x, other = network(name, data)
    small = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 2)).eval()
    InverseNetwork(small).fit(x[:9, :, :4, :4], progress=False)  # to warm up
    a = torch.randn(3000, 3000)
    with torch.no_grad():
        model(x[:4])
        forward = min(processor(lambda: model(x)) for _ in range(2))
    rate = 2 * 3000**3 / min(processor(lambda: a @ a) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inverse = InverseNetwork(model)
    targets = list(range(classes))
    fit = processor(lambda: inverse.fit(x, targets, batch_size=BATCH, progress=False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {
        "network": name, "classes": classes, "forward s": forward, "fit s": fit,
        "GEMM Gflops/s": rate / 1e9, "limit s": limit(model, x[:2]) / len(x[:2]) * IMAGES / rate,
        "peak GiB": peak / 2**20, "peak before GiB": before / 2**20,
    }  # fmt: skip
    if name.endswith("(weights)"):
        residual = (other - inverse.source_signal(other, 0)).square().sum()
        mean = other.mean((0, 2, 3), keepdim=True)
        row["R² held out"] = float(1 - residual / (other - mean).square().sum())
    return row


def run(name: str, classes: int, data: Path, checkout: Path | None) -> dict[str, Any]:
    """Return :func:`measure` from a process of its own, with the package of a checkout."""
    command = [sys.executable, __file__, "--one", name, "--classes", str(classes)]
    path = str(Path(__file__).parents[1] if checkout is None else checkout)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--data", str(data)], capture_output=True, text=True, env=environment, check=True
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Measure all rows, or those of the networks named, and write the results."""
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--data", type=Path, required=True, help="folder of images and weights/")
    parser.add_argument("--base", type=Path, help="folder of another checkout")
    parser.add_argument("--one", help="measure the one network named, in this process")
    parser.add_argument("--classes", type=int, default=1, help="number of classes, for --one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.classes, arguments.data)))
        return
    try:
        known = {(row["network"], row["classes"]): row for row in read("speed-networks")["rows"]}
    except FileNotFoundError:
        known = {}
    for name, classes in ROWS:
        if arguments.names and name not in arguments.names:
            continue
        row = run(name, classes, arguments.data, None)
        if arguments.base:
            base = run(name, classes, arguments.data, arguments.base)
            row |= {f"base {key}": base[key] for key in row.keys() & base.keys() if " " in key}
        known[name, classes] = row
        print(show([row]), flush=True)
        ordered = [known[key] for key in ROWS if key in known]
        write("speed-networks", ordered, images=IMAGES, batch=BATCH, clock="processor time")


if __name__ == "__main__":
    main()
