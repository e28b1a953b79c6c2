"""The result of a metric: one score per example, and the examples without a score."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from captum_mipin.calls import Helpful
from captum_mipin.errors import ArgumentError

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, eq=False)
class Result(Helpful):
    """The scores of one method by one metric.

    An example without a score has NaN in ``values``. Means leave it out, and ``unscored`` gives the
    reason.

    Attributes:
        metric: Name of the metric.
        values: Scores (examples,), float64, on the CPU; NaN for examples without a score.
        better: "higher" or "lower" for the direction of better scores, or "neither".
        settings: Method, target, shapes of the maps, and options of the metric.
        unscored: Reason -> indices of the examples without a score. The reason "NaN" means that
            maps or outputs are not finite, "empty" that masks are empty; metrics add reasons.
        classes: Integers (examples,), the class of each example, or None. With classes, ``mean`` is
            the mean over the means of the classes.
        curves: Values (examples, steps) from which the scores were computed, or None.
        parts: Name -> result of a variant or control of this metric.

    Examples:
        >>> scores = torch.tensor([1.0, 0.5, float("nan"), 0.0])
        >>> result = Result.of("accuracy", scores, "higher", {"n": 4}, {"empty": [3]})
        >>> result.mean, result.standard_error, result.n, result.unscored
        (0.75, 0.25, 2, {'NaN': (2,), 'empty': (3,)})
        >>> print(result)
        accuracy: 0.75 ± 0.25 (higher is better; 2 of 4 scored, 1 NaN, 1 empty; n: 4)
    """

    metric: str
    values: Tensor
    better: Better
    settings: Mapping[str, Any]
    unscored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    classes: Tensor | None = None
    curves: Tensor | None = None
    parts: Mapping[str, "Result"] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        metric: str,
        values: Tensor,
        better: Better,
        settings: Mapping[str, Any],
        unscored: Mapping[str, Tensor | Sequence[int]] | None = None,
        *,
        classes: Tensor | None = None,
        curves: Tensor | None = None,
        parts: Mapping[str, "Result"] | None = None,
    ) -> "Result":
        """Return a result made from the output of a metric.

        Args:
            metric, better, settings, classes, curves, parts: As the attributes.
            values: Scores (examples,) of any dtype, on any device; scores of examples in
                ``unscored`` are ignored.
            unscored: Reason -> examples without a score, as booleans (examples,) or indices. If
                several reasons apply to an example, the first counts. All further examples whose
                score is not finite have the reason "NaN".
        """
        values = values.detach().to("cpu", torch.float64)
        # if several reasons apply to an example, the first counts
        remaining = torch.ones(len(values), dtype=torch.bool)
        reasons: dict[str, tuple[int, ...]] = {}
        for reason, which in (*(unscored or {}).items(), ("NaN", ~values.isfinite())):
            index = torch.as_tensor(which).cpu()
            excluded = torch.zeros_like(remaining)
            excluded[index if index.dtype == torch.bool else index.long()] = True
            rows = (excluded & remaining).nonzero().flatten().tolist()
            remaining &= ~excluded
            if rows:
                reasons[reason] = tuple(sorted({*reasons.get(reason, ()), *rows}))
        return cls(
            metric,
            values.where(remaining, math.nan),
            better,
            dict(settings),
            dict(sorted(reasons.items())),
            None if classes is None else classes.detach().cpu(),
            None if curves is None else curves.detach().to("cpu", torch.float64),
            dict(parts or {}),
        )

    def __float__(self) -> NoReturn:
        raise ArgumentError(
            f"a Result of {self.metric} is no number: take result.mean, or result.values, the "
            "scores of the examples"
        )

    def __getitem__(self, key: Any) -> NoReturn:
        advice = f"result.{key}" if key in dir(self) else f"result.values[{key!r}]"
        raise ArgumentError(f"a Result of {self.metric} is no list: take {advice}")

    def __format__(self, form: str) -> str:
        return str(self) if not form else format(float(self), form)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def scored(self) -> Tensor:
        """Booleans (examples,), True for examples that have a score."""
        return ~self.values.isnan()

    @property
    def n(self) -> int:
        """Number of examples that have a score."""
        return int(self.scored.sum())

    @property
    def mean(self) -> float:
        """Mean score; NaN if no example has a score."""
        groups = self._groups()
        return sum(float(group.mean()) for group in groups) / len(groups) if groups else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; NaN if there is only one score, in all or in a class."""
        groups = self._groups()
        if not groups or min(map(len, groups)) < 2:
            return math.nan
        # SE of the mean over K groups = sqrt(Σ_k var_k / n_k) / K, n_k scores in group k
        return math.sqrt(sum(float(group.var()) / len(group) for group in groups)) / len(groups)

    @property
    def median(self) -> float:
        """Median of all scores, without regard to classes; NaN if no example has a score."""
        values = self.values[self.scored]
        return float(values.quantile(0.5)) if len(values) else math.nan

    def __str__(self) -> str:
        better = f"{self.better} is better; " if self.better != "neither" else ""
        reasons = (f"{len(rows)} {reason}" for reason, rows in self.unscored.items())
        counts = ", ".join([f"{self.n} of {len(self)} scored", *reasons])
        settings = ", ".join(f"{name}: {_short(value)}" for name, value in self.settings.items())
        parts = (f"\n  {name}: {part._summary}" for name, part in self.parts.items())
        return f"{self.metric}: {self._summary} ({better}{counts}; {settings}){''.join(parts)}"

    @property
    def _summary(self) -> str:
        return f"{self.mean:.4g} ± {self.standard_error:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as values that JSON supports, with None for NaN and infinities."""
        return {
            "metric": self.metric,
            "mean": _plain(self.mean),
            "standard error": _plain(self.standard_error),
            "n": self.n,
            "better": self.better,
            "unscored": _plain(self.unscored),
            "settings": _plain(self.settings),
            "values": _plain(self.values),
            "classes": _plain(self.classes),
            "curves": _plain(self.curves),
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
        }

    def _groups(self) -> list[Tensor]:
        """Return the scores without NaN: one tensor per class, or one tensor without classes."""
        values = self.values[self.scored]
        if not len(values):
            return []
        if self.classes is None:
            return [values]
        classes = self.classes[self.scored]
        return [values[classes == label] for label in classes.unique()]


def joined(
    pieces: Sequence[tuple[Sequence[int], Result]],
    targets: Sequence[Any],
    missing: Mapping[str, Sequence[int]],
) -> Result:
    """Return the result for all examples, from results that were computed for parts of them.

    Args:
        pieces: Pairs (indices of examples, result of the same metric for these examples).
        targets: The targets of all examples.
        missing: Reason -> indices of examples that are in no piece.
    """
    first, count = pieces[0][1], len(targets)
    if len(pieces) == 1 and list(pieces[0][0]) == list(range(count)):
        return first

    def placed(tensors: Sequence[Tensor]) -> Tensor:
        """Return one tensor (examples, ...) with the values of some examples; NaN for others."""
        whole = torch.full((count, *tensors[0].shape[1:]), math.nan, dtype=torch.float64)
        for (index, _), tensor in zip(pieces, tensors, strict=True):
            whole[list(index)] = tensor
        return whole

    unscored = {reason: [*index] for reason, index in missing.items()}
    for index, result in pieces:
        for reason, rows in result.unscored.items():
            unscored.setdefault(reason, []).extend(index[row] for row in rows)
    names = dict.fromkeys(name for _, result in pieces for name in result.parts)
    curves = [result.curves for _, result in pieces if result.curves is not None]
    return Result.of(
        first.metric,
        placed([result.values for _, result in pieces]),
        first.better,
        {**first.settings, **({"target": [*targets]} if "target" in first.settings else {})},
        unscored,
        classes=None if first.classes is None else class_numbers(targets),
        curves=placed(curves) if len(curves) == len(pieces) else None,
        parts={
            name: joined(
                [(i, result.parts[name]) for i, result in pieces if name in result.parts],
                targets,
                missing,
            )
            for name in names
        },
    )


def _plain(value: Any) -> Any:
    """Return a value as types that JSON supports, with None for NaN and infinities."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 4:
        return f"{len(value)} values"
    return f"{value:g}" if isinstance(value, float) else str(value)


def finite_rows(*tensors: Tensor) -> Tensor:
    """Return booleans (examples,) on the CPU, True if all entries of the example are finite.

    Args:
        *tensors: Tensors (examples, ...); an example's entries in all of them count.
    """
    return torch.stack([t.reshape(len(t), -1).isfinite().all(1).cpu() for t in tensors]).all(0)


def class_numbers(targets: Sequence[Any]) -> Tensor:
    """Return integers (examples,): equal targets have equal numbers, counted from 0."""
    numbers = {target: number for number, target in enumerate(dict.fromkeys(targets))}
    return torch.tensor([numbers[target] for target in targets])
