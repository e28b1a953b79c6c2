"""The paper's tables and figures on real data.

    python benchmarks/paper.py --data FOLDER [PART ...]

Each part writes its own results file, ``paper-<part>.json``, and its pictures beside it.

- boxes-NETWORK: table 2, bounding-box accuracy, for squeezenet1_0, mobilenet_v2, efficientnet_lite0
  and "head", a dense head as in VGG; see ``benchmarks/boxes.py``.
- maps: figure 3, global and local signals and attributions, and figure 5, all methods on the MLP of
  table 3, where neither local connections nor max pooling help a method (section 6.2.1). Measured:
  the share of the n hottest pixels that lies on the ink, n being the number of pixels with ink
  (above 0.5); insertion and deletion.
- classes: figure 9 on SqueezeNet with the paper's classes 981 and 589, and appendix B on the CNN of
  table 4: distances between the maps of two classes, raw as in the paper and normalised.
- randomization: similarity of maps while layers are made random from the output down, on the CNN of
  table 4. Fitted methods are measured with the fit kept and with a new fit.
- pictures: figure 10, Grad-CAM beside MIP-IN as chosen in boxes-efficientnet_lite0, on photographs
  that may be shown.

``benchmarks/completeness.py`` makes table 1.
"""

import csv
import io
import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import boxes
import torch
from captum.attr import visualization
from common import RESULTS, parser_of, show, write
from data import Images, load
from demo import _hwc, _picture, _signed
from localization_grid import _image, photos
from matplotlib.figure import Figure
from networks import trained
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, MIPINError
from captum_mipin.methods import PatternAttribution, Patterns
from captum_mipin.metrics import (
    bounding_box_accuracy,
    class_sensitivity,
    deletion,
    insertion,
    randomization,
)
from captum_mipin.metrics.maps import heat

Method = Callable[[Tensor, Any], Any]


def small(
    model: nn.Module, images: Images, fit: int, classes: list[int] | None = None
) -> dict[str, Any]:
    """Return all methods on a network for digits; those that learn are fitted on ``fit`` images."""
    x = images.train[:fit]
    mipin = MIPINAttribution(
        model, InverseNetwork(model).fit(x, classes, batch_size=500, progress=False)
    )
    return {
        **boxes.gradients(model, 50, True),
        **boxes.propagated(model, x, (0.0, 1.0)),
        "MIP-IN A": mipin.attribute,
        "MIP-IN S": mipin.source_signal,
    }


def maps(folder: Path, fit: int = 10_000, count: int = 300) -> None:
    """Make figures 3 and 5, and measure what they show."""
    images = load("mnist", folder)
    model = trained("mlp-mnist", images)
    methods: dict[str, Any] = small(model, images, fit)
    mipin = methods["MIP-IN A"].__self__
    with torch.no_grad():
        right = (model(images.test).argmax(1) == images.test_labels).nonzero().flatten()[:count]
    x, labels = images.test[right], images.test_labels[right].tolist()
    generator = torch.Generator().manual_seed(0)
    controls: dict[str, Any] = {
        "random": lambda x, t: torch.rand(len(x), 1, 28, 28, generator=generator),
        "the image": lambda x, t: x,
        "MIP-IN A, pattern only": partial(mipin.attribute, local=False),
    }
    rows = []
    for name, method in tqdm({**methods, **controls}.items(), desc="maps"):
        found = method(x, torch.tensor(labels)).detach()
        for reduction in ("sum", "sum_of_abs"):
            ink = bounding_box_accuracy(
                found, x, boxes=x[:, 0] > 0.5, largest=0.5, reduction=reduction
            )
            asked: dict[str, Any] = {"model": model, "baseline": 0.0, "reduction": reduction}
            row = {
                "method": name,
                "reduction": reduction,
                "ink": ink.mean,
                "standard error": ink.standard_error,
            }
            rows.append(
                row | {m.__name__: m(found, x, labels, **asked).mean for m in (insertion, deletion)}
            )
    write(
        "paper-maps", rows, network="mlp-mnist", data="MNIST test, correctly classified", n=len(x),
        fit=fit, layer="input", target="the label",
        ties="expected; at random for insertion and deletion", ink="pixels above 0.5",
        step="a row of the image", baseline=0,
    )  # fmt: skip
    figure3(x, labels, mipin).savefig(RESULTS / "paper-figure3.png", dpi=80)
    figure5(x, labels, methods).savefig(RESULTS / "paper-figure5.png", dpi=80)
    print(show(rows))


def figure3(x: Tensor, labels: list[int], mipin: MIPINAttribution) -> Figure:
    """Draw global and local signals and attributions of three images of each of two classes."""
    chosen = [
        i for label in (0, 3) for i in [i for i, own in enumerate(labels) if own == label][:3]
    ]
    page = Figure(figsize=(7, 1.4 * len(chosen)), layout="constrained")
    axes = page.subplots(len(chosen), 5)
    for row, i in zip(axes, chosen, strict=True):
        image, label = x[i : i + 1], labels[i]
        _picture(row[0], image, str(label))
        for column, local in ((1, False), (3, True)):
            _picture(row[column], mipin.source_signal(image, label, local=local).clamp(0, 1))
            _signed(page, row[column + 1], mipin.attribute(image, label, local=local))
    for axis, title in zip(
        axes[0], ("image", "global S", "global A", "local S", "local A"), strict=True
    ):
        axis.set_title(title, fontsize=9)
    return page


def figure5(x: Tensor, labels: list[int], methods: dict[str, Any]) -> Figure:
    """Draw every method on the first image of six classes."""
    chosen = [labels.index(label) for label in range(6)]
    page = Figure(figsize=(1.2 * (len(methods) + 1), 1.25 * len(chosen)), layout="constrained")
    axes = page.subplots(len(chosen), len(methods) + 1)
    for row, i in zip(axes, chosen, strict=True):
        _picture(row[0], x[i : i + 1], str(labels[i]))
        for axis, (name, method) in zip(row[1:], methods.items(), strict=True):
            found = method(x[i : i + 1], torch.tensor(labels[i : i + 1])).detach()
            _signed(page, axis, found)
            if i == chosen[0]:
                axis.set_title(name.replace(", as in", ",\nas in"), fontsize=6)
    return page


def classes(folder: Path, fit: int = 60, count: int = 8, digits: int = 60) -> None:
    """Make figure 9 and appendix B."""
    net = boxes.chain("squeezenet1_0", folder)
    found = photos("squeezenet1_0", folder, fit, torch.Generator().manual_seed(0))
    x = net.normalise(
        found.test[
            torch.randperm(len(found.test), generator=torch.Generator().manual_seed(0))[:count]
        ]
    )
    train, (lowest, _, top) = net.normalise(found.fit), net.cuts
    low, high = (net.normalise(torch.full((1, 3, 1, 1), value)) for value in (0.0, 1.0))
    inverse = InverseNetwork(net.steps, layer=net.steps[lowest - 1]).fit(
        train, [981, 589], batch_size=25, progress=False
    )
    methods: dict[str, Any] = {
        **boxes.gradients(net.steps, 10, True),
        **boxes.propagated(net.steps, train, (low, high)),
    }
    for cut, where in ((lowest, "27 x 27"), (top, "13 x 13")):
        methods[f"MIP-IN A, at {where}"] = LayerMIPINAttribution(
            net.steps, inverse, net.steps[cut - 1]
        ).attribute
    methods["Grad-CAM, at 13 x 13"] = lambda x, t: _at(net, top, x, t)
    rows = _sensitivities("SqueezeNet 1.0, 981 and 589", net.steps, methods, x, (981, 589))
    images = load("mnist", folder)
    model = trained("cnn-mnist", images)
    labels = images.test_labels[:digits].tolist()
    own = small(model, images, 300)
    rows += _sensitivities(
        "CNN, MNIST, own and another", model, own, images.test[:digits], (labels, None)
    )
    write(
        "paper-classes", rows,
        data="ILSVRC2012 validation photographs of twenty classes; MNIST test", fit=fit,
        reduction="none; SSIM: sum over channels", ties="none needed",
        layer="input, or as the row says",
        **{"fit, MNIST": 300, "SmoothGrad": "10 samples on photographs, 50 on MNIST"},
    )  # fmt: skip
    print(show(rows))


def _at(net: boxes.Chain, cut: int, x: Tensor, t: Any) -> Tensor:
    """Return Grad-CAM at a cut."""
    with torch.no_grad():
        features = net.steps[:cut](x)
    found: Tensor = boxes.cams(net.above(cut))["Grad-CAM"](features, t).sum(1, keepdim=True).relu()
    return found


def _sensitivities(
    network: str, model: nn.Module, methods: dict[str, Any], x: Tensor, pair: tuple[Any, Any]
) -> list[dict[str, Any]]:
    rows = []
    for name, method in tqdm(methods.items(), desc=network):
        try:
            found = class_sensitivity(method, x, *pair, model=model, batch_size=10)
        except MIPINError as error:
            print(f"{name}: {error}")
            continue
        row: dict[str, Any] = {
            "network": network,
            "method": name,
            "n": found.n,
            "raw L2": found.mean,
        }
        rows.append(row | _known({key: part.mean for key, part in found.parts.items()}))
    return rows


def random_weights(folder: Path, fit: int = 300, count: int = 12) -> None:
    """Make layers random from the output down."""
    images = load("mnist", folder)
    model, known, pair = trained("cnn-mnist", images), images.train[:fit], [3, 8]
    of_pair = torch.isin(images.test_labels, torch.tensor(pair)).nonzero().flatten()[:count]
    x, labels = images.test[of_pair], images.test_labels[of_pair].tolist()

    def mipin(network: nn.Module, **options: Any) -> MIPINAttribution:
        inverse = InverseNetwork(network, **options).fit(
            known, pair, batch_size=500, progress=False
        )
        return MIPINAttribution(network, inverse)

    def pattern(network: nn.Module) -> PatternAttribution:
        return PatternAttribution(network, Patterns(network).fit(known, progress=False))

    def others(network: nn.Module) -> dict[str, Any]:
        return {**boxes.gradients(network, 10, True), **boxes.propagated(network, None, (0.0, 1.0))}

    asked: list[tuple[str, Any, Any]] = [
        (name, None, partial(_named, others, name)) for name in others(model)
    ]
    asked += [
        ("PatternAttribution, made anew", None, pattern),
        ("MIP-IN A, fit kept", mipin(model, changed="ignore"), None),
        ("MIP-IN A, made anew", None, mipin),
    ]
    rows = []
    for name, method, refit in tqdm(asked, desc="randomization"):
        own = method if refit is None else refit(model)
        found = randomization(own, x, labels, model=model, refit=refit)
        assert found.curves is not None  # for mypy: there is one of each layer
        parts = {"Spearman": found.mean, **{key: part.mean for key, part in found.parts.items()}}
        layers = dict(zip(found.settings["layers"], found.curves.nanmean(0).tolist(), strict=True))
        rows.append({"method": name, "n": found.n, **_known(parts), "layers": _known(layers)})
    write(
        "paper-randomization", rows, network="cnn-mnist", data="MNIST test, digits 3 and 8",
        fit=fit, target="the label", layer="input", order="cascading",
        init="normal, of each parameter's own mean and deviation", ties="none needed",
        reduction="none; SSIM: sum over channels",
    )  # fmt: skip
    print(show(rows))


def _known(values: dict[str, float]) -> dict[str, float | None]:
    """Replace NaN, which JSON does not have, by None."""
    return {key: None if value != value else value for key, value in values.items()}


def _named(methods: Callable[[nn.Module], dict[str, Any]], name: str, network: nn.Module) -> Any:
    return methods(network)[name]


def pictures(folder: Path, fit: int = 60) -> None:
    """Draw figure 10, on photographs under CC BY 2.0 of classes that the inverse was fitted on."""
    name, part = "efficientnet_lite0", "boxes-efficientnet_lite0"
    net, (lowest, *_, top) = boxes.chain(name, folder), boxes.chain(name, folder).cuts
    chosen = [
        row
        for row in json.loads((RESULTS / f"paper-{part}.json").read_text())["rows"]
        if row["chosen"]
    ]
    (chosen,) = [row for row in chosen if row["method"] == "MIP-IN"]
    reading, pooling = chosen["reading"].split(", ")
    with zipfile.ZipFile(folder / "ilsvrc2012_val_600_boxes.zip") as archive:
        rows = csv.DictReader(io.TextIOWrapper(archive.open("annotations.csv"), "utf-8"))
        known = {int(row["class_index"]) for row in rows}
    with zipfile.ZipFile(folder / "nips17_imagenet_compatible_600.zip") as archive:
        found = list(
            csv.DictReader(io.TextIOWrapper(archive.open("labels_and_attribution.csv"), "utf-8"))
        )
        found = [row for row in found if int(row["class_index"]) in known]
        shown = torch.stack([_image(archive, row["file"], 224) for row in found])
    labels = torch.tensor([int(row["class_index"]) for row in found])
    train = boxes.features(
        net, net.normalise(photos(name, folder, fit, torch.Generator().manual_seed(0)).fit)
    )[lowest]
    x, above = boxes.features(net, net.normalise(shown)), net.above(lowest)
    inverse = InverseNetwork(above, pooling=pooling).fit(
        train, sorted(set(labels.tolist())), batch_size=25, progress=False
    )
    names = boxes.places(x)
    at = {names[cut]: cut for cut in net.cuts}
    columns = {"Grad-CAM": boxes.cams(net.above(top))["Grad-CAM"](x[top], labels).sum(1).relu()}
    asked: list[tuple[str, str, str, Any]] = [
        ("MIP-IN, as the paper has it", names[top], "A", "relu_of_sum"),
        ("MIP-IN, as chosen", chosen["where"], reading, chosen["reduction"]),
    ]
    for title, where, read, reduction in asked:
        read_at = []
        for cut in at.values() if where == "all layers" else [at[where]]:
            maps = boxes.explained(
                inverse, None if cut == lowest else above[cut - lowest - 1], x[lowest], labels
            )
            maps["A × gradient"] = maps["A"] * boxes.gradient(net.above(cut), x[cut], labels)
            read_at.append(maps[read])
        together = sum(boxes.shares(one, 28) for one in read_at) if len(read_at) > 1 else read_at[0]
        columns[title] = heat(torch.as_tensor(together), x[lowest], reduction)
    page = figure10(shown, [row["class_name"] for row in found], columns)
    page.savefig(RESULTS / "paper-figure10.jpg", dpi=80)
    credits = [
        {"class": row["class_name"], "author": row["author"], "page": row["landing_url"]}
        for row in found
    ]
    write(
        "paper-pictures", credits, network=name, licence="CC BY 2.0", fit=fit,
        chosen=chosen["where"], reading=reading,
    )  # fmt: skip


def figure10(shown: Tensor, names: list[str], columns: dict[str, Tensor]) -> Figure:
    """Draw photographs, and heat maps over them, one column a method."""
    page = Figure(figsize=(6, 1.5 * len(names)), layout="constrained")
    axes = page.subplots(len(names), len(columns) + 1)
    for i, row in enumerate(axes):
        _picture(row[0], shown[i : i + 1], names[i])
        for axis, (title, warm) in zip(row[1:], columns.items(), strict=True):
            large = nn.functional.interpolate(
                warm[i : i + 1, None].float(), (224, 224), mode="bilinear", align_corners=False
            )
            visualization.visualize_image_attr(
                _hwc(large.relu() + 1e-12),
                _hwc(shown[i : i + 1]),
                method="blended_heat_map",
                sign="positive",
                plt_fig_axis=(page, axis),
                use_pyplot=False,
                cmap="jet",
                alpha_overlay=0.5,
            )
            if i == 0:
                axis.set_title(title, fontsize=8)
    return page


PARTS: dict[str, Callable[[Path], None]] = {
    **{
        f"boxes-{name}": partial(boxes.run, name, count=60, classes=2)
        for name in ("efficientnet_lite0", "squeezenet1_0", "head", "mobilenet_v2")
    },
    "maps": maps,
    "classes": classes,
    "randomization": random_weights,
    "pictures": pictures,
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the images, and weights/ in it"
    )
    arguments = parser.parse_args()
    for part in arguments.parts:
        PARTS[part](arguments.data)


if __name__ == "__main__":
    main()
