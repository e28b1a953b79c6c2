"""Metrics that replace pixels and compare the change of the output with the attribution."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_mipin.calls import explained
from captum_mipin.errors import InputError
from captum_mipin.metrics.baselines import Baseline, replacement_of
from captum_mipin.metrics.case import (
    Case,
    Method,
    Options,
    Score,
    raw_outputs,
    seeded,
    target_scores,
)
from captum_mipin.metrics.maps import Reduction, heat, hottest_first, positions, resized
from captum_mipin.metrics.result import Better, Result, finite_rows
from captum_mipin.metrics.similarity import pearson
from captum_mipin.options import check_number


class Ends:
    """Scores of examples with no and with all pixels replaced, kept from method to method.

    One object serves one model, and the same examples with the same targets.
    """

    def __init__(self) -> None:
        self._scores: dict[Any, tuple[Tensor, Any]] = {}

    def get(self, replaced: Any, score: Score) -> Tensor | None:
        """Return the scores (examples,), or None if no call has computed them."""
        return self._scores.get(self._key(replaced, score), (None,))[0]

    def keep(self, replaced: Any, score: Score, scores: Tensor) -> None:
        """Keep scores (examples,); ``replaced`` is the baseline, or None for the inputs."""
        # the objects are kept too, since the key has only their addresses
        self._scores[self._key(replaced, score)] = scores, (replaced, score)

    @staticmethod
    def _key(*parts: Any) -> tuple[Any, ...]:
        return tuple(p if isinstance(p, (str, int, float)) else id(p) for p in parts)


@explained
def deletion(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    baseline: Baseline = 0.0,
    step: int | None = None,
    steps: int | None = None,
    score: Score = "softmax",
    reduction: Reduction = "sum",
    ends: Ends | None = None,
    **options: Unpack[Options],
) -> Result:
    """Return the area under the curve of the score as pixels are replaced, the hottest first.

    A pixel is replaced in all channels. For inputs (examples, features), features are replaced.

    Args:
        method: Any method.
        inputs: Tensor ``(examples, channels, *places)`` or (examples, features).
        target: The class, as Captum takes it; in RISE it is the most probable class.
        baseline: Values that replace pixels: a number (0 is the mean image if inputs are
            normalised), a tensor that can be expanded to the inputs, a function inputs -> such a
            tensor, or "blur" for the images under a Gaussian blur of σ = 5 on 11 pixels.
        step: Number of pixels per step; by default the width of the image, as in RISE, or 1 for
            features and signals (examples, channels, length).
        steps: Largest number of steps; the default step is made several times as large if there
            would be more steps. None for no limit. Without effect if ``step`` is passed.
        score: "softmax" for the target's probability, "logit", or a function outputs -> scores,
            either one per class or one per example.
        reduction: Reduction over channels, see :func:`~captum_mipin.metrics.maps.heat`.
        ends: Scores of both ends of the curve that ``compare`` keeps; None for all other callers.
        **options: See :class:`~captum_mipin.metrics.case.Options`. The generator gives the order of
            places with equal heat.

    Returns:
        Areas under the scores (examples, steps + 1) in ``curves``, over the share of steps from 0
        to 1. Reason for no score: "NaN".

    Source: RISE; Petsiuk et al., BMVC 2018.

    Examples:
        >>> x = torch.tensor([[3.0, 2.0, 1.0]])
        >>> result = deletion(x, x, model=lambda x: x.sum(1), score="logit")
        >>> result.curves.tolist(), result.mean
        ([[6.0, 3.0, 1.0, 0.0]], 2.3333333333333335)
    """
    pixels = _Pixels.of(Case.of(method, inputs, target, **options), baseline, score, reduction)
    return _area("deletion", "lower", pixels, (step, steps), ends or Ends())


@explained
def insertion(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    baseline: Baseline = "blur",
    step: int | None = None,
    steps: int | None = None,
    score: Score = "softmax",
    reduction: Reduction = "sum",
    ends: Ends | None = None,
    **options: Unpack[Options],
) -> Result:
    """Return the area under the curve of the score as pixels are added, the hottest first.

    Args:
        method, inputs, target, step, steps, score, reduction, ends, options: As for
            :func:`deletion`.
        baseline: Values of the pixels before they are added, as for :func:`deletion`.

    Returns:
        Areas under the scores (examples, steps + 1) in ``curves``, over the share of steps from 0
        to 1. Reason for no score: "NaN".

    Source: RISE; Petsiuk et al., BMVC 2018.

    Examples:
        >>> x = torch.tensor([[3.0, 2.0, 1.0]])
        >>> insertion(x, x, model=lambda x: x.sum(1), score="logit", baseline=0.0).curves.tolist()
        [[0.0, 3.0, 5.0, 6.0]]
    """
    pixels = _Pixels.of(Case.of(method, inputs, target, **options), baseline, score, reduction)
    back = replace(pixels, start=pixels.finish, finish=pixels.start, replaced=pixels.replaced[::-1])
    return _area("insertion", "higher", back, (step, steps), ends or Ends())


@explained
def sensitivity_n(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    n: Sequence[int] | None = None,
    samples: int = 100,
    baseline: Baseline = 0.0,
    score: Score = "logit",
    reduction: Reduction = "sum",
    **options: Unpack[Options],
) -> Result:
    """Return the correlation of the attribution of n pixels with the loss of score without them.

    For each example and n, this is Pearson's correlation over random sets of n pixels. The score
    is the mean of the correlations over n.

    Args:
        method, inputs, target, baseline, score, reduction: As for :func:`deletion`.
        n: Sizes of sets; by default up to 16 from 1 to 0.8 of all pixels, on a logarithmic scale.
        samples: Number of random sets per example and n; smaller sets are subsets of larger ones.
        **options: As for :func:`deletion`. The generator draws the sets.

    Returns:
        Mean correlations; ``curves`` have one correlation per n. Reasons for no score: "NaN", and
        "constant" if attributions or losses do not vary.

    Source: Ancona et al., ICLR 2018.

    Examples:
        >>> x, weight = torch.randn(2, 5), torch.tensor([1.0, -2.0, 3.0, 0.5, 1.0])
        >>> result = sensitivity_n(x * weight, x, model=lambda x: x @ weight, n=[1, 2, 3])
        >>> result.values.allclose(torch.ones(2).double())
        True
    """
    check_number("samples", samples, 2, whole=True)
    case = Case.of(method, inputs, target, **options)
    pixels = _Pixels.of(case, baseline, score, reduction)
    places = pixels.heat.shape[1]
    numbers = _sizes(n, places)
    counts = torch.tensor(numbers, device=pixels.heat.device)
    sample = torch.arange(samples, device=counts.device).repeat(len(numbers))
    whole = case.scores(case.examples, score)
    # the user's generator has drawn the order of ties before, and draws the sets next; without a
    # user's generator, a new generator with seed 0 draws the sets
    sets = replace(case, generator=options.get("generator") or seeded())
    correlations = []
    for row in range(len(whole)):
        orders = sets.uniform(samples, places).argsort(1)
        rows, ranks = torch.full_like(sample, row), positions(orders)
        without = pixels.scores(rows, ranks, sample, counts.repeat_interleave(samples))
        # r(n) = cor(Σ_{i in set} A_i, y(x) - y(x without set)) over sets of n pixels, y the score
        sums = pixels.heat[row][orders].cumsum(1).T[counts - 1]
        correlations.append(pearson(sums, whole[row] - without.view_as(sums)))
    curves = torch.stack(correlations)
    unscored = {"NaN": ~finite_rows(pixels.heat, whole), "constant": ~finite_rows(curves)}
    settings = {**pixels.settings, "n": numbers, "samples": samples, "correlation": "an example"}
    return Result.of("sensitivity-n", curves.mean(1), "higher", settings, unscored, curves=curves)


@dataclass(frozen=True)
class _Pixels:
    """Examples and their heat; places (pixels or features) of the examples can be replaced.

    Attributes:
        case: The method and the examples.
        heat: Heat (examples, places), on the device of the inputs.
        ties: Random numbers (examples, places) that give the order of places with equal heat.
        start: Inputs (examples, channels, places) with no place replaced.
        finish: Inputs (examples, channels, places) with all places replaced.
        is_shared: True if the model's output for the baseline is the same for all examples.
        replaced: What replaces pixels at the start and at the finish: None, or the baseline.
        score: The score of a target, as users pass it.
        settings: Settings of the result.
    """

    case: Case
    heat: Tensor
    ties: Tensor
    start: Tensor
    finish: Tensor
    is_shared: bool
    replaced: tuple[Any, Any]
    score: Score
    settings: dict[str, Any]

    @classmethod
    def of(cls, case: Case, baseline: Baseline, score: Score, reduction: Reduction) -> "_Pixels":
        """Return the examples of a case with their heat.

        Raises:
            InputError: The shapes of inputs, maps and baseline do not fit each other.
        """
        x, _ = case.examples.x.detach(), case.model
        if x.ndim < 2:
            raise InputError(
                f"inputs have shape {tuple(x.shape)}, but this metric needs inputs (examples, "
                "features) or (examples, channels, *places): add the missing dimensions"
            )
        replacement = replacement_of(baseline, x)
        if len(case.maps) != 1:
            raise InputError(
                f"the method gives {len(case.maps)} tensors of maps, but this metric needs one: "
                "pass a method that gives one tensor"
            )
        (maps,) = case.maps
        heats = heat(maps, x, reduction).to(x.device)
        # dimension 1 of maps (examples, tokens, features) is not channels: its sum would be wrong
        is_wrong_sum = maps.ndim > 2 and not callable(reduction)
        if x.ndim == 2 and (is_wrong_sum or heats.shape != x.shape):
            raise InputError(
                f"inputs {tuple(x.shape)} need a map of shape {tuple(x.shape)}, found "
                f"{tuple(maps.shape)}: pass a function as reduction="
            )
        flat = resized(heats, x.shape[2:] or x.shape[1:]).flatten(1)
        # stride 0: the baseline is the same for all examples. If the targets are the same too,
        # the model's output for the baseline is computed once.
        is_shared = replacement.stride(0) == 0 and case.examples.is_uniform
        start, finish = (t.reshape(len(x), -1, flat.shape[1]) for t in (x, replacement))
        baseline_name = (
            f"tensor {tuple(baseline.shape)}" if isinstance(baseline, Tensor) else baseline
        )
        settings = case.settings(
            maps=case.maps, reduction=reduction, score=score, baseline=baseline_name
        )
        ties = case.uniform(*flat.shape)
        ends = None, baseline
        return cls(case, flat, ties, start, finish, is_shared, ends, score, settings)

    def scores(self, rows: Tensor, ranks: Tensor, orders: Tensor, counts: Tensor) -> Tensor:
        """Return the scores (sets,) of examples with sets of places replaced, in batches.

        Args:
            rows: Indices (sets,) of examples, one per set.
            ranks: Positions (orders, places) of each place in each order of places.
            orders: Indices (sets,) of orders; a set contains the first places of its order.
            counts: Numbers (sets,) of places in each set.
        """
        examples, scores = self.case.examples, []
        for part in torch.arange(len(rows)).tensor_split(-(-len(rows) // self.case.rows_per_call)):
            index = rows[part]
            replaced = (ranks[orders[part]] < counts[part, None]).unsqueeze(1)
            mixed = torch.where(replaced, self.finish[index], self.start[index])
            inputs = mixed.view(-1, *examples.x.shape[1:])
            batch = examples.select(index, (inputs,))
            outputs = raw_outputs(self.case.model, batch)
            scores.append(target_scores(outputs, batch.target, self.score))
        return torch.cat(scores)


def _area(
    metric: str,
    better: Better,
    pixels: _Pixels,
    sizes: tuple[int | None, int | None],
    ends: Ends,
) -> Result:
    """Return the result of `deletion` or `insertion`: places are replaced, hottest first.

    The inputs of all steps and examples go through the model in batches, and equal inputs only
    once.

    Args:
        metric: "deletion" or "insertion".
        better: Direction of better scores.
        pixels: Examples; places of ``start`` are replaced by places of ``finish``.
        sizes: The arguments ``step`` and ``steps`` of `deletion`.
        ends: Scores that earlier calls have computed; this call adds its own.
    """
    (step, steps), x, places = sizes, pixels.case.examples.x, pixels.heat.shape[1]
    if step is None:
        step = x.shape[-1] if x.ndim > 3 else 1
        if steps is not None:
            check_number("steps", steps, 1, whole=True)
            # several default steps become one: step · ceil(places / (step · steps))
            step *= ceil(places / (step * steps))
    check_number("step", step, 1, whole=True)
    ranks = positions(hottest_first(pixels.heat.nan_to_num(), pixels.ties))
    points = -(-places // step) + 1
    # number of the curve's first point at which a place is changed; 0 for a place that keeps its
    # value, because ``start`` and ``finish`` are equal there
    changes = (ranks // step + 1) * (pixels.start != pixels.finish).any(1)
    baseline = 0 if metric == "insertion" else points - 1
    rows, point, number = _distinct_inputs(changes, points, baseline if pixels.is_shared else None)
    curves = _scores(pixels, ends, number, lambda i: (rows[i], ranks, rows[i], point[i] * step))
    # area = mean over k of (y_k + y_{k+1}) / 2, y_k the score after k steps
    values = (curves[:, 1:] + curves[:, :-1]).sum(1) / (2 * (points - 1))
    settings = {**pixels.settings, "step": step, "ties": "random"}
    unscored = {"NaN": ~finite_rows(pixels.heat)}
    return Result.of(metric, values, better, settings, unscored, curves=curves)


def _scores(
    pixels: _Pixels, ends: Ends, number: Tensor, sets: Callable[[Tensor], tuple[Tensor, ...]]
) -> Tensor:
    """Return the scores of curves (examples, points); those of both ends are computed only once.

    Args:
        pixels: The examples.
        ends: Scores that earlier calls have computed.
        number: Index (examples, points) of each point's input among the distinct inputs.
        sets: Function that returns the arguments of ``pixels.scores`` for some distinct inputs.
    """
    scores = torch.zeros(int(number.max()) + 1, dtype=torch.float64, device=number.device)
    left = torch.ones_like(scores, dtype=torch.bool)
    outer = [(number[:, column], pixels.replaced[column]) for column in (0, -1)]
    for index, replaced in outer:
        known = ends.get(replaced, pixels.score)
        if known is not None:
            scores[index], left[index] = known, False
    index = left.nonzero().flatten()
    scores[index] = pixels.scores(*sets(index)) if len(index) else scores[index]
    for index, replaced in outer:
        ends.keep(replaced, pixels.score, scores[index])
    return scores[number]


def _distinct_inputs(
    changes: Tensor, points: int, shared: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct inputs of the curves of all examples.

    Args:
        changes: The first point (examples, places) of the curve at which a place is changed; 0 for
            a place that never changes.
        points: Number of points of a curve.
        shared: Index of the point at which all examples have the same input, or None.

    Returns:
        Example (inputs,) and point (inputs,) of each distinct input; and for each point of each
        curve (examples, points) the index of its input among the distinct inputs.
    """
    # a point at which no place changes has the same input as the point before
    new = torch.zeros(len(changes), points, dtype=torch.bool, device=changes.device)
    new.scatter_(1, changes, True)[:, 0] = True
    # number the inputs so that equal inputs have equal numbers
    inputs = new.flatten().cumsum(0).view_as(new)
    # at the shared point, all examples get the number of the first example's input
    if shared is not None:
        inputs = torch.where(inputs == inputs[:, shared, None], inputs[0, shared], inputs)
    _, *indices = np.unique(inputs.numpy(force=True), return_index=True, return_inverse=True)
    first, number = (torch.from_numpy(index).to(changes.device) for index in indices)
    return first // points, first % points, number.view(len(changes), points)


def _sizes(n: Any, places: int) -> list[int]:
    """Return the sizes of sets; by default 16 on a logarithmic scale, up to 0.8 of all."""
    if n is None:
        # n_k = (0.8 · places)^(k / 15), k = 0 ... 15; equal sizes count once
        most = max(1.0, 0.8 * places)
        return sorted({round(most ** (k / 15)) for k in range(16)})
    sizes = list(n) if isinstance(n, Iterable) else []
    if not sizes or not all(hasattr(k, "__index__") and 1 <= k <= places for k in sizes):
        expected = f"expected a list of sizes of sets, each from 1 to {places}"
        raise InputError(f"n={n!r}, {expected}: pass for example n=[1, {places}]")
    return sizes
