"""What a transformer's maps show: MIP-IN beside the methods for transformers.

    python benchmarks/vision_transformers.py NETWORK --data FOLDER [--only METHOD]

With ``--only`` the rows of one method are measured and put in the table of an earlier run.

The networks are ``vit-cifar10`` and ``cct-cifar10`` of ``networks.py``, on test images of CIFAR-10.

**Mosaics** of n x n images, each recognised alone with a confidence of at least 0.9; each cell has
the positions of one image. MIP-IN is fitted on mosaics of training images, whatever their classes.
All readings of MIP-IN are measured on the first half of the mosaics of 2 x 2, to choose among them;
the second half is reported.

- *share*: positive attribution in the cell of the class / all positive attribution, after the sum
  over channels or features; chance is 1 / n².
- *cell*: how often that cell has the largest sum of all.
- Occlusion, the reference, replaces one cell by the mean of the training images and takes the fall
  of the logit: it shows that the network itself looks at the right cell.

**Single images**: insertion and deletion (the mean training image in place of what is missing),
the cosine of the maps for two classes, the correlation with the maps of a network made random
block after block from the output down, and APC (equation 10), also with the output of another
image. Given the masks, A is the logit times a map, so that shares do not depend on the output.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, parser_of, read, show, write
from compact_transformers import tiled
from data import CIFAR10_CLASSES, Images, load
from networks import trained
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin import LRP, InverseNetwork, LayerMIPINAttribution, MIPINAttribution
from captum_mipin.comparison import compare
from captum_mipin.methods import (
    AttentionRollout,
    Chefer,
    Gamma,
    GuidedBackprop,
    LayerPropagation,
    LeGrad,
)
from captum_mipin.methods.gradients import Gradient
from captum_mipin.metrics import (
    Mosaics,
    class_sensitivity,
    completeness,
    deletion,
    grid_pointing_game,
    insertion,
    mosaics,
    randomization,
)

Method = Callable[[Tensor, Tensor], Tensor]
#: The readings of MIP-IN that are measured throughout. The first is the best of A on the first
#: halves of the mosaics, the second one was set by earlier runs, and the third by the first half of
#: MiniLM's mosaics, for networks that average their tokens.
READING, EARLIER = "MIP-IN, A × feature", "MIP-IN, A × gradient"
AVERAGED = "MIP-IN, contrast × feature"
#: The rows of the methods that need no fit.
PEERS = ("gradient, absolute", "gradient × feature", "Guided Backprop", "LRP-ε", "AttnLRP")
#: AttnLRP of images, with the γ that the authors of AttnLRP choose for ViTs.
FOR_IMAGES = "AttnLRP, γ"
GAMMAS = [(nn.Conv2d, Gamma(0.25)), (nn.Linear, Gamma(0.05))]
#: The rows of the methods that are fitted, beside the other readings on the first mosaics.
READINGS = [READING, EARLIER, AVERAGED]
FITTED = (*READINGS, "pattern only")
#: All readings of MIP-IN: the kind, and what it is multiplied by.
KINDS = ("A", "evidence", "contrast")
FACTORS = {"": "", " × feature": "features", " × gradient": "gradients"}
#: Where the network turns an image into tokens, and the first norm behind.
PLACES = ("input", "blocks.0.norm1", "middle", "last")


def scattered(images: Tensor, n: int, count: int) -> Tensor:
    """Return ``count`` mosaics (count, 3, 32 n, 32 n) of n x n images, chosen at random."""
    draw = torch.Generator().manual_seed(0)
    chosen = images[torch.randint(len(images), (count * n * n,), generator=draw)]
    rows = chosen.unflatten(0, (count, n, n)).permute(0, 3, 1, 4, 2, 5)
    grids: Tensor = rows.reshape(count, 3, 32 * n, 32 * n)
    return grids


def as_map(values: Tensor, n: int) -> Tensor:
    """Return a map (batch, 1, height, width), summed over the features of a place."""
    if values.ndim == 4:
        summed: Tensor = values.sum(1, keepdim=True)
        return summed
    tokens = values.sum(2) if values.ndim == 3 else values
    side = 8 * n  # a class token comes first
    grid: Tensor = tokens[:, -side * side :].unflatten(1, (1, side, side))
    return grid


def place_of(network: nn.Module, place: str) -> str:
    """Return the dotted name of the module at one of ``PLACES``, "" for the input."""
    depth = len(network.blocks)  # type: ignore[arg-type]
    # Behind the last attention, a network that reads a class token drops all others.
    last = "norm1" if network.pool is None else "norm2"
    names = {"middle": f"blocks.{depth // 2 - 1}.norm2", "last": f"blocks.{depth - 1}.{last}"}
    return "" if place == "input" else names.get(place, place)


def peers(model: nn.Module, layer: nn.Module | None) -> dict[str, Method]:
    """Return the methods that need no fit, at a layer, or at the input for None."""

    def at_place(method: Any) -> Any:
        return (method if layer is None else LayerPropagation(method, layer)).attribute

    def absolute(x: Tensor, target: Tensor) -> Tensor:
        maps: Tensor = at_place(Gradient(model))(x, target).abs()
        return maps

    def times_features(x: Tensor, target: Tensor) -> Tensor:
        explanation = Gradient(model).explain(x, target, (), layer)
        product: Tensor = explanation.signals[0] * explanation.features[0]
        return product

    return {
        "gradient, absolute": absolute,
        "gradient × feature": times_features,
        "Guided Backprop": at_place(GuidedBackprop(model)),
        "LRP-ε": at_place(LRP(model)),
        "AttnLRP": at_place(LRP(model, attention="attnlrp")),
    }


def for_images(model: nn.Module, layer: nn.Module | None) -> dict[str, Method]:
    """Return the methods that need no fit and may be other ones for images than for texts."""
    gamma: Any = LRP(model, attention="attnlrp", composite=GAMMAS)
    gamma = gamma if layer is None else LayerPropagation(gamma, layer)
    return {**peers(model, layer), FOR_IMAGES: gamma.attribute}


def for_tokens(model: nn.Module) -> dict[str, Method]:
    """Return the methods whose maps have one value a token."""
    named: dict[str, Any] = {
        "attention rollout": AttentionRollout(model),
        "Chefer": Chefer(model),
        "LeGrad": LeGrad(model),
    }
    return {name: method.attribute for name, method in named.items()}


def readings(
    model: nn.Module, inverse: InverseNetwork, layer: nn.Module | None, *, pooled: bool
) -> dict[str, Method]:
    """Return all readings of MIP-IN at a layer, or at the input for None.

    Args:
        model: The network.
        inverse: Its inverse down to the input or the layer.
        layer: The layer.
        pooled: Whether the network averages its tokens, so that there is evidence for each token.
    """
    ours: Any = MIPINAttribution(model, inverse)
    if layer is not None:
        ours = LayerMIPINAttribution(model, inverse, layer)
    found: dict[str, Method] = {}
    for kind in KINDS[: 3 if pooled else 1]:
        for name, factor in FACTORS.items():
            factor = "inputs" if factor == "features" and layer is None else factor
            options = {kind: True} if kind != "A" else {}
            options |= {f"multiply_by_{factor}": True} if factor else {}
            found[f"MIP-IN, {kind}{name}"] = partial(_reading, ours, options)
    found["pattern only"] = partial(_reading, ours, {"local": False})
    return found


def _reading(method: Any, options: dict[str, bool], x: Tensor, target: Tensor) -> Tensor:
    maps: Tensor = method.attribute(x, target=target, **options)
    return maps


def controls(like: Tensor) -> dict[str, Tensor]:
    """Return maps (batch, 1, height, width) that know nothing of the network."""
    h, w = like.shape[2:]
    away = [(torch.arange(k) - (k - 1) / 2) / k for k in (h, w)]
    blob = torch.exp(-8 * (away[0][:, None] ** 2 + away[1] ** 2))
    draw = torch.Generator().manual_seed(0)
    return {
        "random": torch.rand(like.shape, generator=draw),
        "centre prior": blob.expand(like.shape),
        "mask only": torch.ones(like.shape),  # no value of a token is 0
    }


def scores(maps: Tensor, grid: Mosaics) -> dict[str, float]:
    """Return share and cell of the second half of the mosaics, and the share of the first half."""
    half, n = len(maps) // 2, f"{grid.n}x{grid.n}"
    result = grid_pointing_game(maps, grid)
    report = result.values[half:].double()
    hit = F.adaptive_avg_pool2d(maps, grid.n).flatten(1).argmax(1) == grid.cells
    return {
        f"{n} share": float(report.mean()),
        f"{n} error": float(report.std() / len(report) ** 0.5),
        f"{n} cell": float(hit[half:].double().mean()),
        f"{n} share, first half": float(result.values[:half].mean()),
    }


def occlusion(model: nn.Module, grid: Mosaics, mean: Tensor) -> Tensor:
    """Return the fall of the logit for each cell that is replaced by ``mean`` (3, 1, 1)."""
    with torch.no_grad():
        logit = model(grid.x).gather(1, grid.targets[:, None])[:, 0]
        falls = []
        for cell in range(grid.n**2):
            row, column = divmod(cell, grid.n)
            x = grid.x.clone()
            place = x[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            place.copy_(mean.expand_as(place))
            falls.append(logit - model(x).gather(1, grid.targets[:, None])[:, 0])
    result: Tensor = torch.stack(falls, 1).unflatten(1, (1, grid.n, grid.n))
    return result


Table = dict[tuple[str, str], dict[str, float]]
#: What the picture shows: (place, method).
SHOWN = (
    ("tokens", "LeGrad"),
    ("blocks.0.norm1", "gradient × feature"),
    ("blocks.0.norm1", "AttnLRP"),
    ("blocks.0.norm1", EARLIER),
)


def on_mosaics(network: nn.Module, images: Images, n: int, options: argparse.Namespace) -> Table:
    """Return (place, method) → scores on mosaics of n x n images."""
    draw, model = torch.Generator().manual_seed(n), tiled(network, n).eval()  # type: ignore[arg-type]
    grid = mosaics(
        network, images.test, images.test_labels, n, options.mosaics, confidence=0.9, generator=draw
    )
    inverse = InverseNetwork(model)
    if options.only != FOR_IMAGES:
        inverse.fit(scattered(images.train, n, options.fit), batch_size=25, progress=False)
    found: Table = {}
    if options.only is None:
        found["cells", "occlusion"] = scores(occlusion(model, grid, _mean(images)), grid)
    methods = {("tokens", name): method for name, method in for_tokens(model).items()}
    for place in PLACES:
        path = place_of(network, place)
        layer = model.get_submodule(path) if path else None
        ours = readings(model, inverse, layer, pooled=network.pool is not None)
        if n > 2:  # the readings are chosen by then
            ours = {name: ours[name] for name in FITTED if name in ours}
        methods |= {(place, key): f for key, f in {**for_images(model, layer), **ours}.items()}
    shown = {}
    for key, method in methods.items():
        if options.only not in (None, key[1]):
            continue
        parts = zip(grid.x.split(20), grid.targets.split(20), strict=True)
        maps = torch.cat([as_map(method(x, target).detach(), n) for x, target in parts])
        found[key] = scores(maps, grid)
        if key in SHOWN:
            shown[", ".join(key)] = maps
        print(*key, found[key], file=sys.stderr, flush=True)
        if key[1] == "LeGrad":
            found |= {("tokens", name): scores(m, grid) for name, m in controls(maps).items()}
    if n == 2 and options.only is None:
        picture(options.network, model, grid, shown)
    return found


def picture(name: str, model: nn.Module, grid: Mosaics, maps: dict[str, Tensor]) -> None:
    """Draw the first mosaics of the second half with maps, in results/transformers-<name>.jpg."""
    chosen = slice(len(grid.x) // 2, len(grid.x) // 2 + 4)
    x, targets = grid.x[chosen], grid.targets[chosen]
    found = compare(
        {label: shown[chosen] for label, shown in maps.items()}, x, targets, model=model,
        metrics=[], controls=False, titles=[CIFAR10_CLASSES[k] for k in targets], progress=False,
    )  # fmt: skip
    found.figure().savefig(RESULTS / f"transformers-{name}.jpg", dpi=80)


def _mean(images: Images) -> Tensor:
    return images.train[:5000].mean((0, 2, 3))[:, None, None]


@dataclass(frozen=True)
class Singles:
    """Single inputs that a network recognises, and how its maps of them are measured.

    Attributes:
        model: The network.
        x: The inputs (N, ...).
        labels: Their classes (N,).
        options: Options of insertion and deletion.
        layers: Names of modules, in the order in which they are made random.
        heat: Function from maps to the heat that orders what is put in or taken away.
    """

    model: nn.Module
    x: Tensor
    labels: Tensor
    options: dict[str, Any]
    layers: list[str]
    heat: Callable[[Tensor], Tensor] = torch.Tensor.clone

    def replaced(self, maps: Tensor) -> dict[str, float]:
        """Return insertion and deletion of maps."""
        heat, about = self.heat(maps), {"model": self.model, **self.options}
        return {
            "insertion": insertion(heat, self.x, self.labels, **about).mean,
            "deletion": deletion(heat, self.x, self.labels, **about).mean,
        }

    def measured(
        self, method: Method, refit: Callable[[nn.Module], Method] | None
    ) -> dict[str, float]:
        """Return the measures of a method; those of random weights if ``refit`` makes it anew."""
        x, labels, row = self.x, self.labels, self.replaced(method(self.x, self.labels))
        apart = class_sensitivity(method, x, labels, model=self.model)
        row["class cosine"] = apart.parts["cosine"].mean
        if refit is not None:
            row["random weights"] = randomization(
                method, x[:20], labels[:20], model=self.model, layers=self.layers, refit=refit
            ).mean
        return {key: value for key, value in row.items() if isfinite(value)}


def on_images(network: nn.Module, images: Images, options: argparse.Namespace) -> Table:
    """Return (place, method) → measures on single images that the network recognises."""
    count, only = options.images, options.only
    fit, pooled = images.train[:500], network.pool is not None
    right = network(images.test[:1000]).argmax(1) == images.test_labels[:1000]
    x, labels = (part[:1000][right][:count] for part in (images.test, images.test_labels))
    inverse = InverseNetwork(network)
    if only != FOR_IMAGES:
        inverse.fit(fit, batch_size=100, progress=False)
    found: Table = {}

    def named(place: str, name: str, model: nn.Module, kept: InverseNetwork | None = None) -> Any:
        """Return the method of a network, fitted to it unless there is an inverse."""
        path = place_of(model, place) if place != "tokens" else ""
        layer = model.get_submodule(path) if path else None
        if place == "tokens":
            method = for_tokens(model)[name]
        elif name in (*PEERS, FOR_IMAGES):
            method = for_images(model, layer)[name]
        else:
            own = kept or InverseNetwork(model).fit(fit[:200], batch_size=100, progress=False)
            method = readings(model, own, layer, pooled=pooled)[name]
        return lambda x, target: as_map(method(x, torch.as_tensor(target)).detach(), 1)

    tokens = [("tokens", name) for name in for_tokens(network)]
    fitted = [name for name in FITTED if pooled or name != AVERAGED]
    asked = [
        *tokens,
        *((place, name) for place in PLACES for name in (*PEERS, FOR_IMAGES, *fitted)),
    ]
    stages = [name for name, _ in reversed(list(network.named_children())) if name != "blocks"]
    depth = len(network.blocks)  # type: ignore[arg-type]
    stages[-1:-1] = [f"blocks.{i}" for i in reversed(range(depth))]
    single = Singles(network, x, labels, {"baseline": _mean(images), "steps": 16}, stages)
    for place, name in asked:
        if only not in (None, name):
            continue
        refit = partial(named, place, name) if place in ("tokens", *PLACES[:2]) else None
        found[place, name] = single.measured(named(place, name, network, inverse), refit)
        print(place, name, found[place, name], file=sys.stderr, flush=True)
    for name, control in controls(x).items():
        if only is None:
            found["tokens", name] = single.replaced(control)
    return found


def merged(name: str, found: Table) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return all rows and the settings of an earlier run, with what was found in its place."""
    result = read(name)
    rows = {(row["place"], row["method"]): row for row in result["rows"]}
    for (place, method), row in found.items():
        rows[place, method] = {"place": place, "method": method, **row}
    return list(rows.values()), result["settings"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("network", choices=("vit-cifar10", "cct-cifar10"))
    parser.add_argument("--data", type=Path, help="folder with the CIFAR-10 sheets")
    parser.add_argument("--mosaics", type=int, default=200)
    parser.add_argument("--fit", type=int, default=60, help="mosaics to fit on")
    parser.add_argument("--images", type=int, default=50, help="single images to explain")
    parser.add_argument(
        "--only", help="the method whose rows are measured", choices=(FOR_IMAGES, *FITTED)
    )
    options = parser.parse_args()
    images = load("cifar10", options.data)
    network = trained(options.network, images)
    found = on_mosaics(network, images, 2, options)
    for table in (
        on_mosaics(network, images, 3, options),
        on_images(network, images, options),
    ):
        for key, row in table.items():
            found.setdefault(key, {}).update(row)
    if options.only is not None:
        rows, settings = merged(f"transformers-{options.network}", found)
        write(f"transformers-{options.network}", rows, **settings | {"readings": READINGS})
        return
    rows = [{"place": key[0], "method": key[1], **row} for key, row in found.items()]
    x, labels = images.test[:500], images.test_labels[:500]
    single = InverseNetwork(network).fit(images.train[:500], batch_size=100, progress=False)
    apc = completeness(MIPINAttribution(network, single), x, labels)
    write(
        f"transformers-{options.network}", rows, data="CIFAR-10", split="test",
        mosaics=options.mosaics, reported=options.mosaics - options.mosaics // 2, fit=options.fit,
        target="the class of the cell; of single images the label, which is predicted",
        confidence=0.9, reduction="sum over channels or features, then ReLU",
        images=options.images, readings=READINGS,
        apc={"S": apc.mean, **{name: part.mean for name, part in apc.parts.items()}},
        apc_n=500, apc_fit=500,
    )  # fmt: skip
    print(show(rows))


if __name__ == "__main__":
    main()
