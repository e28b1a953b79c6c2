"""Localization by boxes: the hottest pixels, the hottest pixel, or all heat in an object's box."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from captum_mipin.errors import ChanceWarning, InputError
from captum_mipin.metrics.case import Case, Method, Options, check_at_least, check_choice
from captum_mipin.metrics.maps import Reduction, heat, hottest_first, resized
from captum_mipin.metrics.result import Result, class_numbers, finite_rows

#: Masks (examples, height, width); or for each example one or more boxes (left, top, right, bottom)
#: in pixels, right and bottom excluded.
Boxes = Tensor | Sequence[Any]

#: The pointing game's protocol: 15 pixels around the box, on images whose shorter side has 224.
_PROTOCOL_TOLERANCE, _PROTOCOL_SIDE = 15, 224
#: Where random maps score more than this, ``pointing_game`` warns.
_HIGHEST_CHANCE = 0.9


def box_masks(boxes: Boxes, size: Sequence[int]) -> Tensor:
    """Return booleans (examples, height, width): the pixels in the union of an example's boxes.

    Args:
        boxes: Masks (examples, height, width) or (examples, 1, height, width), boolean or above 0
            inside; or for each example one box, or a list of boxes, (left, top, right, bottom) in
            pixels, which are rounded. An empty list gives an empty mask.
        size: Height and width.

    Raises:
        InputError: The boxes are neither; masks have another size; or a box is not finite.

    Examples:
        >>> box_masks([(0, 0, 2, 1), [(1, 1, 3, 2), (0, 0, 1, 1)], []], (2, 3)).long().tolist()
        [[[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]]]
    """
    height, width = size
    # a tensor (examples, boxes, 4) holds boxes, unless the images are 4 pixels wide
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
    for mask, example_boxes in zip(masks, boxes, strict=True):
        rows = torch.as_tensor(example_boxes, dtype=torch.float64).cpu()
        # no box, or one box without a list around it
        if rows.numel() == 0 or tuple(rows.shape) == (4,):
            rows = rows.reshape(-1, 4)
        if rows.ndim != 2 or rows.shape[1] != 4 or not rows.isfinite().all():
            raise InputError(
                f"a box is {example_boxes!r}, expected finite numbers (left, top, right, bottom), "
                "or a list of such"
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
    **options: Unpack[Options],
) -> Result:
    """Return the share of the n hottest pixels that lies in the box of n pixels.

    Maps of another size, such as a layer's, are interpolated to that of the inputs. The part "tied"
    is the share of the n pixels that ties decided on.

    Args:
        method: Any method.
        inputs: Images (examples, channels, height, width).
        target: The class, as Captum takes it.
        boxes: See :func:`box_masks`.
        largest: Boxes that cover more than this share of the image are not scored.
        ties: Among pixels of the same heat at the threshold: the "expected" score of a random
            choice, a "random" choice, or the "first" ones, row by row.
        reduction: See :func:`~captum_mipin.metrics.maps.heat`.
        **options: See :class:`~captum_mipin.metrics.case.Options`.

    Returns:
        Shares in [0, 1]; a map without information scores the area of the box. Unscored: "empty"
        boxes, "large" boxes, "NaN".

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
        # hits among the 1, 2, ... hottest pixels; at n they are the score
        hits = inside.gather(1, hottest_first(flat, order)).cumsum(1)
        values = hits.gather(1, (n - 1).clamp(min=0)[:, None])[:, 0].double() / n
    settings = case.settings(case.maps, reduction=reduction, ties=ties, largest=largest)
    unscored = _unscored(heats, masks, largest)
    parts = {"tied": Result.of("tied", tied, "neither", settings, unscored)}
    return Result.of("bounding box accuracy", values, "higher", settings, unscored, parts=parts)


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
    """Return 1 where the hottest pixel is at most ``tolerance`` pixels from the box, else 0.

    Of several hottest pixels, the share counts. The protocol's tolerance is 15 pixels for images of
    224 x 224; by default it is scaled with the image. TorchRay's tolerance of 15 asks for less than
    15.

    Args:
        method, inputs, target, boxes, reduction, options: As for :func:`bounding_box_accuracy`.
        tolerance: Euclidean distance, in pixels of the inputs; by default 15 / 224 of their shorter
            side: 15 pixels for 224 x 224, one pixel for 16 x 16.
        average: Mean over "samples"; or per class of ``target``, then over "classes".

    Returns:
        Hits in [0, 1]. Unscored: "empty" boxes, "NaN".

    Warns:
        ChanceWarning: A random map would score above 0.9: boxes and tolerance cover the images.

    Source: Zhang et al., ECCV 2016: 15 pixels; Fong et al., ICCV 2019 (TorchRay): on images whose
    shorter side has 224 pixels.

    Examples:
        >>> maps = torch.zeros(1, 1, 8, 8)
        >>> maps[0, 0, 3, 3] = 1
        >>> [pointing_game(maps, maps, boxes=[(0, 0, 2, 2)], tolerance=t).mean for t in (2, 3)]
        [0.0, 1.0]
    """
    check_choice("average", average, ("samples", "classes"))
    if tolerance is not None:
        check_at_least("tolerance", tolerance, 0)
    case = Case.of(method, inputs, target, **options)
    heats, masks = _heat_and_masks(case, boxes, reduction)
    if tolerance is None:
        # tolerance = 15 pixels · shorter side / 224 pixels
        tolerance = _PROTOCOL_TOLERANCE * min(masks.shape[1:]) / _PROTOCOL_SIDE
    hottest, near = heats == heats.amax((1, 2), keepdim=True), _near(masks, tolerance)
    # pointing game = |{hottest pixels} ∩ {pixels near the box}| / |{hottest pixels}|
    values = (hottest & near).sum((1, 2)).double() / hottest.sum((1, 2))
    classes = None
    if average == "classes":
        if not isinstance(case.examples.target, (Tensor, list)):
            raise InputError("average='classes' needs a target for each example: pass a list")
        classes = class_numbers(case.examples.targets)
    settings = case.settings(
        case.maps, reduction=reduction, tolerance=tolerance, average=average, ties="expected"
    )
    unscored = _unscored(heats, masks)
    # E[hit of a random map] = |{pixels near the box}| / |{pixels}|
    share = near.flatten(1).double().mean(1)
    chance = Result.of("chance", share, "neither", {}, unscored, classes=classes).mean
    if chance > _HIGHEST_CHANCE:
        warnings.warn(
            f"a random map scores {chance:.3g} in this pointing game: the boxes with a tolerance "
            f"of {tolerance:g} cover nearly all of images of {masks.shape[1]} x {masks.shape[2]} "
            "pixels. Expected a score of at most 0.9: pass a smaller tolerance= or smaller boxes",
            ChanceWarning,
            stacklevel=2,
        )
    return Result.of("pointing game", values, "higher", settings, unscored, classes=classes)


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
    """Return the effective heat ratio (EHR): heat inside the box / hot pixels, over all thresholds.

    Heat is divided by its maximum, and heat below ``threshold`` dropped. For each quantile q = 0,
    0.1, ..., 1 of the rest, hot pixels have at least min(q-quantile, 0.99). The score is the area
    under the ratios, which are the ``curves``.

    Args:
        method, inputs, target, boxes, largest, reduction, options: As for
            :func:`bounding_box_accuracy`.
        threshold: Least heat that counts, relative to the hottest pixel.
        weighted: Sum the heat inside the box, as published; or count the hot pixels there.

    Returns:
        Areas in [0, 1]. Unscored: "empty" boxes, "large" boxes, "no heat" where nothing is
        positive, "NaN".

    Source: Zhang et al., NeurIPS 2021.

    Examples:
        >>> maps = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
        >>> effective_heat_ratio(maps, maps, boxes=[(0, 0, 1, 2)], largest=0.5).mean
        0.5
    """
    if not 0 <= threshold < 1:
        raise InputError(f"threshold={threshold!r} must be in [0, 1)")
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
    """Return the masks of boxes for images. Raise InputError if they do not fit each other."""
    if x.ndim != 4:
        raise InputError(
            "boxes need images (images, channels, height, width), found inputs of shape "
            f"{tuple(x.shape)}"
        )
    masks = box_masks(boxes, x.shape[2:])
    if len(masks) != len(x):
        raise InputError(f"there are boxes for {len(masks)} images, but {len(x)} images")
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
    """Return the reasons not to score examples; "large" boxes cover more than a share."""
    n = masks.flatten(1).sum(1)
    large = n > largest * masks[0].numel()
    return {"empty": n == 0, "large": large, "NaN": ~finite_rows(heats)}


def image_map(maps: tuple[Tensor, ...]) -> Tensor:
    """Return the only tensor of maps. Raise InputError if they are not one map per image."""
    if len(maps) != 1 or not 3 <= maps[0].ndim <= 4:
        raise InputError(
            "the metric needs one map an image, (examples, channels, height, width) or without "
            f"channels; found shapes {', '.join(str(tuple(m.shape)) for m in maps)}"
        )
    return maps[0]


def _expected_share(flat: Tensor, inside: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Return two shares (examples,) of the n hottest pixels.

    The first lies in the box, in expectation over ties broken at random; on the second ties decide.

    Args:
        flat: Heat (examples, pixels).
        inside: Booleans (examples, pixels).
        n: Pixels to choose (examples,).
    """
    threshold = flat.sort(1, descending=True).values.gather(1, (n - 1).clamp(min=0)[:, None])
    above, tied = flat > threshold, flat == threshold
    free = (n - above.sum(1)).double()  # places among the n hottest for the tied pixels
    # E|hits| = |above ∩ box| + free / |tied| · |tied ∩ box|
    hits = (above & inside).sum(1) + free / tied.sum(1) * (tied & inside).sum(1)
    return hits / n, torch.where(tied.sum(1) > free, free, 0.0) / n


def _near(masks: Tensor, tolerance: float) -> Tensor:
    """Return booleans (examples, height, width): the mask is within ``tolerance`` pixels."""
    # dilate the mask by a disk of radius ``tolerance``: a pixel is near if its disk meets the mask
    reach = int(min(tolerance, max(masks.shape[1:]) * 1.5))  # enough to reach any pixel
    offset = torch.arange(-reach, reach + 1)
    disk = (offset[:, None] ** 2 + offset**2 <= tolerance**2).float()
    return F.conv2d(masks[:, None].float(), disk[None, None], padding=reach)[:, 0] > 0.5


def _heat_ratios(heat: Tensor, inside: Tensor, threshold: float, weighted: bool) -> Tensor:
    """Return the ratios (11,) of one map (pixels,): heat inside the box / hot pixels."""
    quantiles = torch.linspace(0, 1, 11, dtype=torch.float64, device=heat.device)
    # heat in units of its maximum; what is below the threshold counts nowhere
    heat = heat / heat.max()
    counted = heat >= threshold
    if not counted.any() or not heat.isfinite().all():
        return torch.full_like(quantiles, torch.nan)
    # by NumPy: torch.quantile refuses more than 2^24 numbers
    levels = np.quantile(heat[counted].numpy(force=True), quantiles.numpy(force=True))
    hot = (heat >= torch.from_numpy(levels).to(heat).clamp(max=0.99)[:, None]) & counted
    # ratio(q) = Σ_{hot(q) ∩ box} heat / |hot(q)|
    return (hot * inside * (heat if weighted else 1)).sum(1) / hot.sum(1)
