"""Localization by mosaics: the attribution in the cell of the class asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from captum_mipin.errors import InputError
from captum_mipin.metrics.boxes import image_map
from captum_mipin.metrics.case import Case, Method, Model, Options, raw_outputs, seeded
from captum_mipin.metrics.examples import Examples
from captum_mipin.metrics.maps import Reduction, heat
from captum_mipin.metrics.result import Result, finite_rows


@dataclass(frozen=True)
class Mosaics:
    """Mosaics of n x n images of different classes.

    Attributes:
        n: Images along each side.
        x: Mosaics (mosaics, channels, n * height, n * width).
        cells: The cell (mosaics,) of the image to find, counted row by row.
        targets: The class (mosaics,) of that image.
    """

    n: int
    x: Tensor
    cells: Tensor
    targets: Tensor


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
        model: Returns logits (examples, classes).
        images: Images (examples, channels, height, width).
        labels: Class (examples,) of each image.
        n: Images along each side.
        count: Number of mosaics.
        confidence: Least softmax probability of an image's label.
        classes: Classes to find, each in turn; by default all.
        generator: Chooses images and cells; by default one with seed 0.
        batch_size: Images per call of the model.

    Raises:
        InputError: Too few classes, or none of ``classes``, have an image that is recognised.
    """
    generator = generator or seeded()
    by_class = _recognised(model, images, labels, confidence, batch_size)
    to_find = [label for label in (by_class if classes is None else classes) if label in by_class]
    if len(by_class) < n * n or not to_find:
        raise InputError(
            f"{len(by_class)} classes have an image recognised with confidence {confidence:g}, "
            f"{len(to_find)} of them to be found: pass more images, a mosaic needs {n * n} classes"
        )

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator, device=generator.device))

    fields, cells, targets = [], [], []
    for number in range(count):
        target = to_find[number % len(to_find)]
        # n² - 1 other classes in random cells, the target in a random cell of its own
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
    """Return class -> indices of its images that the model recognises; arguments as above."""
    examples = Examples.of(images, torch.as_tensor(labels).long().cpu())
    by_class: dict[int, list[int]] = {int(label): [] for label in examples.target.unique()}
    for index in torch.arange(len(images)).split(batch_size):
        probabilities = raw_outputs(model, examples.select(index)).softmax(1).cpu()
        for i, row in zip(index.tolist(), probabilities, strict=True):
            label = int(examples.target[i])
            if row[label] >= confidence:
                by_class[label].append(i)
    return {label: indices for label, indices in by_class.items() if indices}


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
    """Return the share of positive attribution that lies in the cell of the class asked for.

    Chance is 1 / n². The model has to take images n times as large. A row or column of the map that
    two cells share counts for both (adaptive pooling).

    Args:
        method: Any method. Ask every method at the same layer.
        inputs, target: Single images and their classes; or :func:`mosaics` made before.
        n, count, confidence: As for :func:`mosaics`.
        reduction, options: As for :func:`~captum_mipin.metrics.bounding_box_accuracy`.

    Returns:
        Shares in [0, 1], 0 where "nothing positive" is (a part counts it). Unscored: "NaN".

    Source: Rao et al., CVPR 2022.

    Examples:
        >>> grid = Mosaics(2, torch.zeros(1, 1, 4, 4), torch.tensor([1]), torch.tensor([0]))
        >>> grid_pointing_game(torch.arange(16.0).view(1, 1, 4, 4), grid).mean == (2+3+6+7) / 120
        True
    """
    extra = {} if isinstance(inputs, Mosaics) else {"confidence": confidence}
    if not isinstance(inputs, Mosaics):
        single = Case.of(method, inputs, target, **options)
        labels = single.examples.target
        if not isinstance(labels, (Tensor, list)):
            raise InputError(
                f"target is {target!r}, expected the class of each image: an integer tensor or list"
            )
        inputs = mosaics(
            single.model,
            inputs,
            labels,
            n,
            count,
            confidence=confidence,
            generator=single.generator,
        )
    case = Case.of(method, inputs.x, inputs.targets.tolist(), **options)
    positive = heat(image_map(case.maps), inputs.x, reduction).clamp(min=0)
    # GridPG = Σ_{target cell} relu(A) / Σ_{all cells} relu(A); cells of one size: their means do
    cells = F.adaptive_avg_pool2d(positive.unsqueeze(1), inputs.n).flatten(1)
    total = cells.sum(1)
    share = cells.gather(1, inputs.cells.to(cells.device)[:, None])[:, 0] / total
    values = torch.where(total == 0, 0.0, share)
    settings = case.settings(case.maps, reduction=reduction, n=inputs.n, **extra)
    unscored = {"NaN": ~finite_rows(positive)}
    name, nothing = "nothing positive", (total == 0).double()
    parts = {name: Result.of(name, nothing, "neither", settings, unscored)}
    return Result.of("grid pointing game", values, "higher", settings, unscored, parts=parts)
