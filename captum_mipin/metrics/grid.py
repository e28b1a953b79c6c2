"""Localization by mosaics: the share of the attribution in the cell of the target's image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from captum_mipin.calls import explained
from captum_mipin.errors import InputError
from captum_mipin.metrics.boxes import image_map
from captum_mipin.metrics.case import Case, Method, Model, Options, raw_outputs, seeded
from captum_mipin.metrics.examples import Examples
from captum_mipin.metrics.maps import Reduction, heat
from captum_mipin.metrics.result import Result, finite_rows
from captum_mipin.options import check_callable


@dataclass(frozen=True)
class Mosaics:
    """Mosaics of n x n images of different classes; one image of each mosaic is to be found.

    Attributes:
        n: Number of images along each side.
        x: Mosaics (mosaics, channels, n * height, n * width).
        cells: Integers (mosaics,): the cell of the image to find, counted row by row from 0.
        targets: Integers (mosaics,): the class of the image to find.

    Examples:
        >>> x = torch.rand(1, 3, 8, 8)  # 2 x 2 images; the target's is at the right
        >>> found = Mosaics(2, x, cells=torch.tensor([1]), targets=torch.tensor([7]))
        >>> maps = torch.zeros(1, 1, 8, 8)
        >>> maps[..., :4, 4:] = 1
        >>> grid_pointing_game(maps, found).mean
        1.0
    """

    n: int
    x: Tensor
    cells: Tensor
    targets: Tensor


@explained
def mosaics(
    model: Model,
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
    """Return mosaics of images that the model recognises with ``confidence``.

    Args:
        model: Function or module that returns logits (examples, classes).
        images: Images (examples, channels, height, width).
        labels: Classes (examples,) of the images.
        n: Number of images along each side of a mosaic.
        count: Number of mosaics.
        confidence: Least softmax probability of the label; other images are not used.
        classes: Classes to find, used one after the other; by default all classes.
        generator: Random numbers that choose images and cells; by default a generator with seed 0.
        batch_size: Number of images per call of the model.

    Raises:
        InputError: Fewer than n² classes, or none of ``classes``, have a recognised image.

    Examples:
        >>> mosaics(lambda x: 99 * x.mean((2, 3)), torch.eye(4)[..., None, None], range(4), n=2).n
        2
    """
    generator = seeded(generator)
    by_class = _recognised(model, images, labels, confidence, batch_size)
    to_find = [label for label in (by_class if classes is None else classes) if label in by_class]
    if len(by_class) < n * n or not to_find:
        raise InputError(
            f"{len(by_class)} classes have an image recognised with confidence {confidence:g}, and "
            f"{len(to_find)} of these are classes to find; expected at least {n * n} classes, one "
            "per cell, and at least one to find: pass more images, or a lower confidence="
        )

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator, device=generator.device))

    fields, cells, targets = [], [], []
    for number in range(count):
        target = to_find[number % len(to_find)]
        # the target goes into a random cell, n² - 1 other random classes into the other cells
        others = [label for label in by_class if label != target]
        order = torch.randperm(len(others), generator=generator, device=generator.device)
        cell = draw(n * n)
        labels_drawn = [others[i] for i in order[: n * n - 1].tolist()]
        labels_drawn.insert(cell, target)
        tiles = [images[by_class[label][draw(len(by_class[label]))]] for label in labels_drawn]
        rows = [torch.cat(tiles[start : start + n], 2) for start in range(0, n * n, n)]
        fields.append(torch.cat(rows, 1))
        cells.append(cell)
        targets.append(target)
    return Mosaics(n, torch.stack(fields), torch.tensor(cells), torch.tensor(targets))


def _recognised(
    model: Model, images: Tensor, labels: Any, confidence: float, batch_size: int
) -> dict[int, list[int]]:
    """Return class -> indices of recognised images; the arguments are those of `mosaics`."""
    check_callable(model)
    unlabelled = Examples.of(images, None)
    classes = torch.as_tensor(labels).long().cpu()
    if classes.shape != (len(unlabelled),):
        raise InputError(
            f"labels have shape {tuple(classes.shape)}, expected one class for each of the "
            f"{len(images)} images: pass a list or a tensor of that length"
        )
    examples = replace(unlabelled, target=classes)
    by_class: dict[int, list[int]] = {int(label): [] for label in examples.target.unique()}
    for index in torch.arange(len(images)).split(batch_size):
        probabilities = raw_outputs(model, examples.select(index)).softmax(1).cpu()
        for i, row in zip(index.tolist(), probabilities, strict=True):
            label = int(examples.target[i])
            if row[label] >= confidence:
                by_class[label].append(i)
    return {label: indices for label, indices in by_class.items() if indices}


@explained
def grid_pointing_game(
    method: Method,
    inputs: Tensor | Mosaics,
    target: Any = None,
    *,
    n: int = 2,
    count: int = 100,
    confidence: float = 0.99,
    reduction: Reduction = "relu_of_sum",
    **options: Unpack[Options],
) -> Result:
    """Return the share of the positive attribution that lies in the cell of the target's image.

    The expected score of a random map is 1 / n². The model must accept images n times as high and
    wide. If the cells do not divide the map evenly, neighbours share a row or column of the map.

    Args:
        method: Any method. Compare only methods that explain the same layer.
        inputs, target: Single images and their classes; or :class:`Mosaics` alone.
        n, count, confidence: As for :func:`mosaics`.
        reduction, options: As for :func:`~captum_mipin.metrics.bounding_box_accuracy`.

    Returns:
        Shares in [0, 1]; 0 for a map without positive values, which the part "nothing positive"
        counts. Reason for no score: "NaN".

    Source: Rao et al., CVPR 2022.

    Examples:
        >>> grid = Mosaics(2, torch.zeros(1, 1, 4, 4), torch.tensor([1]), torch.tensor([0]))
        >>> grid_pointing_game(torch.arange(16.0).view(1, 1, 4, 4), grid).mean == (2+3+6+7) / 120
        True
    """
    extra = {} if isinstance(inputs, Mosaics) else {"confidence": confidence}
    if not isinstance(inputs, Mosaics):
        single = Case.of(method, inputs, target, **options)
        inputs = _mosaics_of(single, n, count, confidence)
    case = Case.of(method, inputs.x, inputs.targets.tolist(), **options)
    positive = heat(image_map(case.maps), inputs.x, reduction).clamp(min=0)
    # GridPG = Σ_{target cell} relu(A) / Σ_{all cells} relu(A), A the heat. All cells have the same
    # size, so that means over cells give the same ratio as sums.
    cells = F.adaptive_avg_pool2d(positive.unsqueeze(1), inputs.n).flatten(1)
    total = cells.sum(1)
    share = cells.gather(1, inputs.cells.to(cells.device)[:, None])[:, 0] / total
    values = torch.where(total == 0, 0.0, share)
    settings = case.settings(case.maps, reduction=reduction, n=inputs.n, **extra)
    unscored = {"NaN": ~finite_rows(positive)}
    name, nothing = "nothing positive", (total == 0).double()
    parts = {name: Result.of(name, nothing, "neither", settings, unscored)}
    return Result.of("grid pointing game", values, "higher", settings, unscored, parts=parts)


def _mosaics_of(case: Case, n: int, count: int, confidence: float) -> Mosaics:
    """Return mosaics of the images of a case; the further arguments are those of `mosaics`.

    Raises:
        InputError: There is not one class per image, or too few classes are recognised.
    """
    labels = case.examples.target
    if not isinstance(labels, (Tensor, list)):
        raise InputError(
            f"target is {labels!r}, expected the class of each image: pass an integer tensor or "
            "list with one class per image"
        )
    images, model, random = case.examples.x, case.model, case.generator
    return mosaics(model, images, labels, n, count, confidence=confidence, generator=random)
