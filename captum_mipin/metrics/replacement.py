"""Does the output change where the attribution says? Pixels are replaced, and the model asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from captum_mipin.errors import InputError
from captum_mipin.metrics.case import (
    Case,
    Method,
    Options,
    Score,
    check_at_least,
    raw_outputs,
    seeded,
    target_scores,
)
from captum_mipin.metrics.maps import Reduction, heat, hottest_first, positions, resized
from captum_mipin.metrics.result import Better, Result, finite_rows
from captum_mipin.metrics.similarity import pearson

#: What replaces pixels: a number, a tensor that fits the inputs, a function of them, or "blur".
Baseline = float | Tensor | Callable[[Tensor], Tensor] | Literal["blur"]


def deletion(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    baseline: Baseline = 0.0,
    step: int | None = None,
    score: Score = "softmax",
    reduction: Reduction = "sum",
    **options: Unpack[Options],
) -> Result:
    """Return the area under the output while pixels are replaced, the hottest first.

    A place of the map stands for a pixel with all its channels, or for a feature.

    Args:
        method: Any method.
        inputs: Tensor (examples, channels, *places) or (examples, features).
        target: The class, as Captum takes it; RISE explains the most probable one.
        baseline: Replaces pixels: a number (0 is the mean image if inputs are normalised), a tensor
            that fits the inputs, a function of them, or "blur", a Gaussian of σ = 5 on 11 pixels.
        step: Pixels replaced at a time; by default the width of the image, as in RISE, and 1 for
            features.
        score: "softmax" probability, "logit", or a function of all outputs that returns a score
            per class, or one per example.
        reduction: See :func:`~captum_mipin.metrics.maps.heat`.
        **options: See :class:`~captum_mipin.metrics.case.Options`. The generator breaks ties
            between places of the same heat.

    Returns:
        Areas of width 1; the outputs (examples, steps + 1) are the ``curves``. Unscored: "NaN".

    Source: RISE; Petsiuk et al., BMVC 2018.

    Examples:
        >>> x = torch.tensor([[3.0, 2.0, 1.0]])
        >>> result = deletion(x, x, model=lambda x: x.sum(1), score="logit")
        >>> result.curves.tolist(), result.mean
        ([[6.0, 3.0, 1.0, 0.0]], 2.3333333333333335)
    """
    pixels = _Pixels.of(Case.of(method, inputs, target, **options), baseline, score, reduction)
    return _area("deletion", "lower", pixels, step)


def insertion(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    baseline: Baseline = "blur",
    step: int | None = None,
    score: Score = "softmax",
    reduction: Reduction = "sum",
    **options: Unpack[Options],
) -> Result:
    """Return the area under the output while the image is built from its hottest pixels.

    Args:
        method, inputs, target, step, score, reduction, options: As for :func:`deletion`.
        baseline: The start, as for :func:`deletion`.

    Returns:
        Areas of width 1; the outputs (examples, steps + 1) are the ``curves``. Unscored: "NaN".

    Source: RISE; Petsiuk et al., BMVC 2018.

    Examples:
        >>> x = torch.tensor([[3.0, 2.0, 1.0]])
        >>> insertion(x, x, model=lambda x: x.sum(1), score="logit", baseline=0.0).curves.tolist()
        [[0.0, 3.0, 5.0, 6.0]]
    """
    pixels = _Pixels.of(Case.of(method, inputs, target, **options), baseline, score, reduction)
    back = replace(pixels, start=pixels.finish, finish=pixels.start)
    return _area("insertion", "higher", back, step)


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
    """Return the correlation between the attribution of n random pixels and the loss without them.

    Pearson's correlation over the random sets of one example and one n, averaged over n.

    Args:
        method, inputs, target, baseline, score, reduction: As for :func:`deletion`.
        n: Numbers of pixels; by default up to 16 from 1 to 0.8 of all, on a logarithmic scale.
        samples: Random sets per example and n; those of an example are nested in n.
        **options: As for :func:`deletion`. The generator draws the sets.

    Returns:
        Correlations; those of each n are the ``curves``. Unscored: "NaN"; "constant", if
        attributions or losses do not vary.

    Source: Ancona et al., ICLR 2018.

    Examples:
        >>> x, weight = torch.randn(2, 5), torch.tensor([1.0, -2.0, 3.0, 0.5, 1.0])
        >>> result = sensitivity_n(x * weight, x, model=lambda x: x @ weight, n=[1, 2, 3])
        >>> result.values.allclose(torch.ones(2).double())
        True
    """
    check_at_least("samples", samples, 2)
    case = Case.of(method, inputs, target, **options)
    pixels = _Pixels.of(case, baseline, score, reduction)
    places = pixels.heat.shape[1]
    numbers = _log_spaced(places) if n is None else list(n)
    if not numbers or not all(1 <= number <= places for number in numbers):
        raise InputError(f"n={n!r} must be numbers of pixels from 1 to {places}")
    counts = torch.tensor(numbers, device=pixels.heat.device)
    sample = torch.arange(samples, device=counts.device).repeat(len(numbers))
    whole = case.scores(case.examples, score)
    # sets follow the numbers that break ties in the user's generator; without one both start at 0
    sets = replace(case, generator=options.get("generator") or seeded())
    correlations = []
    for row in range(len(whole)):
        orders = sets.uniform(samples, places).argsort(1)
        rows, ranks = torch.full_like(sample, row), positions(orders)
        without = pixels.scores(rows, ranks, sample, counts.repeat_interleave(samples))
        # r(n) = cor over sets of n pixels (Σ_{i in set} A_i, y(x) - y(x without the set))
        sums = pixels.heat[row][orders].cumsum(1).T[counts - 1]
        correlations.append(pearson(sums, whole[row] - without.view_as(sums)))
    curves = torch.stack(correlations)
    unscored = {"NaN": ~finite_rows(pixels.heat, whole), "constant": ~finite_rows(curves)}
    settings = {**pixels.settings, "n": numbers, "samples": samples, "correlation": "an example"}
    return Result.of("sensitivity-n", curves.mean(1), "higher", settings, unscored, curves=curves)


@dataclass(frozen=True)
class _Pixels:
    """Examples whose places (pixels or features) can be replaced, and their heat.

    Attributes:
        case: The method and the examples.
        heat: Heat (examples, places), on the device of the inputs.
        ties: Random numbers (examples, places) that break ties.
        start: Inputs (examples, channels, places) before anything is replaced.
        finish: Inputs (examples, channels, places) after everything is replaced.
        is_shared: All examples have the same baseline, and with it the same output.
        score: The score of a target, as users pass it.
        settings: Settings of the result.
    """

    case: Case
    heat: Tensor
    ties: Tensor
    start: Tensor
    finish: Tensor
    is_shared: bool
    score: Score
    settings: dict[str, Any]

    @classmethod
    def of(cls, case: Case, baseline: Baseline, score: Score, reduction: Reduction) -> "_Pixels":
        """Explain examples. Raise InputError if inputs, maps and baseline do not fit each other."""
        x, _ = case.examples.x.detach(), case.model
        if x.ndim < 2:
            raise InputError(
                "a metric of pixels needs inputs (examples, features) or (examples, channels, "
                f"*places), found {tuple(x.shape)}"
            )
        replacement = _baseline(baseline, x)
        if len(case.maps) != 1:
            raise InputError(f"a metric of pixels needs one map an example, found {len(case.maps)}")
        (maps,) = case.maps
        heats = heat(maps, x, reduction).to(x.device)
        # the sum over dimension 1 of maps (examples, tokens, features) is over tokens, not channels
        is_wrong_sum = maps.ndim > 2 and not callable(reduction)
        if x.ndim == 2 and (is_wrong_sum or heats.shape != x.shape):
            raise InputError(
                f"inputs {tuple(x.shape)} need a map of shape {tuple(x.shape)}, found "
                f"{tuple(maps.shape)}: pass a function as reduction="
            )
        flat = resized(heats, x.shape[2:] or x.shape[1:]).flatten(1)
        # an expanded baseline is one for all; with one target its output is one for all, too
        is_shared = replacement.stride(0) == 0 and case.examples.is_uniform
        start, finish = (t.reshape(len(x), -1, flat.shape[1]) for t in (x, replacement))
        baseline_name = (
            f"tensor {tuple(baseline.shape)}" if isinstance(baseline, Tensor) else baseline
        )
        settings = case.settings(
            maps=case.maps, reduction=reduction, score=score, baseline=baseline_name
        )
        ties = case.uniform(*flat.shape)
        return cls(case, flat, ties, start, finish, is_shared, score, settings)

    def scores(self, rows: Tensor, ranks: Tensor, orders: Tensor, counts: Tensor) -> Tensor:
        """Return the scores (sets,) of examples some of whose places are replaced, in batches.

        Args:
            rows: The example (sets,) of each set.
            ranks: The position (orders, places) of each place in some orders.
            orders: The order (sets,) in which places are replaced.
            counts: How many are replaced (sets,).
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


def _area(metric: str, better: Better, pixels: _Pixels, step: int | None) -> Result:
    """Return the result of replacing places of the start by those of the finish, hottest first.

    All steps of all examples go through the model in batches; no input goes through it twice.
    """
    x = pixels.case.examples.x
    step = (x.shape[-1] if x.ndim > 2 else 1) if step is None else step
    check_at_least("step", step, 1)
    ranks = positions(hottest_first(pixels.heat.nan_to_num(), pixels.ties))
    points = -(-ranks.shape[1] // step) + 1
    # the point of the curve from which on a place has another value; 0 if it never has
    changes = (ranks // step + 1) * (pixels.start != pixels.finish).any(1)
    baseline = 0 if metric == "insertion" else points - 1
    rows, point, number = _distinct_inputs(changes, points, baseline if pixels.is_shared else None)
    curves = pixels.scores(rows, ranks, rows, point * step)[number]
    # area = mean over steps k of (y_k + y_{k+1}) / 2, y_k the softmax (or other score) after k
    values = (curves[:, 1:] + curves[:, :-1]).sum(1) / (2 * (points - 1))
    settings = {**pixels.settings, "step": step, "ties": "random"}
    unscored = {"NaN": ~finite_rows(pixels.heat)}
    return Result.of(metric, values, better, settings, unscored, curves=curves)


def _distinct_inputs(
    changes: Tensor, points: int, shared: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which inputs of all curves differ from each other.

    Args:
        changes: The point (examples, places) from which on a place has another value; 0 if never.
        points: Points of a curve.
        shared: The point at which all examples have the same input, if there is one.

    Returns:
        Example (inputs,) and point (inputs,) of each distinct input, and the number
        (examples, points) of the input of each point.
    """
    new = torch.zeros(len(changes), points, dtype=torch.bool, device=changes.device)
    new.scatter_(1, changes, True)[:, 0] = True  # a point where nothing changes repeats its input
    # number the inputs through: equal numbers, equal inputs
    inputs = new.flatten().cumsum(0).view_as(new)
    # all examples have the number of the first example at the shared point
    if shared is not None:
        inputs = torch.where(inputs == inputs[:, shared, None], inputs[0, shared], inputs)
    _, *indices = np.unique(inputs.numpy(force=True), return_index=True, return_inverse=True)
    first, number = (torch.from_numpy(index).to(changes.device) for index in indices)
    return first // points, first % points, number.view(len(changes), points)


def _baseline(baseline: Baseline, x: Tensor) -> Tensor:
    """Return what replaces each example's pixels, shaped like the inputs ``x``."""
    if isinstance(baseline, str):
        if baseline != "blur":
            raise InputError(
                f"baseline={baseline!r} is not 'blur', a number, a tensor or a function"
            )
        if x.ndim != 4:
            raise InputError(
                f"a blur needs images, found inputs of shape {tuple(x.shape)}: pass another "
                "baseline="
            )
        return blur(x)
    values = baseline(x) if callable(baseline) else torch.as_tensor(baseline, dtype=torch.float64)
    # 0.5 for integer pixels would be rounded in silence
    if not x.is_floating_point() and (values != values.to(x)).any():
        raise InputError(
            f"the baseline is {values!r}, which inputs of dtype {x.dtype} cannot hold: pass "
            "another baseline="
        )
    try:
        return values.detach().to(x).expand_as(x)
    except RuntimeError as error:
        raise InputError(
            f"the baseline has shape {tuple(values.shape)}, which does not fit inputs "
            f"{tuple(x.shape)}"
        ) from error


def blur(x: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Return images under RISE's blur, zeros around them.

    RISE filters a lone pixel of a ``size`` x ``size`` image by SciPy's Gaussian and takes the
    result as its kernel: a Gaussian cut at 4 σ, whose tails are reflected into ``size`` pixels.
    """
    reach = int(4 * sigma + 0.5)
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weight = torch.exp(-(offset**2) / (2 * sigma**2))
    # reflect the tails: ... 1 0 | 0 1 ... size-1 | size-1 size-2 ...
    place = (offset.long() + size // 2) % (2 * size)
    place = torch.where(place < size, place, 2 * size - 1 - place)
    line = torch.zeros(size, dtype=torch.float64).index_add_(0, place, weight / weight.sum()).to(x)
    # a Gaussian is separable: first along the height, then along the width
    for kernel in (line[:, None], line[None]):
        padding = (kernel.shape[0] // 2, kernel.shape[1] // 2)
        kernels = kernel.expand(x.shape[1], 1, -1, -1)
        x = F.conv2d(x, kernels, padding=padding, groups=x.shape[1])
    return x


def _log_spaced(places: int) -> list[int]:
    """Return up to 16 numbers of pixels from 1 to 0.8 of all, evenly on a logarithmic scale."""
    # n_k = (0.8 places)^(k / 15), k = 0 ... 15
    most = max(1.0, 0.8 * places)
    return sorted({round(most ** (k / 15)) for k in range(16)})
