"""Table 2 of the paper: whether the hottest part of a map lies on the object.

``benchmarks/paper.py`` runs this module. Photographs of ImageNet's validation set whose boxes cover
at most 33 % are squashed to 224 x 224, and each is explained for its label.

Score: let n be the number of pixels inside the boxes; the score is the share of the n hottest
pixels that lie inside. Ties score what a random choice among them would. Maps of a layer are
interpolated bilinearly.

Everything that is fitted is fitted on photographs of ImageNet's training set. The photographs to
explain are split into two halves, class by class and at random. Layer, reading, and the order of
ReLU and mean over channels are chosen on the first half, for MIP-IN and for all other methods at a
layer; every figure of the table is measured on the second half. Maps of pixels are made for the
second half alone, and the better of their two reductions counts there, which favours them.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import heads
import pretrained
import torch
from captum.attr import DeepLift, InputXGradient, IntegratedGradients, Saliency
from common import show, write
from localization_grid import photos
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_mipin import IBA, LRP, InputIBA, InverseNetwork, MIPINError
from captum_mipin.bottleneck.input_iba import INPUT_IBA_SETTINGS
from captum_mipin.inverse.base import ModelInverse
from captum_mipin.inverse.neighbours import NeighbourInverse
from captum_mipin.methods import (
    Deconvnet,
    DeepTaylor,
    ExcitationBackprop,
    Gamma,
    GuidedBackprop,
    PatternAttribution,
    PatternNet,
    Patterns,
    SmoothGrad,
)
from captum_mipin.metrics import bounding_box_accuracy, deletion, insertion
from captum_mipin.metrics.maps import heat

LARGEST = 0.33
CLASSES = 10
#: Images for methods that take many passes, and for insertion and deletion.
SLOW = 24
#: Images to fit MIP-IN of the whole network on.
WHOLE = 30
#: Images to fit patterns on at a layer, at most.
PATTERNS = 200
WIDTH = 4096
REDUCTIONS = ("relu_of_sum", "sum_of_relu", "sum_of_abs")
PROTOCOL = {
    "data": (
        "ILSVRC2012 validation photographs at 224 x 224, boxes of at most 33 %, the classes with "
        "the most such"
    ),
    "fitted on": (
        "ILSVRC2012 training photographs of twenty classes, these among them, stored at 128 x 128"
    ),
    "target": "the label",
    "ties": "expected",
    "split": "two halves, class by class at random; figures are of the second",
}
#: The reductions that define a method at a layer. Other methods take the better one of two.
AT_LAYERS = {
    "Grad-CAM": ("relu_of_sum",),
    "LayerCAM": ("sum_of_relu",),
    "features alone": ("sum",),
    "mask only": ("sum",),
}
#: The readings of the paper: A with averages sent back by shares, or A of a dense head.
PAPER = ("A, shares", "A, all samples")
#: The methods whose insertion and deletion are measured.
PERTURBED_ROWS = (
    "MIP-IN", "Grad-CAM", "LayerCAM", "LRP-ε", "IBA", "InputIBA", "SmoothGrad", "Guided Backprop",
    "random", "centre prior",
)  # fmt: skip
Method = Callable[[Tensor, Tensor], Any]
#: The methods that are also asked below the last layer; others are defined for it alone.
BELOW = (
    "Input×Gradient",
    "LRP-ε",
    "LRP-γ",
    "Excitation backprop, contrastive",
    "Guided Backprop",
    "PatternAttribution",
)
#: Steps below → features.
Features = dict[int, Tensor]


@dataclass(frozen=True)
class Chain:
    """A network as a row of steps, so that it can be cut between any two.

    Attributes:
        steps: The network, from the normalised image to the logits.
        normalise: The function that images in [0, 1] go through before the network.
        cuts: Numbers of steps below the layers that are explained. The layer of the paper, the last
            one with positions, comes last.
        fitted: The lowest cut that MIP-IN is fitted down to, if not the first one. Only max pooling
            lies below it.
        pooled: Whether an average over all positions makes the logits.
        rectified: Whether all activations are modules that Captum's DeepLift knows.
    """

    steps: nn.Sequential
    normalise: Callable[[Tensor], Tensor]
    cuts: tuple[int, ...]
    fitted: int = 0
    pooled: bool = True
    rectified: bool = False

    def above(self, cut: int) -> nn.Sequential:
        """Return the part of the network from the features at ``cut`` to the logits."""
        return self.steps[cut:].eval()


def chain(name: str, folder: Path) -> Chain:
    """Return the network ``name``; "head" is a dense one, as in VGG, on features of SqueezeNet."""
    body = "squeezenet1_0" if name == "head" else name
    model: Any
    model, normalise = pretrained.load(body, folder / "weights")
    cuts: tuple[int, ...]
    if name == "squeezenet1_0":
        steps, cuts = [*model.features, *model.classifier, nn.Flatten()], (11, 12, 13)
    elif name == "mobilenet_v2":
        steps, cuts = (
            [*model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *model.classifier],
            (14, 18, 19),
        )
    elif name == "efficientnet_lite0":
        steps = [
            model._conv_stem,
            model._bn0,
            nn.ReLU6(),
            *model._blocks,
            model._conv_head,
            model._bn1,
            nn.ReLU6(),
        ]
        steps, cuts = [*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model._fc], (14, 19, 22)
    else:
        head = heads.trained(WIDTH, heads.features(folder))
        steps, cuts = [*model.features, nn.MaxPool2d(3, 2, 1), *head], (13, 14)
    found = nn.Sequential(*steps).eval().requires_grad_(False)
    for module in found.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.inplace = False  # Captum's DeepLift needs what an activation got
    dense = name == "head"
    return Chain(
        found, normalise, cuts, 14 if dense else 0, not dense, dense or name == "squeezenet1_0"
    )


@dataclass(frozen=True)
class Photographs:
    """The images to explain and the images to fit on, normalised.

    Attributes:
        fit: Images of ImageNet's training set.
        x, labels, boxes: Images to explain, their classes, and masks of their boxes.
        choice: Numbers of the images that settings are chosen on.
        report: Numbers of the images that are reported.
    """

    fit: Tensor
    x: Tensor
    labels: Tensor
    boxes: Tensor
    choice: Tensor
    report: Tensor

    @property
    def classes(self) -> list[int]:
        """The classes of the images, those with the most images first."""
        return (
            torch.bincount(self.labels)
            .argsort(descending=True, stable=True)[: len(self.labels.unique())]
            .tolist()
        )


def photographs(
    name: str, folder: Path, normalise: Callable[[Tensor], Tensor], count: int
) -> Photographs:
    """Return ``count`` images to fit on, and images to explain.

    The latter are of the classes with the most photographs whose boxes are small.
    """
    found = photos(
        "squeezenet1_0" if name == "head" else name, folder, count, torch.Generator().manual_seed(0)
    )
    boxes = heads.boxes(folder)
    labels = heads.features(folder).test_labels if name == "head" else found.labels
    area = boxes.flatten(1).double().mean(1)
    kept = ((area > 0) & (area <= LARGEST)).nonzero().flatten()
    many = torch.bincount(labels[kept]).argsort(descending=True, stable=True)[:CLASSES]
    kept = kept[torch.isin(labels[kept], many)]
    choice, report = halves(labels[kept], torch.Generator().manual_seed(0))
    return Photographs(
        normalise(found.fit), normalise(found.test[kept]), labels[kept], boxes[kept], choice, report
    )


def halves(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the numbers of both halves, in random order, each class split evenly."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    one, other = order[::2], order[1::2]
    return one[torch.randperm(len(one), generator=generator)], other[
        torch.randperm(len(other), generator=generator)
    ]


@dataclass(frozen=True)
class Try:
    """One method in one setting.

    Attributes:
        method, where: Name of the method, and of the layer where its map is.
        reading, reduction: Kind of map, and how its channels became one.
        maps: Maps without channels (images asked, height, width).
        index: Numbers of the images asked.
        values: Accuracies (images,), NaN where there is none. Settings to choose from have them on
            the choosing half alone.
        seconds: Time of an image.
    """

    method: str
    where: str
    reading: str
    reduction: str
    maps: Tensor
    index: Tensor
    values: Tensor
    seconds: float = 0.0

    @classmethod
    def of(
        cls,
        names: tuple[str, str, str],
        reduction: Any,
        maps: Tensor,
        about: Photographs,
        index: Tensor,
        *,
        seconds: float = 0.0,
    ) -> "Try":
        """Make a try, scored on the choosing half, or on the other where ``index`` has none."""
        values = torch.full((len(about.x),), float("nan"), dtype=torch.float64)
        one = cls(
            *names,
            str(reduction),
            heat(maps, about.x[index], reduction).float(),
            index,
            values,
            seconds,
        )
        return one.scored(
            about, about.choice if torch.isin(index, about.choice).any() else about.report
        )

    def scored(self, about: Photographs, half: Tensor) -> "Try":
        """Return the try with the scores of those images of ``half`` that were asked."""
        mine = torch.isin(self.index, half)
        index, values = self.index[mine], self.values.clone()
        x, boxes = about.x[index], about.boxes[index]
        values[index] = bounding_box_accuracy(
            self.maps[mine], x, boxes=boxes, largest=LARGEST
        ).values
        return replace(self, values=values)

    def mean(self, index: Tensor) -> float:
        """Return the mean over the scored images of ``index``; NaN if none was scored."""
        return float(self.values[index].nanmean())

    def row(self, about: Photographs, best: "Try", chosen: bool) -> dict[str, Any]:
        """Return the row of the results file; ``best`` is the chosen setting of MIP-IN."""
        row: dict[str, Any] = {
            "method": self.method,
            "where": self.where,
            "reading": self.reading,
            "reduction": self.reduction,
            "chosen": chosen,
            "s an image": self.seconds,
        }
        if not self.values[about.choice].isnan().all():
            row["choosing half"] = self.mean(about.choice)
        own = self.values[about.report]
        asked = ~own.isnan()
        less, n = (best.values[about.report] - own)[asked], int(asked.sum())
        if n:
            row |= {
                "n": n,
                "accuracy": float(own[asked].mean()),
                "standard error": float(own[asked].std() / n**0.5),
            }
            row |= {
                "MIP-IN less this": float(less.mean()),
                "its standard error": float(less.std() / n**0.5),
            }
        return row


def tried(
    name: str,
    where: str,
    method: Method,
    x: Tensor,
    about: Photographs,
    *,
    index: Tensor,
    reductions: Iterable[str],
) -> Iterator[Try]:
    """Yield one method on the images ``index``; ``x`` is what it explains, images or features."""
    start = time.perf_counter()
    try:
        maps = torch.cat([method(x[part], about.labels[part]).detach() for part in index.split(10)])
    except MIPINError as error:
        print(f"{name}, {where}: {error}", flush=True)
        return
    seconds = (time.perf_counter() - start) / len(index)
    for reduction in reductions:
        yield Try.of((name, where, ""), reduction, maps, about, index, seconds=seconds)


# ---------------------------------------------------------------------------------------- methods


def gradients(model: nn.Module, steps: int, rectified: bool) -> dict[str, Method]:
    """Return Captum's gradient methods, and SmoothGrad, from the start of ``model``."""
    saliency: Any = Saliency(model)
    integrated: Any = IntegratedGradients(model)
    found: dict[str, Method] = {
        "Grads": lambda x, t: saliency.attribute(x.clone().requires_grad_(), t, False),
        "Input×Gradient": lambda x, t: InputXGradient(model).attribute(
            x.clone().requires_grad_(), t
        ),
        "SmoothGrad": SmoothGrad(model, samples=steps).attribute,
        "Integrated Gradients": lambda x, t: integrated.attribute(
            x, None, t, n_steps=steps, internal_batch_size=len(x)
        ),
    }
    if rectified:
        lift: Any = DeepLift(model)
        found["DeepLift"] = lambda x, t: lift.attribute(x.clone().requires_grad_(), target=t)
    return found


def propagated(
    model: nn.Module, fit: Tensor | None, bounds: tuple[Tensor | float, Tensor | float] | None
) -> dict[str, Method]:
    """Return the methods of this package; those with patterns if there is data to fit them on."""
    low, high = bounds or (None, None)
    methods: dict[str, Any] = {
        "LRP-ε": LRP(model),
        "LRP-γ": LRP(model, rule=Gamma(0.25)),
        "Excitation backprop, contrastive": ExcitationBackprop(model, contrastive=True),
        "Deep Taylor": DeepTaylor(model, low=low, high=high),
        "Deep Taylor, as in iNNvestigate": DeepTaylor(model, preset="innvestigate"),
        "Deconvnet": Deconvnet(model),
        "Guided Backprop": GuidedBackprop(model),
    }
    if fit is not None:
        patterns = Patterns(model).fit(fit, batch_size=20, progress=False)
        methods |= {
            "PatternNet": PatternNet(model, patterns),
            "PatternAttribution": PatternAttribution(model, patterns),
        }
    return {name: method.attribute for name, method in methods.items()}


def gradient(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Return the gradient of the logits ``t`` with respect to the input of ``model``."""
    saliency: Any = Saliency(model)
    parts = zip(x.split(16), t.split(16), strict=True)
    return torch.cat(
        [
            saliency.attribute(some.clone().requires_grad_(), own, False).detach()
            for some, own in parts
        ]
    )


def cams(model: nn.Module) -> dict[str, Method]:
    """Return Grad-CAM, LayerCAM (both before the sum over channels) and the features themselves."""
    return {
        "Grad-CAM": lambda x, t: gradient(model, x, t).mean((2, 3), keepdim=True) * x,
        "LayerCAM": lambda x, t: gradient(model, x, t).relu() * x,
        "features alone": lambda x, t: x,
        "mask only": lambda x, t: (x != 0).float(),
    }


def controls(size: int) -> dict[str, Method]:
    """Return maps that know nothing of the image."""
    generator = torch.Generator().manual_seed(0)
    away = ((torch.arange(size) - (size - 1) / 2) / size) ** 2
    return {
        "random": lambda x, t: torch.rand(len(x), size, size, generator=generator),
        "centre prior": lambda x, t: -(away[:, None] + away[None]).expand(len(x), size, size),
    }


def explained(
    inverse: ModelInverse[Any],
    layer: nn.Module | None,
    x: Tensor,
    labels: Tensor,
    local: bool = True,
) -> dict[str, Tensor]:
    """Return the maps of MIP-IN at a layer, or where ``inverse`` ends, with the forward mask there.

    Source: section 6.1.2.
    """
    parts = []
    for some, t in zip(x.split(16), labels.split(16), strict=True):
        found = inverse.explain(
            (some,), t, biases=(False, True), layer=layer, mask=True, local=local
        )
        (features,), ((a,), (s,)) = found.features, found.signals
        parts.append({"A": a, "S": s, "A × feature": a * features, "S × feature": s * features})
    return {reading: torch.cat([part[reading] for part in parts]) for reading in parts[0]}


def shares(maps: Tensor, size: int) -> Tensor:
    """Return the positive part, summed over channels, as shares of the whole, at another size."""
    found = maps.relu().sum(1, keepdim=True)
    found = nn.functional.interpolate(found, (size, size), mode="bilinear", align_corners=False)
    return found / found.sum((1, 2, 3), keepdim=True).clamp(min=1e-12)


# ------------------------------------------------------------------------------------------ table


def variants(
    net: Chain,
) -> Iterator[
    tuple[str, tuple[int, ...], Callable[[nn.Module], InverseNetwork | NeighbourInverse]]
]:
    """Yield the name, the layers to read at, and how to make the inverse."""
    if net.pooled:
        yield "shares", net.cuts, InverseNetwork
        yield "even", net.cuts[-2:], partial(InverseNetwork, pooling="even")
        return
    yield "all samples", net.cuts, InverseNetwork
    for count, ridge in ((30, 1e-3), (60, 1e-3), (60, 0.1), (100, 1e-3), (300, 1e-3)):
        yield (
            f"{count} nearest, λ {ridge:g}",
            net.cuts,
            partial(NeighbourInverse, neighbours=count, ridge=ridge),
        )


def mipin(net: Chain, about: Photographs, fit: Features, x: Features) -> Iterator[Try]:
    """Yield MIP-IN from the logit to the lowest layer, at every layer, in every variant."""
    everything, where = torch.arange(len(about.x)), places(x)
    for number, (name, cuts, make) in enumerate(variants(net)):
        start, lowest = time.perf_counter(), max(cuts[0], net.fitted)
        above = net.above(lowest)
        inverse = make(above).fit(
            fit[lowest], sorted(about.classes), batch_size=25 if net.pooled else 256, progress=False
        )
        print(
            f"MIP-IN, {name}: fitted on {len(fit[lowest])} in {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        together: dict[str, list[Tensor]] = {}
        for cut in cuts:
            start, layer = time.perf_counter(), above[cut - lowest - 1] if cut > lowest else None
            if cut > lowest or cut == cuts[0]:
                at_lowest = explained(inverse, layer, x[lowest], about.labels)
            found = (
                switched(net.steps[cut:lowest], x[cut], at_lowest) if cut < lowest else at_lowest
            )
            found["A × gradient"] = found["A"] * gradient(net.above(cut), x[cut], about.labels)
            seconds = (time.perf_counter() - start) / len(everything)
            for reading, maps in found.items():
                together.setdefault(reading, []).append(shares(maps, 28))
                for reduction in REDUCTIONS:
                    yield Try.of(
                        ("MIP-IN", where[cut], f"{reading}, {name}"),
                        reduction,
                        maps,
                        about,
                        everything,
                        seconds=seconds,
                    )
            if number == 0 and cut >= lowest:
                layer = above[cut - lowest - 1] if cut > lowest else None
                pattern = explained(inverse, layer, x[lowest], about.labels, local=False)["A"]
                for reduction in REDUCTIONS:
                    yield Try.of(
                        ("pattern only", where[cut], "A"), reduction, pattern, about, everything
                    )
        for reading, several in together.items():
            if len(several) > 1:
                names = "MIP-IN", "all layers", f"{reading}, {name}"
                yield Try.of(names, "sum_of_relu", sum(several[1:], several[0]), about, everything)


def switched(pooling: nn.Module, x: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Send signals back through max pooling by its switches (equation 8), which need no fit."""
    x = x.detach().requires_grad_()
    pooled = pooling(x)
    a, s = (
        torch.autograd.grad(pooled, x, found[reading], retain_graph=True)[0] * (x != 0)
        for reading in ("A", "S")
    )
    x = x.detach()
    return {
        "A": a.detach(),
        "S": s.detach(),
        "A × feature": a.detach() * x,
        "S × feature": s.detach() * x,
    }


def some(fit: Tensor) -> Tensor:
    """Return images to fit patterns on, drawn at random: those of the head come class by class."""
    return fit[torch.randperm(len(fit), generator=torch.Generator().manual_seed(0))[:PATTERNS]]


def at_layers(net: Chain, about: Photographs, fit: Features, x: Features) -> Iterator[Try]:
    """Yield all other methods at the same layers; at the lower ones not all of them."""
    everything = torch.arange(len(about.x))
    for cut in net.cuts:
        top, where = cut == net.cuts[-1], places(x)[cut]
        above = net.above(cut)
        others = gradients(above, 10, net.rectified) | propagated(above, some(fit[cut]), None)
        kept = [name for name in others if top or name in BELOW]
        for name, method in tqdm(
            [(name, others[name]) for name in kept] + list(cams(above).items()), desc=f"at {where}"
        ):
            yield from tried(
                name,
                where,
                method,
                x[cut],
                about,
                index=everything,
                reductions=AT_LAYERS.get(name, ("sum_of_relu", "sum_of_abs")),
            )
        for name, method in controls(x[cut].shape[-1]).items():
            yield from tried(
                name, where, method, x[cut], about, index=everything, reductions=("sum",)
            )
        if not top and cut != net.cuts[0]:
            continue
        iba = IBA(above, "input", "published" if top else "fast").estimate(fit[cut], progress=False)
        bits = partial(iba.attribute, at="layer", per_position=True)
        index = torch.cat([about.choice[:SLOW], about.report[:SLOW]])
        name = "IBA" + ", fast" * (not top)
        yield from tried(name, where, bits, x[cut], about, index=index, reductions=("sum",))


def at_pixels(net: Chain, about: Photographs) -> Iterator[Try]:
    """Yield all other methods at the pixels."""
    low, high = (net.normalise(torch.full((1, 3, 1, 1), value)) for value in (0.0, 1.0))
    others = gradients(net.steps, 16, net.rectified) | propagated(net.steps, about.fit, (low, high))
    for name, method in tqdm(others.items(), desc="at the pixels"):
        index = about.report[: SLOW if name in ("SmoothGrad", "Integrated Gradients") else None]
        yield from tried(
            name, "pixels", method, about.x, about, index=index, reductions=("sum", "sum_of_abs")
        )
    for name, method in controls(about.x.shape[-1]).items():
        yield from tried(
            name, "pixels", method, about.x, about, index=about.report, reductions=("sum",)
        )
    yield from input_iba(net, about)


def input_iba(net: Chain, about: Photographs) -> Iterator[Try]:
    """Yield mask and bits at the pixels, with the bottleneck at the lowest layer.

    There are fewer copies than published, to save time.
    """
    fast = INPUT_IBA_SETTINGS["fast"]
    few = replace(
        fast, feature=replace(fast.feature, copies=2), input=replace(fast.input, copies=2)
    )
    iba = InputIBA(net.steps, net.steps[net.cuts[0] - 1], few).estimate(
        about.fit, batch_size=10, progress=False
    )
    index = about.report[:SLOW]
    start = time.perf_counter()
    found = [
        iba.explain((about.x[i : i + 1],), about.labels[i : i + 1]).input
        for i in tqdm(index.tolist(), desc="InputIBA")
    ]
    seconds = (time.perf_counter() - start) / len(index)
    for kind, maps in (
        ("mask", [one.alpha.sigmoid() for one in found]),
        ("bits", [one.information for one in found]),
    ):
        yield Try.of(
            ("InputIBA", "pixels", f"{kind}, fast, 2 copies"),
            "sum",
            torch.cat(maps),
            about,
            index,
            seconds=seconds,
        )


def mipin_at_pixels(net: Chain, about: Photographs, classes: int, count: int) -> Iterator[Try]:
    """Yield MIP-IN at the pixels, for the classes with the most photographs."""
    targets = about.classes[:classes]
    index = torch.isin(about.labels, torch.tensor(targets)).nonzero().flatten()
    start = time.perf_counter()
    inverse = InverseNetwork(net.steps).fit(
        about.fit[:count], targets, batch_size=10, progress=False
    )
    print(f"MIP-IN, whole network: fitted in {time.perf_counter() - start:.0f} s", flush=True)
    found = explained(inverse, None, about.x[index], about.labels[index])
    found["A × gradient"] = found["A"] * gradient(net.steps, about.x[index], about.labels[index])
    for reading, maps in found.items():
        for reduction in REDUCTIONS:
            yield Try.of(
                ("MIP-IN, whole network", "pixels", f"{reading}, shares"),
                reduction,
                maps,
                about,
                index,
            )


def best(tries: list[Try], about: Photographs) -> list[Try]:
    """Return the best setting of each method on the choosing half, or else on the other half."""
    found: dict[tuple[str, bool], Try] = {}
    for one in tries:
        half = about.report if one.values[about.choice].isnan().all() else about.choice
        key = one.method, one.where == "pixels"
        if key not in found or one.mean(half) > found[key].mean(half):
            found[key] = one
    return list(found.values())


def perturbations(one: Try, net: Chain, about: Photographs) -> dict[str, float]:
    """Measure insertion and deletion, an eighth of the pixels at a time."""
    index = about.report[:SLOW]
    maps = one.maps[(one.index[None] == index[:, None]).long().argmax(1)]
    x, step = about.x[index], about.x.shape[2] * about.x.shape[3] // 8
    return {
        metric.__name__: metric(
            maps, x, about.labels[index].tolist(), model=net.steps, step=step
        ).mean
        for metric in (insertion, deletion)
    }


def run(name: str, folder: Path, count: int, classes: int) -> None:
    """Measure table 2 for one network.

    Args:
        name: The network, see :func:`chain`.
        folder: The folder with the photographs and weights.
        count: Images to fit on; the dense head takes all there are.
        classes: Number of classes for MIP-IN on the whole network.
    """
    net = chain(name, folder)
    about = photographs(name, folder, net.normalise, count)
    x = features(net, about.x)
    fit = features(net, about.fit) | ({14: heads.features(folder).train} if name == "head" else {})
    tries = [*mipin(net, about, fit, x), *at_layers(net, about, fit, x), *at_pixels(net, about)]
    tries += mipin_at_pixels(net, about, classes, min(count, WHOLE))
    shown = best(tries, about)
    top = places(x)[net.cuts[-1]]
    paper = [
        one for one in tries if one.method == "MIP-IN" and one.where == top and one.reading in PAPER
    ]
    told = {id(one): one.scored(about, about.report) for one in [*shown, *paper]}
    first = next(told[id(one)] for one in shown if one.method == "MIP-IN")
    rows = []
    for one in tries:
        row = told.get(id(one), one).row(about, first, any(one is other for other in shown))
        if (
            row["chosen"]
            and one.method in PERTURBED_ROWS
            and torch.isin(about.report[:SLOW], one.index).all()
        ):
            row |= perturbations(one, net, about)
        rows.append(row)
    with torch.no_grad():
        logits = torch.cat([net.steps(part) for part in about.x[about.report].split(10)])
    labels = about.labels[about.report]
    counts = {
        "fit": len(fit[max(net.cuts[0], net.fitted)]),
        "fit, whole network": min(count, WHOLE),
        "fit, patterns": count,
    }
    if name == "head":
        counts |= {"width": WIDTH, "fit, patterns at 7 x 7": PATTERNS}
    write(
        f"paper-boxes-{name}", rows, **PROTOCOL, **counts, **{"choosing half": len(about.choice)},
        n=len(labels), network=name, classes=sorted(about.classes), perturbed=SLOW,
        accuracy=float((logits.argmax(1) == labels).double().mean()),
        **{"positive logits": float((logits.gather(1, labels[:, None]) > 0).double().mean())},
    )  # fmt: skip
    print(show(sorted((row for row in rows if row["chosen"]), key=lambda row: -row["accuracy"])))


def features(net: Chain, x: Tensor) -> Features:
    """Return the features of normalised images at all cuts."""
    found: Features = {}
    below = 0
    for cut in net.cuts:
        with torch.no_grad():
            x = torch.cat([net.steps[below:cut](part) for part in x.split(10)])
        found[cut], below = x, cut
    return found


def places(x: Features) -> dict[int, str]:
    """Return names of the layers: channels, height and width.

    Of two layers with the same shape, the name of the lower one ends with ", lower".
    """
    names: dict[int, str] = {}
    for cut in sorted(x, reverse=True):
        name = " x ".join(map(str, x[cut].shape[1:]))
        names[cut] = name + ", lower" * sum(other.startswith(name) for other in names.values())
    return names
