"""A fit of a whole network and its calls on a GPU.

    python benchmarks/gpu.py [--network resnet50] [--images 256] [--batch 64] [--device cuda]

One run of less than ten minutes: seconds of ``fit`` for one class down to the pixels, on random
images of ``--size`` pixels and random weights (the time depends on neither), after a fit on two
images to warm up; ``attribute`` ÷ Captum's Saliency on 2, 8 and 32 images, medians in turn; the
peak of the device's memory. The largest difference between the source signals of the device and
those of the CPU, for a fit on a few images in float64, shows that both compute the same. Writes
``results/speed-gpu.json``, unless the device is the CPU, on which small settings test the script.
"""

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from captum.attr import Saliency
from common import parser_of, show, write
from torch import Tensor, nn
from torchvision import models

from captum_mipin import InverseNetwork, MIPINAttribution

ROUNDS = 21


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of a call, and of all that it started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def against_saliency(
    model: nn.Module, inverse: InverseNetwork, x: Tensor, rounds: int
) -> dict[str, Any]:
    """Return the median times of ``attribute`` and of Saliency, in turn."""
    saliency, mipin = Saliency(model), MIPINAttribution(model, inverse)
    leaf = x.clone().requires_grad_()
    calls = (lambda: mipin.attribute(x, 0), lambda: saliency.attribute(leaf, 0))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            taken.append(seconds(call, x.device))
    ours, theirs = (statistics.median(taken[1:]) for taken in times)
    return {f"attribute / Saliency, {len(x)} images": ours / theirs}


def difference(model: nn.Module, x: Tensor) -> float:
    """Return the largest difference of S from the CPU's S, ÷ its largest value, in float64."""
    signals = []
    for device in (x.device, torch.device("cpu")):
        double, images = deepcopy(model).double().to(device), x.double().to(device)
        inverse = InverseNetwork(double).fit(images, 0, progress=False)
        signals.append(inverse.source_signal(images, 0).cpu())
    return float((signals[0] - signals[1]).abs().max() / signals[1].abs().max())


def measure(
    model: nn.Module, x: Tensor, *, batch: int, rounds: int = ROUNDS, few: int = 4
) -> dict[str, Any]:
    """Return one row: the fit on all images ``x``, and calls on the first of them."""
    cuda = x.device.type == "cuda"
    InverseNetwork(model).fit(x[:2], 0, progress=False)  # to warm up
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    inverse = InverseNetwork(model)
    taken = seconds(lambda: inverse.fit(x, 0, batch_size=batch, progress=False), x.device)
    row: dict[str, Any] = {"images": len(x), "batch": batch, "fit s": taken}
    if cuda:
        row["device"] = torch.cuda.get_device_name()
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    for count in (2, 8, 32):
        if count <= len(x):
            row |= against_saliency(model, inverse, x[:count], rounds)
    return row | {"largest difference from the CPU": difference(model, x[:few])}


def main() -> None:
    """Measure one network on one device."""
    parser = parser_of(__doc__)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = models.get_model(arguments.network, weights=None).eval().to(device)
    x = torch.randn(arguments.images, 3, arguments.size, arguments.size, device=device)
    row = {"network": arguments.network, **measure(model, x, batch=arguments.batch)}
    print(show([row]))
    if device.type == "cuda":
        write("speed-gpu", [row], size=arguments.size, rounds=ROUNDS)


if __name__ == "__main__":
    main()
