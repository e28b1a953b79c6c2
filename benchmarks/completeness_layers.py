"""Completeness of the signal on a residual network, layer by layer.

    python benchmarks/completeness_layers.py resnet20 --data FOLDER

S at the output of a layer replaces the layer's output, and the rest of the network runs on it. How
far is the output of the image's class from its output for the image itself (APC, equation 10)?
Beside it stand:

- shuffled output: the inverse gets the output of another image of the class, with the masks of the
  image itself;
- mean: the mean of the features at the layer, over the images fitted on;
- true features, at the input: the image rebuilt by one inverse of the first convolution from what
  the ReLU behind it *really* let through. By equation 9 nothing else reaches this layer from above,
  so that no signal can be expected to do better.

Forks are calibrated jointly, or summed up.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import show, write
from localization_grid import features, network_and_photos, network_parser
from torch import Tensor, nn

from captum_mipin import InverseNetwork
from captum_mipin.regression.geometry import Geometry
from captum_mipin.regression.ridge import solve
from captum_mipin.rules.linear import Convolution

#: (x, class) → what takes the place of the features.
Signal = Callable[[Tensor, int], Tensor]


def layers(model: nn.Module) -> list[str]:
    """Return the residual blocks of a CIFAR ResNet, the last first, and the first batch norm."""
    blocks = [
        f"layer{i}.{j}"
        for i in (3, 2, 1)
        for j in reversed(range(len(list(model.get_submodule(f"layer{i}").children()))))
    ]
    return [*blocks, "bn1"]


def outputs(model: nn.Module, layer: nn.Module | None, x: Tensor, s: Tensor) -> Tensor:
    """Return the logits where ``s`` replaces the output of a layer, or x."""
    if layer is None:
        with torch.no_grad():
            return model(s)  # type: ignore[no-any-return]
    handle = layer.register_forward_hook(lambda module, inputs, output: s)
    with torch.no_grad():
        result: Tensor = model(x)
    handle.remove()
    return result


def from_true_features(model: nn.Module, fit: Tensor) -> Signal:
    """Return the image rebuilt from relu(bn(conv x)), by the regression of a fit."""
    conv: Any = model.get_submodule("conv1")
    stem = nn.Sequential(conv, model.get_submodule("bn1"), nn.ReLU())
    geometry = Geometry(
        tuple(conv.weight.shape), conv.stride, conv.padding, conv.dilation, conv.groups
    )
    inverter = Convolution((geometry,), fit.shape)
    with torch.no_grad():
        inverse = inverter.inverse(solve(inverter.moments(fit, (stem(fit),)), 1e-3), fit)

    def signal(x: Tensor, label: int) -> Tensor:
        with torch.no_grad():
            return inverter.apply(inverse, (stem(x),), True)

    return signal


def signals(
    model: nn.Module, inverse: InverseNetwork, layer: nn.Module | None, fit: Tensor
) -> dict[str, Signal]:
    """Return S at a layer and its controls.

    S = A + B with A linear in the output, so that another output needs no other pass back.
    """
    mean = features(model, layer, fit).mean(0)

    def shuffled(x: Tensor, label: int) -> Tensor:
        found = inverse.explain((x,), label, biases=(False, True), layer=layer)
        (a,), (s,) = found.signals
        change = found.output.roll(1) / found.output - 1
        return s + a * change.view(-1, *(1,) * (a.ndim - 1))

    return {
        "S": lambda x, c: inverse.explain((x,), c, biases=(True,), layer=layer).signals[0][0],
        "shuffled output": shuffled,
        "mean": lambda x, c: mean.expand(len(x), *mean.shape),
    }


def measure(
    model: nn.Module, layer: nn.Module | None, x: Tensor, labels: Tensor, signal: Signal
) -> dict[str, float]:
    """Measure a replacement of the features, over each class's images, then over classes.

    Returns:
        APC in percent of all images and of those classified rightly; the median error; the median
        of its logit ÷ the image's; the share of the features' variance that it explains.
    """
    columns = []
    for label in labels.unique().tolist():
        of = x[labels == label]
        with torch.no_grad():
            logits = model(of)
        wanted, found = (
            features(model, layer, of),
            torch.cat([signal(part, label) for part in of.split(100)]),
        )
        parts = zip(of.split(100), found.split(100), strict=True)
        y, again = (
            logits[:, label],
            torch.cat([outputs(model, layer, *part) for part in parts])[:, label],
        )
        error = 100 * (again - y).abs() / y.abs()
        explained = 1 - (wanted - found).square().sum() / (wanted - wanted.mean(0)).square().sum()
        right = logits.argmax(1) == label
        columns.append(
            [error.mean(), error[right].mean(), error.median(), (again / y).median(), explained]
        )
    names = "APC %", "APC % (correct)", "median error %", "logit ratio", "explained variance"
    return dict(zip(names, torch.tensor(columns).mean(0).tolist(), strict=True))


def main() -> None:
    parser = network_parser(__doc__, fit=400, networks=("resnet20", "resnet56"))
    parser.add_argument("--test", type=int, default=200, help="images of each class to measure on")
    arguments = parser.parse_args()
    model, normalise, images = network_and_photos(arguments)
    fit, chosen = (
        normalise(images.fit),
        [(images.labels == c).nonzero()[: arguments.test, 0] for c in images.labels.unique()],
    )
    index = torch.cat(chosen)
    x, labels = normalise(images.test[index]), images.labels[index]
    rows: list[dict[str, Any]] = []

    def add(forks: str, layer: str | None, kind: str, signal: Signal) -> None:
        at = None if layer is None else model.get_submodule(layer)
        row = {
            "forks": forks,
            "layer": layer or "input",
            "signal": kind,
            **measure(model, at, x, labels, signal),
        }
        rows.append(row)
        print(show([row]).splitlines()[-1], flush=True)

    for forks in ("joint", "sum"):
        inverse = InverseNetwork(model, forks=forks).fit(
            fit, labels.unique().tolist(), batch_size=100, progress=False
        )
        for layer in (*layers(model), None):
            at = None if layer is None else model.get_submodule(layer)
            for kind, signal in signals(model, inverse, at, fit).items():
                if forks == "joint" or kind == "S":
                    add(forks, layer, kind, signal)
    add("", None, "true features", from_true_features(model, fit))
    write(
        f"completeness-layers-{arguments.network}", rows, data="CIFAR-10", fitted_on="train",
        fit=arguments.fit, evaluated_on="test", n=len(x), target="true class",
        reduction="mean over a class, then over classes", ties="none needed",
    )  # fmt: skip
    print(show(rows))


if __name__ == "__main__":
    main()
