"""The result of a metric: a score per example, and the examples that were not scored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, eq=False)
class Result:
    """The scores of one method by one metric.

    An example that could not be scored has NaN among ``values``, stands in ``unscored`` with the
    reason, and enters no mean.

    Attributes:
        metric: Name of the metric.
        values: Scores (examples,), float64, on the CPU.
        better: The better score: "higher", "lower", or "neither".
        settings: What the scores depend on: method, target, shapes of the maps, and options.
        unscored: Reason -> indices of examples. "NaN" stands for maps or outputs that are not
            finite, "empty" for empty masks; metrics have further reasons.
        classes: Class of each example (examples,), integers. If there, means are taken over each
            class first, then over classes.
        curves: Values (examples, steps) that the scores were made from.
        parts: Further results that belong beside this one: variants and controls.

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
        """Return a result of raw scores.

        Args:
            metric: As the attribute.
            values: Raw scores (examples,) of any dtype, on any device.
            better: As the attribute.
            settings: As the attribute.
            unscored: Reason -> examples not to score: booleans (examples,), or indices. An example
                has the first reason that applies; other scores that are not finite have "NaN".
            classes: As the attribute.
            curves: As the attribute.
            parts: As the attribute.
        """
        values = values.detach().to("cpu", torch.float64)
        # an example has the first reason that applies to it
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

    def __len__(self) -> int:
        return len(self.values)

    @property
    def scored(self) -> Tensor:
        """Booleans (examples,): the example has a score."""
        return ~self.values.isnan()

    @property
    def n(self) -> int:
        """Number of examples with a score."""
        return int(self.scored.sum())

    @property
    def mean(self) -> float:
        """Mean score; NaN if there is none."""
        groups = self._groups()
        return sum(float(group.mean()) for group in groups) / len(groups) if groups else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; NaN if there, or in a class, is only one score."""
        groups = self._groups()
        if not groups or min(map(len, groups)) < 2:
            return math.nan
        # SE of the mean over K groups: sqrt(Σ var(group) / n(group)) / K
        return math.sqrt(sum(float(group.var()) / len(group) for group in groups)) / len(groups)

    @property
    def median(self) -> float:
        """Median score of all classes together; NaN if there is none."""
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
        """Return everything as JSON can hold it, with None for NaN."""
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
        """Return the scores that are there: one tensor per class, or one of all."""
        values = self.values[self.scored]
        if not len(values):
            return []
        if self.classes is None:
            return [values]
        classes = self.classes[self.scored]
        return [values[classes == label] for label in classes.unique()]


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
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
    """Return booleans (examples,) on the CPU: all entries of the example are finite."""
    return torch.stack([t.reshape(len(t), -1).isfinite().all(1).cpu() for t in tensors]).all(0)


def class_numbers(targets: Sequence[Any]) -> Tensor:
    """Return a number (examples,) for each example's target, in order of appearance."""
    numbers = {target: number for number, target in enumerate(dict.fromkeys(targets))}
    return torch.tensor([numbers[target] for target in targets])
