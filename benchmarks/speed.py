"""Speed, as ratios within one run: attributing against a gradient, fitting against matrix multiplication and SGD.

    python benchmarks/speed.py [--data FOLDER] [attribute] [fit] [sgd]

- attribute: MIP-IN's ``attribute`` ÷ ``captum.attr.Saliency``, alternating, medians; small trained networks at batch 64
  (one class for the batch, and all ten mixed), VGG-11 and ResNet-18 at 224 x 224 with torchvision's random weights (the
  time does not depend on them), fitted on two random images;
- fit: the MLP of table 3, ten classes, 50,000 images, against the time that its Gram matrices and cross products alone
  take at this machine's measured float32 matrix-multiply rate;
- sgd: the exact solver against the paper's 20 epochs of SGD, and against more, on the CNN of table 4, one class: time of
  the whole fit (the dense layers are solved exactly by both), variance of each convolution's input left unexplained on
  the fitting images (SGD: averaged over its last epoch), and error on test images.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from captum.attr import Saliency
from common import show, write
from data import load
from networks import RECIPES, trained
from torch import Tensor, nn

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution


def seconds(
    calls: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Times of each call, in turn, after one call to warm up."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            start = clock()
            call()
            taken.append(clock() - start)
    return times


def gemm_rate(size: int = 3000) -> float:
    """Float32 matrix-multiply rate of this machine, in flops a second."""
    a, b = torch.randn(2, size, size).unbind()
    (times,) = seconds([lambda: a @ b], 5)
    return 2 * size**3 / statistics.median(times)


def against_saliency(
    name: str, model: nn.Module, x: Tensor, inverse: InverseNetwork, target: Any, repeats: int
) -> dict[str, Any]:
    saliency, mipin = Saliency(model), MIPINAttribution(model, inverse)
    base, ours = seconds(
        [lambda: saliency.attribute(x, target=target, abs=False), lambda: mipin.attribute(x, target=target)], repeats
    )
    return {
        "what": "attribute ÷ Saliency", "network": name, "input": "x".join(map(str, x.shape)),
        "targets": "mixed" if isinstance(target, Tensor) else "one", "ratio": statistics.median(ours) / statistics.median(base),
        "MIP-IN ms": 1e3 * statistics.median(ours), "Saliency ms": 1e3 * statistics.median(base), "repeats": repeats,
    }  # fmt: skip


def attribute(folder: str | None) -> list[dict[str, Any]]:
    import torchvision

    rows = []
    for name in ("mlp-mnist", "cnn-mnist", "cnn-cifar10"):
        images = load(RECIPES[name].data, folder)
        model = trained(name, images)
        inverse = InverseNetwork(model).fit(images.train[:200], batch_size=200)
        x = images.test[:64]
        for target in (3, torch.arange(64) % 10):
            rows.append(against_saliency(name, model, x, inverse, target, 51))
            print(rows[-1])
    torch.manual_seed(0)
    for name in ("vgg11", "resnet18"):
        model = torchvision.models.get_model(name, weights=None).eval()
        inverse = InverseNetwork(model).fit(torch.randn(2, 3, 224, 224), targets=0, batch_size=2)
        for batch in (2, 8):
            rows.append(against_saliency(name, model, torch.randn(batch, 3, 224, 224), inverse, 0, 15))
            print(rows[-1])
    return rows


def fit(folder: str | None) -> list[dict[str, Any]]:
    images = load("mnist", folder)
    model = trained("mlp-mnist", images)
    count, classes = 50_000, 10
    start = time.perf_counter()
    inverse = InverseNetwork(model).fit(images.train[:count], batch_size=1000)
    taken = time.perf_counter() - start
    flops = sum(2 * layer.rows * layer.signals * (layer.signals + layer.features) for layer in inverse.report.layers)
    rate = gemm_rate()
    floor = flops / rate
    return [
        {
            "what": "fit, floor ÷ time", "network": "mlp-mnist", "images": count, "targets": classes, "ratio": floor / taken,
            "fit s": taken, "floor s": floor, "Gflops": flops / 1e9, "GEMM Gflops/s": rate / 1e9,
        }
    ]  # fmt: skip


def sgd(folder: str | None, count: int = 500) -> list[dict[str, Any]]:
    images = load("mnist", folder)
    model = trained("cnn-mnist", images)
    assert model.features is not None
    first, x = model.features[:2], images.test[:1000]
    with torch.no_grad():
        features = first(x)
    rows: list[dict[str, Any]] = []
    runs: tuple[tuple[Literal["exact", "sgd"], int], ...] = (("exact", 1), ("sgd", 20), ("sgd", 100), ("sgd", 300))
    InverseNetwork(model).fit(images.train[:50], targets=3, progress=False)  # to warm up
    for solver, epochs in runs:
        inverse = InverseNetwork(model, solver=solver, epochs=epochs)
        start = time.perf_counter()
        inverse.fit(images.train[:count], targets=3, batch_size=100)
        taken = time.perf_counter() - start
        below = LayerMIPINAttribution(model, inverse, first[-1]).source_signal(x, target=3)
        fitted = {layer.layer: layer.explained_variance for layer in inverse.report.layers}
        rows.append(
            {
                "what": f"solver {solver}", "network": "cnn-mnist", "images": count, "epochs": epochs, "fit s": taken,
                "ratio": taken / rows[0]["fit s"] if rows else 1.0,
                "unexplained, conv 2": 1 - fitted["features.2/conv2d"], "unexplained, conv 1": 1 - fitted["features.0/conv2d"],
                "test error at conv 2's input": _unexplained(features, below),
                "test error at the image": _unexplained(x, inverse.source_signal(x, target=3)),
            }
        )  # fmt: skip
        print(rows[-1])
    return rows


def _unexplained(x: Tensor, s: Tensor) -> float:
    """‖X − S‖² over the variance of X about its mean over images."""
    return float((x - s).square().sum() / (x - x.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help="attribute, fit, sgd; default: all")
    parser.add_argument("--data", help="folder with mnist.npz and the CIFAR-10 sheets; default: download with torchvision")
    arguments = parser.parse_args()
    for name, part in (("attribute", attribute), ("fit", fit), ("sgd", sgd)):
        if not arguments.parts or name in arguments.parts:
            rows = part(arguments.data)
            write(f"speed-{name}", rows)
            print(show(rows))


if __name__ == "__main__":
    main()
