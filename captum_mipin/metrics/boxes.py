"""Localization by boxes: how much of a map's heat lies in the box around an object."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_mipin.calls import explained
from captum_mipin.errors import ChanceWarning, InputError
from captum_mipin.metrics.case import Case, Method, Options
from captum_mipin.metrics.examples import check_boxes
from captum_mipin.metrics.maps import Reduction, dilated, heat, hottest_first, resized
from captum_mipin.metrics.result import Result, class_numbers, finite_rows
from captum_mipin.options import check_choice, check_number

#: Masks (examples, height, width); or per example one or more boxes (left, top, right, bottom) in
#: pixels, where right and bottom are the first pixels outside the box.
Boxes = Tensor | Sequence[Any]

#: The published pointing game: a tolerance of 15 pixels if the image's shorter side has 224 pixels.
_PROTOCOL_TOLERANCE, _PROTOCOL_SIDE = 15, 224
#: ``pointing_game`` warns if the expected score of random maps is above this number.
_HIGHEST_CHANCE = 0.9


def box_masks(boxes: Boxes, size: Sequence[int]) -> Tensor:
    """Return booleans (examples, height, width), True for pixels in one of the example's boxes.

    Args:
        boxes: Masks (examples, height, width) or (examples, 1, height, width), boolean, or numbers
            that are positive inside the object; or per example one box (left, top, right, bottom)
            in pixels, or a list of such boxes. Positions in boxes are rounded. An empty list gives
            an empty mask.
        size: Height and width of the images, in pixels.

    Raises:
        InputError: The boxes have no such form, masks do not have the size of the images, or a
            position in a box is not finite.

    Examples:
        >>> box_masks([(0, 0, 2, 1), [(1, 1, 3, 2), (0, 0, 1, 1)], []], (2, 3)).long().tolist()
        [[[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]]]
    """
    height, width = size
    # a tensor (examples, boxes, 4) can also be masks of width 4: it is, for images 4 pixels wide
    if (
        isinstance(boxes, Tensor)
        and boxes.ndim > 2
        and (boxes.dtype == torch.bool or boxes.shape[-1] != 4 or width == 4)
    ):
        masks = boxes.squeeze(1) if boxes.ndim == 4 else boxes
        if tuple(masks.shape[1:]) != (height, width):
            raise InputError(
                f"the masks have shape {tuple(boxes.shape)}, expected (examples, {height}, "
                f"{width}): resize the masks to the images"
            )
        return masks > 0
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, example_boxes in zip(masks, boxes, strict=True):
        try:
            rows = torch.as_tensor(example_boxes, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError):  # no numbers, or lists of several lengths
            rows = torch.full((1, 4), torch.nan)
        # no box, or one box without a list around it
        if rows.numel() == 0 or tuple(rows.shape) == (4,):
            rows = rows.reshape(-1, 4)
        if rows.ndim != 2 or rows.shape[1] != 4 or not rows.isfinite().all():
            raise InputError(
                f"the box of an example is {example_boxes!r}, expected four finite numbers (left, "
                "top, right, bottom), or a list of such boxes: pass boxes in pixels, and an empty "
                "list for an image without one"
            )
        check_boxes(rows, example_boxes)
        for left, top, right, bottom in rows.round().long().clamp(min=0).tolist():
            mask[top:bottom, left:right] = True
    return masks


@explained
def bounding_box_accuracy(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    boxes: Boxes,
    largest: float = 0.33,
    ties: Literal["expected", "random", "first"] = "expected",
    reduction: Reduction = "sum",
    **options: Unpack[Options],
) -> Result:
    """Return the share of the n hottest pixels that lie in the box, which has n pixels.

    Maps whose size differs from the inputs, such as maps of a layer, are interpolated. The part
    "tied" is the share of the n pixels that are chosen among pixels of equal heat.

    Args:
        method: Any method.
        inputs: Images (examples, channels, height, width).
        target: The class, as Captum takes it.
        boxes: Masks or boxes, see :func:`box_masks`.
        largest: Largest share of the image that a box may cover; larger boxes get no score.
        ties: Choice among pixels of equal heat if not all of them are among the n hottest:
            "expected" for the expected score of a random choice, "random" for a random choice,
            "first" for the first pixels, row by row.
        reduction: Reduction over channels, see :func:`~captum_mipin.metrics.maps.heat`.
        **options: See :class:`~captum_mipin.metrics.case.Options`.

    Returns:
        Shares in [0, 1]; the expected score of a random map is the share of the image that the box
        covers. Reasons for no score: "empty" boxes, "large" boxes, "NaN".

    Source: Section 6.3; Schulz et al., ICLR 2020.

    Examples:
        >>> maps, x = torch.tensor([[[[9.0, 1.0], [2.0, 0.0]]]]), torch.ones(1, 1, 2, 2)
        >>> bounding_box_accuracy(maps, x, boxes=[(0, 0, 2, 1)], largest=0.5).mean
        0.5
    """
    check_choice("ties", ties, ("expected", "random", "first"))
    case = Case.of(method, inputs, target, **options)
    heats, masks = _heat_and_masks(case, boxes, reduction)
    flat, inside = heats.flatten(1).nan_to_num(), masks.flatten(1)
    n = inside.sum(1)
    # box accuracy = |{n hottest pixels} ∩ box| / n, n = |box|
    values, tied = _expected_share(flat, inside, n)
    if ties != "expected":
        order = case.uniform(*flat.shape).to(flat) if ties == "random" else torch.zeros_like(flat)
        # hits[k - 1] = number of the k hottest pixels that lie in the box; k = n gives the score
        hits = inside.gather(1, hottest_first(flat, order)).cumsum(1)
        values = hits.gather(1, (n - 1).clamp(min=0)[:, None])[:, 0].double() / n
    settings = case.settings(case.maps, reduction=reduction, ties=ties, largest=largest)
    unscored = _unscored(heats, masks, largest)
    parts = {"tied": Result.of("tied", tied, "neither", settings, unscored)}
    return Result.of("bounding box accuracy", values, "higher", settings, unscored, parts=parts)


@explained
def pointing_game(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    boxes: Boxes,
    tolerance: float | None = None,
    average: Literal["samples", "classes"] = "samples",
    reduction: Reduction = "sum",
    **options: Unpack[Options],
) -> Result:
    """Return 1 for a map whose hottest pixel is at most ``tolerance`` pixels from the box, else 0.

    If several pixels have the largest heat, the score is the share of them that are near the box.

    Args:
        method, inputs, target, boxes, reduction, options: As for :func:`bounding_box_accuracy`.
        tolerance: Largest distance of a hit from the box, in pixels of the inputs; by default
            15 / 224 of the inputs' shorter side: 15 pixels for images of 224 x 224, the published
            tolerance. TorchRay counts only distances less than the tolerance.
        average: "samples", the mean over examples; or "classes", the mean over the means of the
            classes of ``target``.

    Returns:
        Hits in [0, 1]. Reasons for no score: "empty" boxes, "NaN".

    Warns:
        ChanceWarning: The expected score of a random map is above 0.9.

    Source: Zhang et al., ECCV 2016; Fong et al., ICCV 2019 (TorchRay).

    Examples:
        >>> maps = torch.zeros(1, 1, 8, 8)
        >>> maps[0, 0, 3, 3] = 1
        >>> [pointing_game(maps, maps, boxes=[(0, 0, 2, 2)], tolerance=t).mean for t in (2, 3)]
        [0.0, 1.0]
    """
    check_choice("average", average, ("samples", "classes"))
    if tolerance is not None:
        check_number("tolerance", tolerance, finite=False)
    case = Case.of(method, inputs, target, **options)
    heats, masks = _heat_and_masks(case, boxes, reduction)
    if tolerance is None:
        # tolerance = 15 pixels · shorter side / 224 pixels
        tolerance = _PROTOCOL_TOLERANCE * min(masks.shape[1:]) / _PROTOCOL_SIDE
    hottest, near = heats == heats.amax((1, 2), keepdim=True), dilated(masks, tolerance)
    # pointing game = |{hottest pixels} ∩ {pixels near the box}| / |{hottest pixels}|
    values = (hottest & near).sum((1, 2)).double() / hottest.sum((1, 2))
    classes = _classes_of(case) if average == "classes" else None
    settings = case.settings(
        case.maps, reduction=reduction, tolerance=tolerance, average=average, ties="expected"
    )
    unscored = _unscored(heats, masks)
    # E[hit of a random map] = |{pixels near the box}| / |{pixels}|
    share = near.flatten(1).double().mean(1)
    chance = Result.of("chance", share, "neither", {}, unscored, classes=classes).mean
    if chance > _HIGHEST_CHANCE:
        warnings.warn(_chance_text(chance, tolerance, masks), ChanceWarning, stacklevel=3)
    return Result.of("pointing game", values, "higher", settings, unscored, classes=classes)


def _classes_of(case: Case) -> Tensor:
    """Return integers (examples,), the class of each example. Raise InputError without a list."""
    if not isinstance(case.examples.target, (Tensor, list)):
        raise InputError(
            f"target is {case.examples.target!r}, but average='classes' needs a target for each "
            "example: pass a list"
        )
    return class_numbers(case.examples.targets)


def _chance_text(chance: float, tolerance: float, masks: Tensor) -> str:
    """Return the text of a ChanceWarning.

    Args:
        chance: Expected score of a random map.
        tolerance: Tolerance of the pointing game, in pixels.
        masks: Masks of the boxes (examples, height, width).
    """
    return (
        f"a random map scores {chance:.3g} in this pointing game: the boxes with a tolerance of "
        f"{tolerance:g} cover nearly all of images of {masks.shape[1]} x {masks.shape[2]} pixels. "
        "Expected a score of at most 0.9: pass a smaller tolerance= or smaller boxes"
    )


@explained
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
    **options: Unpack[Options],
) -> Result:
    """Return the effective heat ratio (EHR): heat of hot pixels in the box / number of hot pixels.

    Heat is divided by its maximum, and heat below ``threshold`` is ignored. For each quantile q of
    the remaining heat, q = 0, 0.1, ..., 1, a pixel is hot if its heat is at least
    min(q-quantile, 0.99). This gives one ratio per q, stored in ``curves``. The score is the area
    under this curve.

    Args:
        method, inputs, target, boxes, largest, reduction, options: As for
            :func:`bounding_box_accuracy`.
        threshold: Least heat that counts, as a share of the maximum, in [0, 1).
        weighted: True to sum the heat in the box, as published; False to count the hot pixels.

    Returns:
        Areas in [0, 1]. Reasons for no score: "empty" boxes, "large" boxes, "no heat" for maps
        without positive values, "NaN".

    Source: Zhang et al., NeurIPS 2021.

    Examples:
        >>> maps = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
        >>> effective_heat_ratio(maps, maps, boxes=[(0, 0, 1, 2)], largest=0.5).mean
        0.5
    """
    if not 0 <= threshold < 1:
        raise InputError(
            f"threshold={threshold!r}, expected a number in [0, 1): pass for example 0.1"
        )
    case = Case.of(method, inputs, target, **options)
    heats, masks = _heat_and_masks(case, boxes, reduction)
    flat = heats.flatten(1).nan_to_num()
    pairs = zip(flat, masks.flatten(1), strict=True)
    curves = torch.stack([_heat_ratios(heat, box, threshold, weighted) for heat, box in pairs])
    settings = case.settings(
        case.maps,
        reduction=reduction,
        largest=largest,
        threshold=threshold,
        weighted=weighted,
        normalisation="by the maximum",
    )
    unscored = {**_unscored(heats, masks, largest), "no heat": flat.amax(1) <= 0}
    # EHR = ∫ ratio(q) dq over the quantiles q, by the trapezoidal rule
    values = (curves[:, 1:] + curves[:, :-1]).sum(1) / 20
    return Result.of("effective heat ratio", values, "higher", settings, unscored, curves=curves)


def image_masks(boxes: Boxes, x: Tensor) -> Tensor:
    """Return the masks of boxes for images ``x``.

    Raises:
        InputError: ``x`` does not contain images, or the boxes do not fit the images.
    """
    if x.ndim != 4:
        raise InputError(
            f"inputs have shape {tuple(x.shape)}, but boxes need images (images, channels, height, "
            "width): pass images, or a metric without boxes"
        )
    masks = box_masks(boxes, x.shape[2:])
    if len(masks) != len(x):
        raise InputError(
            f"there are boxes for {len(masks)} images, but {len(x)} images: pass one entry of "
            "boxes= per image"
        )
    return masks


def _heat_and_masks(case: Case, boxes: Boxes, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Return heat and the masks of the boxes, both (examples, height, width) on one device.

    Raises:
        InputError: Inputs, maps and boxes do not fit each other.
    """
    x = case.examples.x
    masks = image_masks(boxes, x)
    heats = resized(heat(image_map(case.maps), x, reduction), x.shape[2:])
    return heats, masks.to(heats.device)


def _unscored(heats: Tensor, masks: Tensor, largest: float = 1.0) -> dict[str, Tensor]:
    """Return reason -> booleans (examples,), True for examples that get no score for this reason.

    Args:
        heats: Heat (examples, height, width).
        masks: Masks of the boxes (examples, height, width).
        largest: Largest share of the image that a box may cover.
    """
    n = masks.flatten(1).sum(1)
    large = n > largest * masks[0].numel()
    return {"empty": n == 0, "large": large, "NaN": ~finite_rows(heats)}


def image_map(maps: tuple[Tensor, ...]) -> Tensor:
    """Return the only tensor of maps. Raise InputError if the maps are not one map per image."""
    if len(maps) != 1 or not 3 <= maps[0].ndim <= 4:
        raise InputError(
            f"the maps have shape {', '.join(str(tuple(m.shape)) for m in maps)}, but this metric "
            "needs one map per image, (examples, channels, height, width) or (examples, height, "
            "width): pass a method that gives such maps"
        )
    return maps[0]


def _expected_share(flat: Tensor, inside: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expected share of the n hottest pixels in the box, and the share of tied pixels.

    Args:
        flat: Heat (examples, pixels).
        inside: Booleans (examples, pixels), True in the box.
        n: Number of hottest pixels (examples,).

    Returns:
        Expected share (examples,) of the n pixels that lie in the box, if the choice among pixels
        of equal heat is random; share (examples,) of the n pixels that are chosen at random.
    """
    threshold = flat.sort(1, descending=True).values.gather(1, (n - 1).clamp(min=0)[:, None])
    above, tied = flat > threshold, flat == threshold
    # free = number of tied pixels that belong to the n hottest
    free = (n - above.sum(1)).double()
    # above: pixels hotter than the n-th hottest pixel; tied: pixels with the same heat as it
    # E|hits| = |above ∩ box| + free / |tied| · |tied ∩ box|
    hits = (above & inside).sum(1) + free / tied.sum(1) * (tied & inside).sum(1)
    return hits / n, torch.where(tied.sum(1) > free, free, 0.0) / n


def _heat_ratios(heat: Tensor, inside: Tensor, threshold: float, weighted: bool) -> Tensor:
    """Return the ratios (11,) of one map: heat of hot pixels in the box / number of hot pixels.

    Args:
        heat: Heat (pixels,) of one map.
        inside: Booleans (pixels,), True in the box.
        threshold: Least heat that counts, as a share of the maximum.
        weighted: True to sum heat, False to count pixels.
    """
    quantiles = torch.linspace(0, 1, 11, dtype=torch.float64, device=heat.device)
    # divide heat by its maximum; pixels below the threshold are ignored
    heat = heat / heat.max()
    counted = heat >= threshold
    if not counted.any() or not heat.isfinite().all():
        return torch.full_like(quantiles, torch.nan)
    # use NumPy, because torch.quantile refuses more than 2^24 numbers
    levels = np.quantile(heat[counted].numpy(force=True), quantiles.numpy(force=True))
    hot = (heat >= torch.from_numpy(levels).to(heat).clamp(max=0.99)[:, None]) & counted
    # ratio(q) = Σ_{hot(q) ∩ box} heat / |hot(q)|
    return (hot * inside * (heat if weighted else 1)).sum(1) / hot.sum(1)
