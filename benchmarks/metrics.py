"""What deletion costs against one forward a step and image, as a ratio within one run: python benchmarks/metrics.py.

16 images, maps at random, RISE's steps of one image row; the time does not depend on the weights, which are torch's random
ones. "one forward a step" does what the RISE protocol says, image by image: it replaces the next pixels, in place, runs the
network, takes the softmax. Both give the same curves, which is checked. "forwards alone" is the time of the network on as many
images, ready made, in batches of the size that is fastest: what no implementation can go below. At 224 x 224 it is 2 images.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import show, write
from networks import RECIPES
from torch import Tensor, nn

from captum_mipin.metrics import deletion

IMAGES = 16


def one_by_one(model: nn.Module, maps: Tensor, x: Tensor, target: int, step: int) -> Tensor:
    """RISE's loop: (images, steps + 1) probabilities."""
    curves = []
    for image, heat in zip(x, maps, strict=True):
        order = heat.flatten().argsort(descending=True)
        now = image.clone()
        flat, curve = now.flatten(1), []
        with torch.no_grad():
            for start in range(-step, len(order), step):
                flat[:, order[max(start, 0) : start + step]] = 0
                curve.append(float(model(now[None]).softmax(1)[0, target]))
        curves.append(curve)
    return torch.tensor(curves)


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Name → how to build it, the shape of its images."""
    import torchvision

    return {
        "cnn-digits": (RECIPES["cnn-digits"].build, (IMAGES, 1, 8, 8)),
        "mlp-mnist": (RECIPES["mlp-mnist"].build, (IMAGES, 1, 28, 28)),
        "cnn-mnist": (RECIPES["cnn-mnist"].build, (IMAGES, 1, 28, 28)),
        "cnn-cifar10": (RECIPES["cnn-cifar10"].build, (IMAGES, 3, 32, 32)),
        "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(weights=None), (2, 3, 224, 224)),
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def forwards(model: nn.Module, x: Tensor, size: int) -> None:
    with torch.no_grad():
        for part in x.split(size):
            model(part)


def measure(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Medians of alternating runs."""
    torch.manual_seed(0)
    model, x, maps = build().eval(), torch.rand(shape), torch.rand(shape[0], *shape[2:])
    ready = x.repeat(shape[-1] + 1, 1, 1, 1)
    times: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        loop, expected = timed(lambda: one_by_one(model, maps, x, 3, shape[-1]))
        ours, result = timed(lambda: deletion(maps, x, 3, model=model))
        now = {"loop": loop, "ours": ours}
        now |= {f"forward {size}": timed(partial(forwards, model, ready, size))[0] for size in (1, 4, 16, 64, 256)}
        if repeat:  # the first warms up
            for key, seconds in now.items():
                times.setdefault(key, []).append(seconds)
        torch.testing.assert_close(result.curves.float(), expected, rtol=1e-3, atol=1e-5)
    middle = {key: statistics.median(found) for key, found in times.items()}
    alone = min(seconds for key, seconds in middle.items() if key.startswith("forward"))
    return {
        "network": name, "images": shape[0], "steps": shape[-1], "one forward a step, s": middle["loop"],
        "deletion, s": middle["ours"], "forwards alone, s": alone, "times faster": middle["loop"] / middle["ours"],
        "times faster at most": middle["loop"] / alone, "repeats": repeats,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks; by default all")
    arguments = parser.parse_args()
    rows = []
    for name, (build, shape) in networks().items():
        if not arguments.names or name in arguments.names:
            rows.append(measure(name, build, shape, 3 if shape[0] < IMAGES else 7))
            print(rows[-1], flush=True)
    if not arguments.names:
        write("metrics", rows, baseline=0, score="softmax", step="one row of the image")
    print(show(rows))


if __name__ == "__main__":
    main()
