"""Cost and quality of MIP-IN on torchvision's classifiers as they come.

    python benchmarks/zoo.py [NAMES] [--data FOLDER]

One process a network. Measures the seconds of a capture and of a fit of one class on 64 images;
``attribute`` ÷ Captum's Saliency in processor time, for batches of 2 and of 8, and in peak memory,
for batches of 2, all for one class; and the share of the variance of held-out images that S
explains, where weights are given.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import pretrained
import torch
from captum.attr import Saliency
from common import parser_of, read, show, write
from localization_grid import photos
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision import models

from captum_mipin import InverseNetwork, MIPINAttribution, check

NAMES = (
    "alexnet",
    "vgg11",
    "vgg16_bn",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "squeezenet1_1",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet0_5",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_32",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
)
WITH_WEIGHTS = tuple(f"{name} (weights)" for name in pretrained.NETWORKS)
HELD_OUT, BATCH, MORE, ROUNDS = 32, 2, 8, 7


def network(name: str, data: Path | None, count: int) -> tuple[nn.Module, Tensor, Tensor, int]:
    """Return the network, images to fit on, held-out images, and the class.

    Weights and images are published ones where given, else random.
    """
    if name in WITH_WEIGHTS:
        assert data is not None
        name = name.split()[0]
        model, normalise = pretrained.load(name, data / "weights")
        images = photos(name, data, count, torch.Generator().manual_seed(0))
        return (
            model,
            normalise(images.fit),
            normalise(images.test[:HELD_OUT]),
            int(images.labels[0]),
        )
    torch.manual_seed(0)
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(models, name)(weights=None, **more).eval()
    if name.startswith("vit"):  # its head is zero as it comes
        nn.init.normal_(model.heads.head.weight, std=0.02)
    size = 299 if name == "inception_v3" else 224
    return model, torch.randn(count, 3, size, size), torch.randn(HELD_OUT, 3, size, size), 0


def peak(run: Callable[[], Any]) -> int:
    """Return the most memory that tensors made by ``run`` took at once, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any]) -> float:
    """Return the median processor time of ``ours`` ÷ that of ``theirs``, taken in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):  # the first is not counted
        for run, taken in zip((ours, theirs), times, strict=True):
            start = time.process_time()
            run()
            taken.append(time.process_time() - start)
    return statistics.median(times[0][1:]) / statistics.median(times[1][1:])


def measure(name: str, data: Path | None, count: int) -> dict[str, Any]:
    model, fit, held_out, target = network(name, data, count)
    row: dict[str, Any] = {
        "network": name,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    start = time.perf_counter()
    refused = check(model, fit[:1]).refused
    row["capture s"] = time.perf_counter() - start
    if refused:
        return row | {"refused": str(refused[0])}
    start = time.perf_counter()
    inverse = InverseNetwork(model).fit(fit, target, batch_size=8, progress=False)
    row["fit images"] = count
    row["fit s"] = time.perf_counter() - start
    mipin, saliency = MIPINAttribution(model, inverse), Saliency(model)

    def both(batch: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x, leaf = fit[:batch], fit[:batch].clone().requires_grad_()
        return partial(mipin.attribute, x, target=target), partial(
            saliency.attribute, leaf, target=target
        )

    row["time / Saliency"] = ratio(*both(BATCH))
    row[f"time / Saliency, {MORE} images"] = ratio(*both(MORE))
    row["memory / Saliency"] = truediv(*map(peak, both(BATCH)))
    if name in WITH_WEIGHTS:
        signal = torch.cat([mipin.source_signal(part, target=target) for part in held_out.split(8)])
        residual = (held_out - signal).square().sum() / (
            held_out - held_out.mean((0, 2, 3), keepdim=True)
        ).square().sum()
        row["R² held out"] = float(1 - residual)
    return row


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument(
        "--data", type=Path, help="folder with images and weights/, for the networks with weights"
    )
    parser.add_argument("--fit", type=int, default=64, help="images to fit on")
    parser.add_argument(
        "--one", action="store_true", help="measure the one network named, in this process"
    )
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.names[0], arguments.data, arguments.fit)))
        return
    names = arguments.names or [*NAMES, *(WITH_WEIGHTS if arguments.data else ())]
    rows = (
        {row["network"]: row for row in read("zoo")["rows"]} if arguments.names else {}
    )  # those not named stay
    for name in names:
        command = [sys.executable, __file__, "--one", name, "--fit", str(arguments.fit)]
        command += ["--data", str(arguments.data)] if arguments.data else []
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        failed = result.returncode != 0
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        rows[name] = (
            {"network": name, "failed": reason}
            if failed
            else json.loads(result.stdout.splitlines()[-1])
        )
        print(show([rows[name]]).splitlines()[-1], flush=True)
        write(
            "zoo", list(rows.values()), held_out=HELD_OUT, batch=BATCH, clock="processor time",
            rounds=ROUNDS, target="one class", data="random images, or as named",
        )  # fmt: skip
    print(show(list(rows.values())))


if __name__ == "__main__":
    main()
