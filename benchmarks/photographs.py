"""Whether the map that is proposed for photographs finds one of several of them.

    python benchmarks/photographs.py NETWORK choose --data FOLDER
    python benchmarks/photographs.py NETWORK report --data FOLDER
    python benchmarks/photographs.py NETWORK fits --data FOLDER
    python benchmarks/photographs.py head boxes --data FOLDER --fit 200

The grid pointing game on mosaics of 2 x 2 and 3 x 3 photographs: the share of the map in the cell
of the class asked for. MIP-IN, Grad-CAM, LayerCAM and LRP-γ are asked at several layers. The
photographs are split into two halves, and the mosaics of a half are made of its photographs alone.
The layer and the reduction over channels of each method are chosen on the first half, for each size
of mosaic; figures are reported on the second half. One photograph may be in several mosaics:
standard errors count the mosaics of one photograph to find as one.

``fits`` measures how many photographs a fit needs: the box accuracy of ``benchmarks/boxes.py``, of
the map of `for_photographs` on photographs of the second half, for fits on a few to 200 photographs
of ImageNet's training set, three random sets of each number.

``boxes`` measures that box accuracy on a network whose head is dense, see ``benchmarks/heads.py``,
at several layers: settings are chosen on the first half, and figures are of the second.
"""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boxes
import torch
from common import RESULTS, read, show, write
from localization_grid import network_parser, photos
from torch import Tensor, nn

from captum_mipin import LRP, InverseNetwork, LayerMIPINAttribution, for_photographs
from captum_mipin.methods import Gamma, LayerPropagation
from captum_mipin.metrics import (
    Mosaics,
    bounding_box_accuracy,
    grid_pointing_game,
    mosaics,
)
from captum_mipin.metrics.maps import heat
from captum_mipin.photographs import photograph_layer

#: Network -> names of layers, and their numbers in the chain of steps. The second is the one that
#: `for_photographs` picks.
LAYERS = {
    "squeezenet1_0": {"features.6": 6, "features.11": 11, "features.10": 10, "features.12": 12},
    "mobilenet_v2": {"features.6": 6, "features.13": 13, "features.17": 17, "features.18": 18},
    "efficientnet_lite0": {"_blocks.4": 7, "_blocks.10": 13, "_blocks.15": 18, "head": 21},
    "head": {"12": 12, "13": 13, "11": 11, "10": 10},
}
REDUCTIONS: tuple[Any, ...] = ("relu_of_sum", "sum_of_relu", "sum_of_abs")
#: Reductions that define a method; all others take the best one.
FIXED: dict[str, tuple[Any, ...]] = {"Grad-CAM": ("relu_of_sum",), "LayerCAM": ("sum_of_relu",)}
METHODS = "MIP-IN, A", "MIP-IN, A × gradient", "Grad-CAM", "LayerCAM", "LRP-γ"
#: What is also asked of a dense head.
FEATURE = "MIP-IN, A × feature"
CONFIDENCE = 0.9
#: Numbers of photographs to fit on, and of random sets of each number.
FITS, SETS = (5, 10, 20, 50, 100, 200), 3
#: Layer, method, reduction.
Setting = tuple[str, str, str]


@dataclass(frozen=True)
class Maps:
    """All maps of a network, at the layers with these names."""

    chain: boxes.Chain
    layers: dict[str, int]
    inverse: InverseNetwork

    def slopes(self, x: Tensor, t: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return name -> (features, gradient of the logits ``t`` by the features)."""
        names = {number: name for name, number in self.layers.items()}
        kept, x = {}, x.clone().requires_grad_()
        for number, step in enumerate(self.chain.steps):
            x = step(x)
            if number in names:
                kept[names[number]] = x
        score = x.gather(1, t[:, None]).sum()
        gradients = torch.autograd.grad(score, list(kept.values()))
        return {
            name: (features.detach(), slope)
            for (name, features), slope in zip(kept.items(), gradients, strict=True)
        }

    def __call__(
        self, x: Tensor, t: Tensor, wanted: Collection[Setting]
    ) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (layer, method, maps with channels) of a batch, those that ``wanted`` needs."""
        model, lrp = self.chain.steps, LRP(self.chain.steps, rule=Gamma(0.25))
        for name, (f, g) in self.slopes(x, t).items():
            layer, asked = model[self.layers[name]], {m for n, m, _ in wanted if n == name}
            if asked & {*METHODS[:2], FEATURE}:
                a = LayerMIPINAttribution(model, self.inverse, layer).attribute(x, t)
                yield name, "MIP-IN, A", a
                yield name, "MIP-IN, A × gradient", a * g
                yield name, FEATURE, a * f
            yield name, "Grad-CAM", g.mean((2, 3), keepdim=True) * f
            yield name, "LayerCAM", g.relu() * f
            if "LRP-γ" in asked:
                yield name, "LRP-γ", LayerPropagation(lrp, layer).attribute(x, t)


def scores(
    maps: Maps, x: Tensor, targets: Tensor, wanted: Collection[Setting],
    measure: Callable[[Tensor], Tensor],
) -> dict[Setting, Tensor]:  # fmt: skip
    """Return what ``measure`` makes of the maps of all images, for each of the settings."""
    found: dict[Setting, list[Tensor]] = {}
    for some, t in zip(x.split(5), targets.split(5), strict=True):
        for layer, method, values in maps(some, t, wanted):
            for reduction in REDUCTIONS:
                if (layer, method, reduction) in wanted:
                    one = heat(values.detach(), some, reduction).float()
                    found.setdefault((layer, method, reduction), []).append(one)
    return {key: measure(torch.cat(m)) for key, m in found.items()}


def games(maps: Maps, grid: Mosaics, wanted: Collection[Setting]) -> dict[Setting, Tensor]:
    """Return the score of each mosaic, for each of the settings."""
    return scores(
        maps, grid.x, grid.targets, wanted, lambda values: grid_pointing_game(values, grid).values
    )


def accuracies(
    maps: Maps, about: boxes.Photographs, index: Tensor, wanted: Collection[Setting]
) -> dict[Setting, Tensor]:
    """Return the box accuracy of each of the photographs ``index``, for each of the settings."""
    x, masks = about.x[index], about.boxes[index]

    def measure(values: Tensor) -> Tensor:
        return bounding_box_accuracy(values, x, boxes=masks, largest=boxes.LARGEST).values

    return scores(maps, x, about.labels[index], wanted, measure)


def recognised(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Return which photographs the model gives their label with :data:`CONFIDENCE`."""
    with torch.no_grad():
        parts = [model(some).softmax(1) for some in x.split(20)]
    return torch.cat(parts).gather(1, labels[:, None])[:, 0] >= CONFIDENCE


def cells(grid: Mosaics) -> Tensor:
    """Return the photographs (mosaics, cells, channels, height, width) of mosaics."""
    rows = torch.stack(grid.x.chunk(grid.n, 2), 1)
    found: Tensor = torch.stack(rows.chunk(grid.n, 4), 2).flatten(1, 2)
    return found


def sought(grid: Mosaics) -> Tensor:
    """Return for each mosaic the number of the photograph to find, the same for the same one."""
    own = cells(grid)[torch.arange(len(grid.x)), grid.cells]
    _, numbers = own.flatten(1).unique(dim=0, return_inverse=True)
    found: Tensor = numbers
    return found


def error(values: Tensor, group: Tensor) -> float:
    """Return the standard error of a mean whose values depend on each other within groups."""
    # (Σ_g (Σ_{i in g} v_i - mean)²)^½ / n, times the correction for few groups
    sums = torch.zeros(int(group.max()) + 1, dtype=values.dtype)
    sums.index_add_(0, group, values - values.mean())
    g = len(group.unique())
    return float((sums.square().sum() * g / (g - 1)).sqrt() / len(values))


def best(choosing: dict[Setting, Tensor]) -> dict[str, Setting]:
    """Return each method's best setting of the choosing half; "MIP-IN" is the best of its own."""
    found: dict[str, Setting] = {}
    for key in sorted(choosing, key=lambda key: -float(choosing[key].mean())):
        found.setdefault(key[1].partition(",")[0], key)
    return found


def setting(row: dict[str, Any]) -> Setting:
    """Return the setting of a row of the results file."""
    return row["layer"], row["method"], row["reduction"]


def settings(layers: dict[str, int], methods: Collection[str]) -> set[Setting]:
    """Return all settings of these methods."""
    return {
        (layer, method, reduction)
        for layer in layers
        for method in methods for reduction in FIXED.get(method, REDUCTIONS)
    }  # fmt: skip


def choose(maps: Maps, grid: Mosaics) -> list[dict[str, Any]]:
    """Return a row for each setting, with its score on mosaics of the choosing half."""
    choosing = games(maps, grid, settings(maps.layers, METHODS))
    rows = chosen_rows(choosing, default(maps.layers))
    return [{"size": f"{grid.n}x{grid.n}", **row} for row in rows]


def chosen_rows(choosing: dict[Setting, Tensor], default: Setting) -> list[dict[str, Any]]:
    """Return a row for each setting, with its score on the choosing half."""
    chosen = set(best(choosing).values())
    return [
        {
            "layer": layer, "method": method, "reduction": reduction,
            "default": (layer, method, reduction) == default,
            "chosen": (layer, method, reduction) in chosen, "choosing half": float(values.mean()),
        }
        for (layer, method, reduction), values in choosing.items()
    ]  # fmt: skip


def default(layers: dict[str, int]) -> Setting:
    """Return the setting of `for_photographs`."""
    reading = FEATURE if layers is LAYERS["head"] else METHODS[1]
    return list(layers)[1], reading, "sum_of_abs"


def report(maps: Maps, grid: Mosaics, rows: list[dict[str, Any]]) -> None:
    """Add scores on mosaics of the reported half to the rows of the default and what was chosen."""
    wanted = [row for row in rows if row["default"] or row["chosen"]]
    reported, group = games(maps, grid, {*map(setting, wanted)}), sought(grid)
    for row in wanted:
        values = reported[setting(row)]
        less = reported[default(maps.layers)] - values
        row |= {
            "mosaics": len(grid.x),
            "photographs": len(cells(grid).flatten(0, 1).flatten(1).unique(dim=0)),
            "photographs to find": len(group.unique()),
            "score": float(values.mean()), "standard error": error(values, group),
            "default less this": float(less.mean()), "its standard error": error(less, group),
        }  # fmt: skip


def fits(name: str, chain: boxes.Chain, data: Path, held_out: int) -> None:
    """Measure box accuracy against the number of photographs fitted, and write it down."""
    about = boxes.photographs(name, data, chain.normalise, 2 * max(FITS))
    rows, layer = [], chain.steps[list(LAYERS[name].values())[1]]
    index = about.report[:held_out]
    x, labels, masks = about.x[index], about.labels[index], about.boxes[index]
    for count in FITS:
        for seed in range(SETS):
            order = torch.randperm(len(about.fit), generator=torch.Generator().manual_seed(seed))
            mipin = for_photographs(
                chain.steps, about.fit[order[:count]], sorted(about.classes), layer=layer,
                batch_size=20, progress=False,
            )  # fmt: skip
            parts = zip(x.split(20), labels.split(20), strict=True)
            maps = torch.cat([mipin.attribute(some, label) for some, label in parts])
            values = bounding_box_accuracy(maps, x, boxes=masks, largest=boxes.LARGEST).values
            row = {
                "fitted": count, "set": seed, "n": len(values), "accuracy": float(values.mean()),
                "standard error": float(values.std() / len(values) ** 0.5),
            }  # fmt: skip
            rows.append(row)
            print(f"{time.process_time():.0f} s {row}", flush=True)
    write(
        f"photographs-fits-{name}", rows, network=name, layer=list(LAYERS[name])[1],
        map="for_photographs", held_out="ILSVRC2012 validation photographs, boxes of at most 33 %",
        fitted_on="ILSVRC2012 training photographs of twenty classes, stored at 128 x 128",
        random_map=float(masks.flatten(1).double().mean()),
    )  # fmt: skip


def dense(chain: boxes.Chain, data: Path, count: int) -> None:
    """Measure box accuracy on a network with a dense head, and write it down."""
    about, layers = boxes.photographs("head", data, chain.normalise, count), LAYERS["head"]
    picked, reading = photograph_layer(chain.steps, (about.x[:1],))
    assert (picked, f"MIP-IN, A{reading.removeprefix('unsigned')}") == default(layers)[:2]
    inverse = InverseNetwork(chain.steps, layer=chain.steps[min(layers.values())])
    maps = Maps(chain, layers, inverse.fit(about.fit, sorted(about.classes), batch_size=20))
    choosing = accuracies(maps, about, about.choice, settings(layers, {*METHODS, FEATURE}))
    rows = chosen_rows(choosing, default(layers))
    wanted = {setting(row) for row in rows if row["default"] or row["chosen"]}
    reported = accuracies(maps, about, about.report, wanted)
    for row in rows:
        if setting(row) in wanted:
            own = reported[setting(row)]
            less = reported[default(layers)] - own
            row |= {
                "n": len(own), "accuracy": float(own.mean()),
                "standard error": float(own.std() / len(own) ** 0.5),
                "default less this": float(less.mean()),
                "its standard error": float(less.std() / len(own) ** 0.5),
            }  # fmt: skip
    with torch.no_grad():
        logits = torch.cat([chain.steps(part) for part in about.x[about.report].split(20)])
    write(
        "photographs-boxes-head", rows, **boxes.PROTOCOL, fit=count, width=boxes.WIDTH,
        classes=sorted(about.classes), n=len(about.report),
        accuracy=float((logits.argmax(1) == about.labels[about.report]).double().mean()),
    )  # fmt: skip
    print(f"{time.process_time():.0f} s\n{show([row for row in rows if 'accuracy' in row])}")


def main() -> None:
    parser = network_parser(__doc__, fit=60, networks=LAYERS)
    parser.add_argument("part", choices=("choose", "report", "fits", "boxes"))
    parser.add_argument("--choosing", type=int, default=20, help="mosaics to choose settings on")
    parser.add_argument("--mosaics", type=int, default=100, help="mosaics to report")
    parser.add_argument("--sizes", type=int, nargs="+", default=(2, 3), help="sides of mosaics")
    parser.add_argument("--held-out", type=int, default=80, help="photographs to explain in fits")
    arguments = parser.parse_args()
    if (arguments.part == "boxes") != (arguments.network == "head"):
        parser.error("boxes is the part of the network head, and head has no other part")
    if arguments.part == "fits":
        chain = boxes.chain(arguments.network, arguments.data)
        fits(arguments.network, chain, arguments.data, arguments.held_out)
        return
    if arguments.part == "boxes":
        dense(boxes.chain("head", arguments.data), arguments.data, arguments.fit)
        return
    name, part = f"photographs-mosaics-{arguments.network}", arguments.part
    chain, layers = boxes.chain(arguments.network, arguments.data), LAYERS[arguments.network]
    rows = read(name)["rows"] if (RESULTS / f"{name}.json").exists() else []
    model, generator = chain.steps, torch.Generator().manual_seed(0)
    about = boxes.photographs(arguments.network, arguments.data, chain.normalise, arguments.fit)
    images = photos(arguments.network, arguments.data, 1, generator)
    x, labels, classes = chain.normalise(images.test), images.labels, sorted(about.classes)
    index = boxes.halves(labels, torch.Generator().manual_seed(0))[part == "report"]
    index = index[recognised(model, x[index], labels[index])]
    asked = [row for row in rows if part == "report" and (row["default"] or row["chosen"])]
    lowest = [layers[row["layer"]] for row in asked if row["method"].startswith("MIP-IN")]
    inverse = InverseNetwork(model, layer=model[min(lowest or layers.values())])
    maps = Maps(chain, layers, inverse.fit(about.fit, classes, batch_size=20, progress=False))
    for n in arguments.sizes:
        grid = mosaics(
            lambda batch: torch.zeros(len(batch), 1000),  # all of them are recognised
            x[index], labels[index], n,
            arguments.choosing if part == "choose" else arguments.mosaics, confidence=0,
            classes=classes, generator=torch.Generator().manual_seed(n),
        )  # fmt: skip
        own, size = [], f"{n}x{n}"
        if part == "choose":
            own = choose(maps, grid)
        else:
            own = [row for row in rows if row["size"] == size]
            report(maps, grid, own)
        rows = [row for row in rows if row["size"] != size] + own
        write(
            name, rows, data="600 ILSVRC2012 validation images of 20 classes", size=224,
            fit=arguments.fit, classes=classes, target="the class of the cell",
            confidence=CONFIDENCE, split="two halves, class by class at random",
            network=arguments.network,
        )  # fmt: skip
        print(f"{time.process_time():.0f} s\n{show([r for r in own if r['chosen']])}", flush=True)


if __name__ == "__main__":
    main()
