"""Which part of a mosaic a transformer's maps show: MIP-IN beside the methods for transformers.

    python benchmarks/vision_transformers.py NETWORK --data FOLDER

Mosaics of n x n test images of CIFAR-10, each recognised alone with a confidence of at least 0.9,
for the networks ``vit-cifar10`` and ``cct-cifar10`` of ``networks.py`` with the positions of one
image in each cell. MIP-IN is fitted on mosaics of training images, whatever their classes.

- *share*: positive attribution in the cell of the class / all positive attribution, after the sum
  over channels or features; chance is 1 / n².
- *cell*: how often that cell has the largest sum of all.
- Occlusion, the reference, replaces one cell by the mean of the training images and takes the fall
  of the logit: it shows that the network itself looks at the right cell.

APC (equation 10) is that of single test images, also with the output of another image.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import parser_of, show, write
from compact_transformers import tiled
from data import Images, load
from networks import trained
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin import LRP, InverseNetwork, LayerMIPINAttribution, MIPINAttribution
from captum_mipin.methods import AttentionRollout, Chefer, GuidedBackprop, LayerPropagation, LeGrad
from captum_mipin.methods.gradients import Gradient
from captum_mipin.metrics import Mosaics, completeness, grid_pointing_game, mosaics

Method = Callable[[Tensor, Tensor], Tensor]


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


def methods(
    model: nn.Module, inverse: InverseNetwork, layer: nn.Module | None, pooled: bool
) -> dict[str, Method]:
    """Return the methods at a layer, or at the input for None.

    Args:
        model: The network.
        inverse: Its inverse down to the input.
        layer: The layer.
        pooled: Whether the network averages its tokens, so that there is evidence for each token.
    """

    def at_place(method: Any) -> Any:
        return (method if layer is None else LayerPropagation(method, layer)).attribute

    def times_features(method: Any, x: Tensor, target: Tensor) -> Tensor:
        explanation = method.explain(x, target, (), layer)
        product: Tensor = explanation.signals[0] * explanation.features[0]
        return product

    found: dict[str, Method] = {
        "gradient, absolute": lambda x, target: at_place(Gradient(model))(x, target).abs(),
        "gradient × feature": partial(times_features, Gradient(model)),
        "Guided Backprop": at_place(GuidedBackprop(model)),
        "LRP-ε": at_place(LRP(model)),
        "AttnLRP": at_place(LRP(model, attention="attnlrp")),
    }
    ours: Any = MIPINAttribution(model, inverse)
    if layer is not None:
        ours = LayerMIPINAttribution(model, inverse, layer)
    product = f"multiply_by_{'features' if layer else 'inputs'}"
    times = {"": "", " × feature": product, " × gradient": "multiply_by_gradients"}
    for kind in ("", "evidence", "contrast")[: 3 if pooled else 1]:
        for name, option in times.items():
            options = {key: True for key in (kind, option) if key}
            found[f"MIP-IN, {kind or 'A'}{name}"] = partial(_reading, ours, options)
    found["pattern only"] = partial(_reading, ours, {"local": False})
    return found


def _reading(method: Any, options: dict[str, bool], x: Tensor, target: Tensor) -> Tensor:
    maps: Tensor = method.attribute(x, target=target, **options)
    return maps


def scores(maps: Tensor, grid: Mosaics) -> dict[str, float]:
    """Return the share with its standard error, and how often the cell has the largest sum."""
    result = grid_pointing_game(maps, grid)
    sums = F.adaptive_avg_pool2d(maps, grid.n).flatten(1)
    n = f"{grid.n}x{grid.n}"
    return {
        f"{n} share": result.mean,
        f"{n} error": result.standard_error,
        f"{n} cell": float((sums.argmax(1) == grid.cells).double().mean()),
    }


def occlusion(model: nn.Module, grid: Mosaics, mean: Tensor) -> Tensor:
    """Return the fall of the logit for each cell that is replaced by ``mean`` (3,), as a map."""
    with torch.no_grad():
        logit = model(grid.x).gather(1, grid.targets[:, None])[:, 0]
        falls = []
        for cell in range(grid.n**2):
            row, column = divmod(cell, grid.n)
            x = grid.x.clone()
            place = x[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            place.copy_(mean[:, None, None].expand_as(place))
            falls.append(logit - model(x).gather(1, grid.targets[:, None])[:, 0])
    result: Tensor = torch.stack(falls, 1).unflatten(1, (1, grid.n, grid.n))
    return result


def measure(network: nn.Module, images: Images, n: int, options: argparse.Namespace) -> Any:
    """Return (place, method) → scores on mosaics of n x n images."""
    draw, model = torch.Generator().manual_seed(n), tiled(network, n).eval()  # type: ignore[arg-type]
    grid = mosaics(
        network, images.test, images.test_labels, n, options.mosaics, confidence=0.9, generator=draw
    )
    inverse = InverseNetwork(model).fit(
        scattered(images.train, n, options.fit), batch_size=25, progress=False
    )
    found: dict[tuple[str, str], dict[str, float]] = {}
    found["cells", "occlusion"] = scores(
        occlusion(model, grid, images.train[:5000].mean((0, 2, 3))), grid
    )
    tokens: dict[str, Any] = {
        "attention rollout": AttentionRollout(model),
        "Chefer": Chefer(model),
        "LeGrad": LeGrad(model),
    }
    places: dict[tuple[str, str], Method] = {
        ("tokens", name): method.attribute for name, method in tokens.items()
    }
    depth = len(network.blocks)  # type: ignore[arg-type]
    middle, last = f"blocks.{depth // 2 - 1}.norm2", f"blocks.{depth - 1}.norm2"
    for place in ("input", "blocks.0.norm1", middle, last):
        layer = None if place == "input" else model.get_submodule(place)
        for name, method in methods(model, inverse, layer, network.pool is not None).items():
            places[place, name] = method
    for key, method in places.items():
        parts = zip(grid.x.split(20), grid.targets.split(20), strict=True)
        maps = torch.cat([as_map(method(x, target).detach(), n) for x, target in parts])
        found[key] = scores(maps, grid)
        print(*key, found[key], file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("network", choices=("vit-cifar10", "cct-cifar10"))
    parser.add_argument("--data", type=Path, help="folder with the CIFAR-10 sheets")
    parser.add_argument("--mosaics", type=int, default=200)
    parser.add_argument("--fit", type=int, default=60, help="mosaics to fit on")
    options = parser.parse_args()
    images = load("cifar10", options.data)
    network = trained(options.network, images)
    by_size = [measure(network, images, n, options) for n in (2, 3)]
    rows = [
        {"place": place, "method": method, **by_size[0][place, method], **by_size[1][place, method]}
        for place, method in by_size[0]
    ]
    x, labels = images.test[:500], images.test_labels[:500]
    single = InverseNetwork(network).fit(images.train[:500], batch_size=100, progress=False)
    apc = completeness(MIPINAttribution(network, single), x, labels)
    write(
        f"transformers-{options.network}", rows, data="CIFAR-10", split="test",
        mosaics=options.mosaics, fit=options.fit, target="the class of the cell", confidence=0.9,
        reduction="sum over channels or features, then ReLU",
        apc={"S": apc.mean, **{name: part.mean for name, part in apc.parts.items()}},
        apc_n=500, apc_fit=500,
    )  # fmt: skip
    print(show(rows))


if __name__ == "__main__":
    main()
