"""What deletion costs against one forward a step and image, as a ratio within one run: python benchmarks/metrics.py.

16 images, maps at random, RISE's steps of one image row; the time does not depend on the weights, which are torch's random
ones. "one forward a step" does what the RISE protocol says, image by image: it replaces the next pixels, in place, runs the
network, takes the softmax. Both give the same curves, which is checked. At 224 x 224 it is timed on fewer images, and its time
multiplied.
"""

import argparse
import statistics
import time
from collections.abc import Callable
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


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]]:
    """Name → how to build it, the shape of an image, and on how many images the loop is timed."""
    import torchvision

    return {
        "cnn-digits": (RECIPES["cnn-digits"].build, (1, 8, 8), IMAGES),
        "mlp-mnist": (RECIPES["mlp-mnist"].build, (1, 28, 28), IMAGES),
        "cnn-mnist": (RECIPES["cnn-mnist"].build, (1, 28, 28), IMAGES),
        "cnn-cifar10": (RECIPES["cnn-cifar10"].build, (3, 32, 32), IMAGES),
        "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(weights=None), (3, 224, 224), 1),
    }


def measure(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], few: int, repeats: int) -> dict[str, Any]:
    """Medians of alternating runs."""
    torch.manual_seed(0)
    model, x, maps = build().eval(), torch.rand(IMAGES, *shape), torch.rand(IMAGES, *shape[1:])
    loop, ours = [], []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        expected = one_by_one(model, maps[:few], x[:few], 3, shape[-1])
        middle = time.perf_counter()
        result = deletion(maps, x, 3, model=model)
        if repeat:  # the first warms up
            loop.append((middle - start) * IMAGES / few)
            ours.append(time.perf_counter() - middle)
    assert result.curves is not None
    torch.testing.assert_close(result.curves[:few].float(), expected, rtol=1e-3, atol=1e-5)
    ratio = statistics.median(loop) / statistics.median(ours)
    return {
        "network": name, "images": IMAGES, "steps": result.curves.shape[1] - 1,
        "one forward a step, s": statistics.median(loop),
        "deletion, s": statistics.median(ours), "times faster": ratio, "loop timed on": few, "repeats": repeats,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks; by default all")
    arguments = parser.parse_args()
    rows = []
    for name, (build, shape, few) in networks().items():
        if not arguments.names or name in arguments.names:
            rows.append(measure(name, build, shape, few, 5 if few == IMAGES else 1))
            print(rows[-1], flush=True)
    if not arguments.names:
        write("metrics", rows, baseline=0, score="softmax", step="one row of the image")
    print(show(rows))


if __name__ == "__main__":
    main()
