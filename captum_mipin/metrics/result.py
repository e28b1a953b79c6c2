"""What every metric returns: a score an example, and what was not scored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, eq=False)
class Result:
    """The scores of one method by one metric.

    What could not be scored is NaN among ``values``, stands in ``unscored`` with its reason, and enters no figure.

    Attributes:
        metric: Its name.
        values: (examples,) float64, on the CPU.
        better: Whether a "higher" or a "lower" score is the better one, or "neither".
        settings: What the scores depend on: method, target, shape of the maps, reduction, ties, and what else the metric knows.
        unscored: Reason → which examples: "NaN" for maps or outputs that are not finite, "empty" for empty masks, and others.
        classes: (examples,) integers; if there, means are taken over each class first, then over classes.
        curves: (examples, steps) what the scores were made from.
        parts: Figures that belong beside this one: its variants and controls.

    Examples:
        >>> result = Result.of("accuracy", torch.tensor([1.0, 0.5, float("nan"), 0.0]), "higher", {"n": 4}, {"empty": [3]})
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
        """A result from raw scores.

        Args:
            metric, values, better, settings, classes, curves, parts: The attributes.
            unscored: For each reason which examples not to score: booleans (examples,), or indices. An example has the first
                that applies; whatever else is not finite is "NaN".
        """
        values = values.detach().to("cpu", torch.float64)
        left = torch.ones(len(values), dtype=torch.bool)
        found: dict[str, tuple[int, ...]] = {}
        for reason, which in (*(unscored or {}).items(), ("NaN", ~values.isfinite())):
            rows = torch.as_tensor(which).cpu()
            rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows.long()
            rows = rows[left[rows]]
            left[rows] = False
            if len(rows):
                found[reason] = tuple(sorted({*found.get(reason, ()), *rows.tolist()}))
        curves = None if curves is None else curves.detach().to("cpu", torch.float64)
        classes = None if classes is None else classes.detach().cpu()
        ordered = {reason: found[reason] for reason in sorted(found)}
        return cls(
            metric,
            values.where(left, math.nan),
            better,
            dict(settings),
            ordered,
            classes,
            curves,
            dict(parts or {}),
        )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def scored(self) -> Tensor:
        """(examples,) whether each was scored."""
        return ~self.values.isnan()

    @property
    def n(self) -> int:
        """How many examples were scored."""
        return int(self.scored.sum())

    @property
    def mean(self) -> float:
        """Of the scores; NaN where there is none."""
        groups = self._groups()
        return sum(float(group.mean()) for group in groups) / len(groups) if groups else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean; NaN where one score, or one of a class, says nothing of its spread."""
        groups = self._groups()
        if not groups or min(map(len, groups)) < 2:
            return math.nan
        return math.sqrt(sum(float(group.var()) / len(group) for group in groups)) / len(groups)

    @property
    def median(self) -> float:
        """Of the scores, of all classes together; NaN where there is none."""
        values = self.values[self.scored]
        return float(values.quantile(0.5)) if len(values) else math.nan

    def renamed(self, metric: str) -> "Result":
        """The same under another name."""
        return replace(self, metric=metric)

    def __str__(self) -> str:
        better = f"{self.better} is better; " if self.better != "neither" else ""
        counts = [
            f"{self.n} of {len(self)} scored",
            *(f"{len(rows)} {reason}" for reason, rows in self.unscored.items()),
        ]
        settings = ", ".join(f"{name}: {_short(value)}" for name, value in self.settings.items())
        line = f"{self.metric}: {self.mean:.4g} ± {self.standard_error:.2g} ({better}{', '.join(counts)}; {settings})"
        parts = [
            f"  {name}: {p.mean:.4g} ± {p.standard_error:.2g}" for name, p in self.parts.items()
        ]
        return "\n".join([line, *parts])

    def to_dict(self) -> dict[str, Any]:
        """Everything as what JSON can hold; None for NaN."""
        return {
            "metric": self.metric,
            "mean": _plain(self.mean),
            "standard error": _plain(self.standard_error),
            "n": self.n,
            "better": self.better,
            "unscored": {reason: list(rows) for reason, rows in self.unscored.items()},
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "values": _plain(self.values),
            "classes": _plain(self.classes),
            "curves": _plain(self.curves),
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
        }

    def _groups(self) -> list[Tensor]:
        """The scores, of each class for itself where means go by class."""
        scored = self.scored
        if not scored.any():
            return []
        if self.classes is None:
            return [self.values[scored]]
        return [
            self.values[scored & (self.classes == label)] for label in self.classes[scored].unique()
        ]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 4:
        return f"{len(value)} values"
    return f"{value:g}" if isinstance(value, float) else str(value)
