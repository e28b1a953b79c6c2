"""Speed, as ratios within one run: attribution ÷ gradient, fit ÷ matrix multiplication and SGD.

    python benchmarks/speed.py [--data FOLDER] [attribute] [fit] [positions] [sgd] [guards]

- attribute: MIP-IN's ``attribute`` ÷ ``captum.attr.Saliency``, in turn, medians. Small trained
  networks at batch 64 (one class for the batch, and all ten mixed); VGG-11 and ResNet-18 at 224 x
  224 with torchvision's random weights (the time does not depend on them), fitted on two random
  images.
- fit: the whole fit of the MLP of table 3 (ten classes), of the CNNs of tables 4 and 5 and of
  VGG-19's features (one class). The floor is the time of Gram matrices and cross products at this
  machine's measured float32 matrix-multiply rate, as if patches were unfolded, and of one pass
  forward. Processor time, and that of each part.
- positions: convolutions fitted on a share of their positions, on the CNN of table 5.
- sgd: the exact solver against the paper's 20 epochs of SGD, and against more, on the CNN of table
  4, one class: time of the whole fit (both solve the dense layers exactly), the variance of each
  convolution's input left unexplained on the fitting images (SGD: averaged over its last epoch),
  and the error on test images.
- guards: milliseconds of each call that go into checks that the model is unchanged.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from captum.attr import Saliency
from common import parser_of, show, write
from data import load
from networks import RECIPES, trained
from torch import Tensor, nn

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution
from captum_mipin.graph.state import State
from captum_mipin.graph.validate import check_model
from captum_mipin.inverse import fit as fitting
from captum_mipin.inverse import surrogates
from captum_mipin.inverse.information import SharedInformation
from captum_mipin.inverse.passes import Passes
from captum_mipin.inverse.tables import Table
from captum_mipin.inverse.trace import Trace
from captum_mipin.rules.linear import Convolution, Dense
from captum_mipin.storage import watch


def seconds(
    calls: Sequence[Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Return the times of each call, in turn, after one call to warm up."""
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
    """Return this machine's float32 matrix-multiply rate, in flops a second of processor time."""
    a, b = torch.randn(2, size, size).unbind()
    (times,) = seconds([lambda: a @ b], 5, time.process_time)
    return 2 * size**3 / statistics.median(times)


def against_saliency(
    name: str, model: nn.Module, x: Tensor, inverse: InverseNetwork, target: Any, *, repeats: int
) -> dict[str, Any]:
    saliency, mipin = Saliency(model), MIPINAttribution(model, inverse)
    base, ours = seconds(
        [
            lambda: saliency.attribute(x, target=target, abs=False),
            lambda: mipin.attribute(x, target=target),
        ],
        repeats,
    )
    return {
        "what": "attribute ÷ Saliency",
        "network": name,
        "input": "x".join(map(str, x.shape)),
        "targets": "mixed" if isinstance(target, Tensor) else "one",
        "ratio": statistics.median(ours) / statistics.median(base),
        "MIP-IN ms": 1e3 * statistics.median(ours),
        "Saliency ms": 1e3 * statistics.median(base),
        "repeats": repeats,
    }


def attribute(folder: str | None) -> list[dict[str, Any]]:
    import torchvision

    rows = []
    for name in ("mlp-mnist", "cnn-mnist", "cnn-cifar10"):
        images = load(RECIPES[name].data, folder)
        model = trained(name, images)
        inverse = InverseNetwork(model).fit(images.train[:200], batch_size=200)
        x = images.test[:64]
        for target in (3, torch.arange(64) % 10):
            rows.append(against_saliency(name, model, x, inverse, target, repeats=51))
            print(rows[-1])
    torch.manual_seed(0)
    for name in ("vgg11", "resnet18"):
        model = torchvision.models.get_model(name, weights=None).eval()
        inverse = InverseNetwork(model).fit(torch.randn(2, 3, 224, 224), targets=0, batch_size=2)
        for batch in (2, 8):
            rows.append(
                against_saliency(
                    name, model, torch.randn(batch, 3, 224, 224), inverse, 0, repeats=15
                )
            )
            print(rows[-1])
    return rows


@contextmanager
def parts(row: dict[str, Any]) -> Iterator[None]:
    """Add the processor seconds of the parts of all fits inside to a row; no parts overlap."""
    originals = []

    def timed(owner: Any, name: str, part: str) -> None:
        original = owner.__dict__[name]
        originals.append((owner, name, original))

        def call(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return original(*arguments, **named)
            finally:
                row[part] = row.get(part, 0.0) + time.process_time() - start

        setattr(owner, name, call)

    for owner, name, part in (
        (surrogates, "capture_apart", "capture s"),
        (Passes, "_trace", "forward s"),
        (Passes, "_below", "forward s"),
        (Trace, "signals", "signals down s"),
        (Dense, "moments", "moments s"),
        (Convolution, "moments", "moments s"),
        (fitting, "solve", "solve s"),
        (Table, "add", "moments s"),
        (Table, "solve", "solve s"),
        (SharedInformation, "add", "information s"),
        (watch, "fingerprint", "fingerprint s"),
    ):
        timed(owner, name, part)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def against_floor(
    name: str, model: nn.Module, x: Tensor, targets: Any, batch: int, **options: Any
) -> dict[str, Any]:
    """Measure a whole fit against its matrix products and a pass forward at measured rates."""
    small = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)).eval()
    InverseNetwork(small).fit(torch.randn(9, 1, 4, 4), progress=False)  # to warm up
    row: dict[str, Any] = {"what": "fit, floor ÷ time", "network": name, "images": len(x)}
    start = time.process_time()
    with parts(row):
        inverse = InverseNetwork(model, **options).fit(x, targets, batch_size=batch, progress=False)
    taken = time.process_time() - start
    start = time.process_time()
    with torch.no_grad():
        for part in x.split(batch):
            model(part)
    forward = time.process_time() - start
    flops = 0
    for layer in inverse.report.layers:
        sized = min(layer.rows, layer.signals)  # by rows or by columns, whichever is less
        flops += 2 * layer.rows * layer.signals * sized + 2 * layer.rows * layer.features * sized
    rate = gemm_rate()
    floor = flops / rate + forward
    row |= {
        "targets": len(inverse.targets),
        "ratio": floor / taken,
        "fit s": taken,
        "floor s": floor,
        "Gflops": flops / 1e9,
        "GEMM Gflops/s": rate / 1e9,
        "plain forward s": forward,
    }
    return row


def fit(folder: str | None) -> list[dict[str, Any]]:
    import torchvision

    rows = []
    for name, count, targets in (
        ("mlp-mnist", 20_000, None),
        ("cnn-mnist", 300, 3),
        ("cnn-cifar10", 500, 3),
    ):
        images = load(RECIPES[name].data, folder)
        rows.append(
            against_floor(
                name,
                trained(name, images),
                images.train[:count],
                targets,
                100 if count < 1000 else 1000,
            )
        )
        print(rows[-1], flush=True)
    torch.manual_seed(0)
    features = torchvision.models.vgg19(weights=None).features
    model = nn.Sequential(
        features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    ).eval()
    rows += [
        against_floor("features of VGG-19", model, torch.randn(n, 3, 160, 160), 0, n)
        for n in (4, 32)
    ]
    return rows


def positions(folder: str | None) -> list[dict[str, Any]]:
    """Measure convolutions fitted on a share of their positions.

    Measures the time, and the distance of the signal from that of all positions.
    """
    images = load("cifar10", folder)
    model, x = trained("cnn-cifar10", images), images.train[:500]
    rows: list[dict[str, Any]] = []
    signals: list[Tensor] = []
    for share in (None, 0.5, 0.2, 0.1, 0.05, 0.02):
        row: dict[str, Any] = {"network": "cnn-cifar10", "positions": share or "all"}
        with parts(row):
            inverse = InverseNetwork(model, positions=share).fit(
                x, 3, batch_size=100, progress=False
            )
        signals.append(inverse.source_signal(images.test[:500], 3))
        row["difference of S"] = float((signals[-1] - signals[0]).norm() / signals[0].norm())
        row["test error"] = _unexplained(images.test[:500], signals[-1])
        rows.append(
            {
                key: row[key]
                for key in ("network", "positions", "moments s", "difference of S", "test error")
            }
        )
    return rows


def guards(folder: str | None) -> list[dict[str, Any]]:
    """Measure what each call takes to see that a model is unchanged, in processor time."""
    import torchvision

    rows = []
    for name in ("resnet18", "resnet50"):
        model = torchvision.models.get_model(name, weights=None).eval()
        weights = watch.Watch(model)
        calls: list[Callable[[], object]] = [
            partial(check_model, model),
            State(model).holds,
            partial(weights.changed, model),
        ]
        taken = sum(statistics.median(t) for t in seconds(calls, 201, time.process_time))
        count = len(list(model.modules()))
        rows.append({"network": name, "modules": count, "guards ms": 1e3 * taken})
    return rows


def sgd(folder: str | None, count: int = 500) -> list[dict[str, Any]]:
    images = load("mnist", folder)
    model = trained("cnn-mnist", images)
    assert model.features is not None
    first, x = model.features[:2], images.test[:1000]
    with torch.no_grad():
        features = first(x)
    rows: list[dict[str, Any]] = []
    runs: tuple[tuple[Literal["exact", "sgd"], int], ...] = (
        ("exact", 1),
        ("sgd", 20),
        ("sgd", 100),
        ("sgd", 300),
    )
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
                "what": f"solver {solver}",
                "network": "cnn-mnist",
                "images": count,
                "epochs": epochs,
                "fit s": taken,
                "ratio": taken / rows[0]["fit s"] if rows else 1.0,
                "unexplained, conv 2": 1 - fitted["features.2/conv2d"],
                "unexplained, conv 1": 1 - fitted["features.0/conv2d"],
                "test error at conv 2's input": _unexplained(features, below),
                "test error at the image": _unexplained(x, inverse.source_signal(x, target=3)),
            }
        )
        print(rows[-1])
    return rows


def _unexplained(x: Tensor, s: Tensor) -> float:
    """Return ‖X − S‖² over the variance of X about its mean over images."""
    return float((x - s).square().sum() / (x - x.mean(0)).square().sum())


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "parts", nargs="*", default=[], help="attribute, fit, positions, sgd, guards; default: all"
    )
    parser.add_argument(
        "--data",
        help="folder with mnist.npz and the CIFAR-10 sheets; default: download with torchvision",
    )
    arguments = parser.parse_args()
    for name, part in (
        ("attribute", attribute),
        ("fit", fit),
        ("positions", positions),
        ("sgd", sgd),
        ("guards", guards),
    ):
        if not arguments.parts or name in arguments.parts:
            rows = part(arguments.data)
            write(f"speed-{name}", rows)
            print(show(rows))


if __name__ == "__main__":
    main()
