"""Does the attribution lie on the object: boxes, points and mosaics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.errors import InputError
from captum_mipin.metrics.common import (
    Examples,
    Method,
    Reduction,
    at_least,
    described,
    explain,
    finite_rows,
    heat,
    hottest_first,
    model_of,
    option,
    raw_outputs,
    resized,
    seeded,
    uniform,
)  # fmt: skip
from captum_mipin.metrics.result import Result

#: Masks (examples, height, width), or for each example one or more boxes (left, top, right, bottom) in pixels, right and bottom
#: not included.
Boxes = Tensor | Sequence[Any]


def box_masks(boxes: Boxes, size: Sequence[int]) -> Tensor:
    """Where the boxes are: booleans (examples, height, width), the union of each example's boxes.

    Args:
        boxes: Masks, boolean or with entries above 0 inside, also (examples, 1, height, width); or for each example one box, or
            a list of boxes, (left, top, right, bottom) in pixels, rounded. An empty list gives an empty mask.
        size: Height and width.

    Raises:
        InputError: Neither of both, masks of another size, or a box that is not finite.

    Examples:
        >>> box_masks([(0, 0, 2, 1), [(1, 1, 3, 2), (0, 0, 1, 1)], []], (2, 3)).long().tolist()
        [[[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]]]
    """
    height, width = size
    if (
        isinstance(boxes, Tensor)
        and boxes.ndim > 2
        and (boxes.dtype == torch.bool or boxes.shape[-1] != 4 or width == 4)
    ):
        masks = boxes.squeeze(1) if boxes.ndim == 4 else boxes
        if tuple(masks.shape[1:]) != (height, width):
            raise InputError(
                f"the masks have shape {tuple(boxes.shape)}, expected (examples, {height}, {width})"
            )
        return masks > 0
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, one in zip(masks, boxes, strict=True):
        rows = torch.as_tensor(one, dtype=torch.float64).cpu()
        rows = (
            rows.reshape(0, 4)
            if rows.numel() == 0
            else rows.reshape(1, 4)
            if tuple(rows.shape) == (4,)
            else rows
        )
        if rows.ndim != 2 or rows.shape[1] != 4 or not rows.isfinite().all():
            raise InputError(
                f"a box is {one!r}, expected finite numbers (left, top, right, bottom), or a list of such"
            )
        for left, top, right, bottom in rows.round().long().clamp(min=0).tolist():
            mask[top:bottom, left:right] = True
    return masks


def bounding_box_accuracy(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    boxes: Boxes,
    largest: float = 0.33,
    ties: Literal["expected", "random", "first"] = "expected",
    reduction: Reduction = "sum",
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Of the n hottest pixels, the share inside the box, which has n pixels (section 6.3; Schulz et al., ICLR 2020).

    Maps of another size, such as those of a layer, are interpolated to that of the inputs. The part "tied" says which share of
    the n pixels ties decided on.

    Args:
        method: See :data:`~captum_mipin.metrics.Method`.
        inputs: Images (examples, channels, height, width).
        target: As Captum takes it.
        boxes: See :func:`box_masks`.
        largest: Examples whose boxes cover more than this share of the image are not scored, as in the paper.
        ties: Among pixels of the same heat at the threshold: the score "expected" of a random choice, a "random" choice, or
            the "first" ones, row by row.
        reduction: Of channels, see :func:`~captum_mipin.metrics.common.heat`.
        additional_forward_args: Further arguments of the model.
        generator: For ties="random".
        batch_size: Examples explained at once.

    Returns:
        Shares in [0, 1]; a map without information has the area of the box. Unscored: "empty" and "large" boxes, "NaN".

    Examples:
        >>> maps = torch.tensor([[[[9.0, 1.0], [2.0, 0.0]]]])
        >>> bounding_box_accuracy(maps, torch.ones(1, 1, 2, 2), boxes=[(0, 0, 2, 1)], largest=0.5).mean
        0.5
    """
    option("ties", ties, ("expected", "random", "first"))
    examples, warm, masks, maps = _looked_at("bounding_box_accuracy", method, inputs, target, boxes, reduction,
                                             additional_forward_args, batch_size)  # fmt: skip
    flat, inside = warm.flatten(1).nan_to_num(), masks.flatten(1).to(warm.device)
    n = inside.sum(1)
    if ties == "expected":
        values, tied = _expected_share(flat, inside, n)
    else:
        _, tied = _expected_share(flat, inside, n)
        random = (
            uniform(seeded(generator), *flat.shape, device=flat.device)
            if ties == "random"
            else torch.zeros_like(flat)
        )
        values = (
            inside.gather(1, hottest_first(flat, random))
            .cumsum(1)
            .gather(1, (n - 1).clamp(min=0)[:, None])[:, 0]
            .double()
            / n
        )
    settings = described(method, examples, maps, reduction=reduction, ties=ties, largest=largest)
    reasons = {"empty": n == 0, "large": n > largest * inside.shape[1], "NaN": ~finite_rows(warm)}
    parts = {"tied": Result.of("tied", tied, "neither", settings, reasons)}
    return Result.of("bounding box accuracy", values, "higher", settings, reasons, parts=parts)


def pointing_game(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    boxes: Boxes,
    tolerance: float = 15,
    average: Literal["samples", "classes"] = "samples",
    reduction: Reduction = "sum",
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Whether the hottest pixel is at most ``tolerance`` pixels from the box (Zhang et al., ECCV 2016).

    Of several hottest pixels, the share that is. TorchRay's tolerance of 15 asks for less than 15.

    Args:
        method, inputs, target, boxes, reduction, additional_forward_args, batch_size: As for :func:`bounding_box_accuracy`.
        tolerance: In pixels of the inputs, Euclidean.
        average: Over "samples", or over each class of ``target`` first (one an example).
        generator: Not needed.

    Returns:
        1 for a hit, 0 for a miss, in between for ties. Unscored: "empty" boxes, "NaN".

    Examples:
        >>> maps = torch.eye(4).view(1, 1, 4, 4) * torch.arange(4.0)
        >>> [pointing_game(maps, maps, boxes=[(0, 0, 2, 2)], tolerance=t).mean for t in (2, 3)]
        [0.0, 1.0]
    """
    option("average", average, ("samples", "classes"))
    at_least("tolerance", tolerance, 0)
    examples, warm, masks, maps = _looked_at("pointing_game", method, inputs, target, boxes, reduction,
                                             additional_forward_args, batch_size)  # fmt: skip
    near = _near(masks, tolerance).flatten(1).to(warm.device)
    flat = warm.flatten(1)
    hottest = flat == flat.amax(1, keepdim=True)
    values = (hottest & near).sum(1).double() / hottest.sum(1)
    settings = described(
        method,
        examples,
        maps,
        reduction=reduction,
        tolerance=tolerance,
        average=average,
        ties="expected",
    )
    reasons = {"empty": ~masks.flatten(1).any(1), "NaN": ~finite_rows(warm)}
    return Result.of(
        "pointing game", values, "higher", settings, reasons, classes=_labels(examples, average)
    )


def effective_heat_ratio(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    boxes: Boxes,
    largest: float = 0.33,
    threshold: float = 0.1,
    weighted: bool = True,
    reduction: Reduction = "sum",
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Heat inside the box ÷ number of hot pixels, over all thresholds (EHR; Zhang et al., NeurIPS 2021).

    Heat is divided by its maximum, what is below ``threshold`` dropped. For each quantile q = 0, 0.1, …, 1 of the rest, the hot
    pixels are those of at least min(q-quantile, 0.99); the score is the area under the ratios.

    Args:
        method, inputs, target, boxes, largest, reduction, additional_forward_args, batch_size: As for
            :func:`bounding_box_accuracy`.
        threshold: Of heat that counts, relative to the hottest pixel.
        weighted: Heat inside the box, as published; or the number of hot pixels there.
        generator: Not needed.

    Returns:
        In [0, 1]. Unscored: "empty" and "large" boxes, "no heat" where nothing is positive, "NaN".

    Examples:
        >>> maps = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
        >>> effective_heat_ratio(maps, maps, boxes=[(0, 0, 1, 2)], largest=0.5).mean
        0.5
    """
    if not 0 <= threshold < 1:
        raise InputError(f"threshold={threshold!r} must be in [0, 1)")
    examples, warm, masks, maps = _looked_at("effective_heat_ratio", method, inputs, target, boxes, reduction,
                                             additional_forward_args, batch_size)  # fmt: skip
    flat, inside = warm.flatten(1).nan_to_num(), masks.flatten(1).to(warm.device)
    peak = flat.amax(1)
    curves = torch.stack(
        [_heat_ratios(one, box, threshold, weighted) for one, box in zip(flat, inside, strict=True)]
    )
    values = (curves[:, 1:] + curves[:, :-1]).sum(1) / 20
    settings = described(method, examples, maps, reduction=reduction, largest=largest, threshold=threshold, weighted=weighted,
                         normalisation="by the maximum")  # fmt: skip
    n = inside.sum(1)
    reasons = {
        "empty": n == 0,
        "large": n > largest * inside.shape[1],
        "NaN": ~finite_rows(warm),
        "no heat": peak <= 0,
    }
    return Result.of("effective heat ratio", values, "higher", settings, reasons, curves=curves)


@dataclass(frozen=True)
class Mosaics:
    """Mosaics of n × n images.

    Attributes:
        n: Images along each side.
        x: (mosaics, channels, n · height, n · width).
        cells: (mosaics,) the cell to be found, row by row.
        targets: (mosaics,) its class.
    """

    n: int
    x: Tensor
    cells: Tensor
    targets: Tensor


def mosaics(
    model: Callable[..., Any],
    images: Tensor,
    labels: Tensor | Sequence[int],
    n: int = 2,
    count: int = 100,
    *,
    confidence: float = 0.99,
    classes: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 100,
) -> Mosaics:
    """Mosaics of images of different classes, each of which the model recognises with ``confidence``.

    Args:
        model: Returns logits (examples, classes).
        images: (examples, channels, height, width)
        labels: Of each image.
        n: Images along each side.
        count: Number of mosaics.
        confidence: The least softmax probability of an image's label.
        classes: Those to be found, each in turn; by default all.
        generator: Chooses images and places.
        batch_size: Images given to the model at once.

    Raises:
        InputError: Too few classes, or none of ``classes``, have an image that is recognised.
    """
    generator = seeded(generator)
    labels = torch.as_tensor(labels).long().cpu()
    examples = Examples.of(images, labels)
    probabilities = torch.cat(
        [raw_outputs(model, part).softmax(1).cpu() for part in examples.chunks(batch_size)]
    )
    sure = probabilities.gather(1, labels[:, None])[:, 0] >= confidence
    of = {int(label): (sure & (labels == label)).nonzero().flatten() for label in labels.unique()}
    of = {label: rows for label, rows in of.items() if len(rows)}
    wanted = [label for label in (of if classes is None else classes) if label in of]
    if len(of) < n * n or not wanted:
        raise InputError(
            f"{len(of)} classes have an image recognised with confidence {confidence:g}, {len(wanted)} of them to be found: "
            f"a mosaic of {n} x {n} needs {n * n}, and at least one to be found"
        )

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator, device=generator.device))

    fields, cells, targets = [], [], []
    for number in range(count):
        found = wanted[number % len(wanted)]
        others = [label for label in of if label != found]
        order = torch.randperm(len(others), generator=generator, device=generator.device)
        drawn = [others[i] for i in order[: n * n - 1].tolist()]
        cell = draw(n * n)
        drawn.insert(cell, found)
        tiles = [images[int(of[label][draw(len(of[label]))])] for label in drawn]
        fields.append(
            torch.cat([torch.cat(tiles[row * n : (row + 1) * n], 2) for row in range(n)], 1)
        )
        cells.append(cell)
        targets.append(found)
    return Mosaics(n, torch.stack(fields), torch.tensor(cells), torch.tensor(targets))


def grid_pointing_game(
    method: Method,
    inputs: Tensor | Mosaics,
    target: Any = None,
    *,
    n: int = 2,
    count: int = 100,
    confidence: float = 0.99,
    model: Callable[..., Any] | None = None,
    reduction: Reduction = "relu_of_sum",
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Share of the positive attribution that lies in the cell of the class asked for (Rao et al., CVPR 2022).

    Mosaics of n × n images of different classes are explained for one of these classes; chance is 1 / n². The network has to
    take images n times as large. Where cells share a row or column of the map, each counts it (adaptive pooling).

    Args:
        method: See :data:`~captum_mipin.metrics.Method`; ask every method at the same layer.
        inputs: Single images, to be put together, or :func:`mosaics` made before.
        target: The class of each image, an integer tensor or list; not needed for mosaics made before.
        n, count, confidence: See :func:`mosaics`.
        model: What is explained; by default the method's ``forward_func``.
        reduction: Of channels. What remains negative counts as 0.
        additional_forward_args: Further arguments of the model, for each mosaic; not for making them.
        generator: Chooses the mosaics.
        batch_size: Mosaics explained at once.

    Returns:
        Shares in [0, 1], 0 where nothing is positive; the part "nothing positive" counts those. Unscored: "NaN".

    Examples:
        >>> grid = Mosaics(2, torch.zeros(1, 1, 4, 4), torch.tensor([1]), torch.tensor([0]))
        >>> maps = torch.arange(16.0).view(1, 1, 4, 4)
        >>> grid_pointing_game(maps, grid).mean == (2 + 3 + 6 + 7) / 120
        True
    """
    made = {} if isinstance(inputs, Mosaics) else {"confidence": confidence}
    if not isinstance(inputs, Mosaics):
        if not isinstance(target, (Tensor, list)):
            raise InputError(
                f"target is {target!r}, expected the class of each image: an integer tensor or a list"
            )
        inputs = mosaics(
            model_of(method, model),
            inputs,
            target,
            n,
            count,
            confidence=confidence,
            generator=generator,
        )
    examples = Examples.of(inputs.x, inputs.targets.tolist(), additional_forward_args)
    maps = explain(method, examples, batch_size)
    warm = heat(_image(maps, "grid_pointing_game"), inputs.x, reduction).clamp(min=0)
    cells = F.adaptive_avg_pool2d(warm.unsqueeze(1), inputs.n).flatten(1)
    total = cells.sum(1)
    share = cells.gather(1, inputs.cells.to(cells.device)[:, None])[:, 0] / total
    values = torch.where(total == 0, 0.0, share)
    settings = described(method, examples, maps, reduction=reduction, n=inputs.n, **made)
    reasons = {"NaN": ~finite_rows(warm)}
    parts = {
        "nothing positive": Result.of(
            "nothing positive", (total == 0).double(), "neither", settings, reasons
        )
    }
    return Result.of("grid pointing game", values, "higher", settings, reasons, parts=parts)


def _looked_at(
    metric: str,
    method: Method,
    inputs: Tensor,
    target: Any,
    boxes: Boxes,
    reduction: Reduction,
    additional_forward_args: Any,
    batch_size: int | None,
) -> tuple[Examples, Tensor, Tensor, tuple[Tensor, ...]]:
    """Examples, heat at the size of the images, masks, and the maps as they came."""
    examples = Examples.of(inputs, target, additional_forward_args)
    x = examples.one(metric)
    if x.ndim != 4:
        raise InputError(
            f"{metric} needs images (examples, channels, height, width), found inputs of shape {tuple(x.shape)}"
        )
    masks = box_masks(boxes, x.shape[2:])
    if len(masks) != len(x):
        raise InputError(f"there are boxes for {len(masks)} images, but {len(x)} images")
    maps = explain(method, examples, batch_size)
    return (
        examples,
        resized(heat(_image(maps, metric), x, reduction), x.shape[2:]),
        masks.cpu(),
        maps,
    )


def _image(maps: tuple[Tensor, ...], metric: str) -> Tensor:
    if len(maps) != 1 or not 3 <= maps[0].ndim <= 4:
        raise InputError(
            f"{metric} needs one map an image, (examples, channels, height, width) or without channels; found shapes "
            f"{', '.join(str(tuple(one.shape)) for one in maps)}"
        )
    return maps[0]


def _expected_share(flat: Tensor, inside: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the n hottest inside, expected over ties broken at random, and the share of n that these decide."""
    at = flat.sort(1, descending=True).values.gather(1, (n - 1).clamp(min=0)[:, None])
    above, tie = flat > at, flat == at
    free = (n - above.sum(1)).double()  # places left for the pixels that tie
    taken = free / tie.sum(1)
    values = ((above & inside).sum(1) + taken * (tie & inside).sum(1)) / n
    return values, torch.where(tie.sum(1) > free, free, 0.0) / n


def _near(masks: Tensor, tolerance: float) -> Tensor:
    """Which pixels are at most ``tolerance`` from the mask."""
    reach = int(min(tolerance, max(masks.shape[1:]) * 1.5))  # farther than any pixel
    away = torch.arange(-reach, reach + 1)
    disk = (away[:, None] ** 2 + away**2 <= tolerance**2).float()
    return F.conv2d(masks[:, None].float(), disk[None, None], padding=reach)[:, 0] > 0.5


def _heat_ratios(warm: Tensor, inside: Tensor, threshold: float, weighted: bool) -> Tensor:
    """(11,) of one map: heat inside the box ÷ hot pixels, for each quantile."""
    quantiles = torch.linspace(0, 1, 11, dtype=torch.float64, device=warm.device)
    warm = warm / warm.max()
    counts = warm >= threshold
    if not counts.any() or not warm.isfinite().all():
        return torch.full_like(quantiles, torch.nan)
    ordered = warm[counts].sort().values
    place = quantiles * (len(ordered) - 1)
    low, share = place.floor().long(), place.frac()
    levels = torch.lerp(ordered[low], ordered[(low + 1).clamp(max=len(ordered) - 1)], share).clamp(
        max=0.99
    )
    hot = (warm >= levels[:, None]) & counts
    return (hot * inside * (warm if weighted else 1)).sum(1) / hot.sum(1)


def _labels(examples: Examples, average: str) -> Tensor | None:
    if average == "samples":
        return None
    if not isinstance(examples.target, (Tensor, list)):
        raise InputError("average='classes' needs a target for each example")
    numbers = {target: number for number, target in enumerate(dict.fromkeys(examples.targets))}
    return torch.tensor([numbers[target] for target in examples.targets])
