"""Paired differences between the methods of a comparison, and whether they are more than noise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isnan, nan

from captum_mipin.comparison.rows import Row
from captum_mipin.metrics import Result

#: Quantile 0.975 of the normal distribution.
_Z = 1.959964


@dataclass(frozen=True)
class Difference:
    """The difference between two methods by one metric, image by image.

    Attributes:
        metric: Name of the metric.
        name: Label of the method.
        other: Label of the method that it is compared with.
        result: Score of ``name`` minus score of ``other`` for each image that both scored; ``mean``
            and ``standard_error`` are those of these paired differences.
    """

    metric: str
    name: str
    other: str
    result: Result

    @property
    def within_noise(self) -> bool:
        """True if 0 lies in the 95 % confidence interval of the mean, by Student's t.

        Also True for fewer than three images: they allow no statement.
        """
        mean, error, n = self.result.mean, self.result.standard_error, self.result.n
        return n < 3 or isnan(error) or abs(mean) <= student(n - 1) * error

    def __str__(self) -> str:
        mean, error = self.result.mean, self.result.standard_error
        noise = ", within noise" if self.within_noise else ""
        return f"{self.metric}: {self.name} - {self.other} = {mean:.3g} ± {error:.2g}{noise}"


def student(freedom: int) -> float:
    """Return the quantile 0.975 of Student's t distribution with ``freedom`` ≥ 2 degrees.

    Source: Abramowitz and Stegun, formula 26.7.5; the error is below 0.14, from 4 degrees below
    0.006.
    """
    # t = z + g1/ν + g2/ν² + g3/ν³ + g4/ν⁴, z the normal quantile, ν the degrees of freedom
    z, v = _Z, freedom
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / v + g2 / v**2 + g3 / v**3 + g4 / v**4


def best(rows: Sequence[Row], metric: str) -> Row | None:
    """Return the row with the best mean score; None if no row has one, or no score is better."""
    known = [row for row in rows if not isnan(_mean(row, metric))]
    if not known or known[0].results[metric].better == "neither":
        return None
    pick = max if known[0].results[metric].better == "higher" else min
    return pick(known, key=lambda row: _mean(row, metric))


def difference(row: Row, other: Row, metric: str) -> Difference:
    """Return the paired difference of two rows that both have a result of ``metric``."""
    ours, theirs = row.results[metric], other.results[metric]
    values = ours.values - theirs.values
    result = replace(ours, values=values, curves=None, parts={}, unscored={})
    return Difference(metric, row.name, other.name, result)


def sentences(rows: Sequence[Row], metric: str) -> list[str]:
    """Return what the paired differences of a metric say: who is best, and what is only noise."""
    methods = [row for row in rows if not row.control]
    first, control = best(methods, metric), best([row for row in rows if row.control], metric)
    if first is None:
        return []
    title, told = metric.replace("_", " "), list[str]()
    if first.results[metric].n < 3:
        return [f"{title}: fewer than three images tell no difference from noise"]
    scored = [row for row in methods if metric in row.results]
    same = [row.name for row in scored if row is not first and _is_noise(row, first, metric)]
    if len(scored) > 1:
        rest = f"within noise of it: {', '.join(same)}" if same else "no other is within noise"
        told.append(f"{title}: best is {first.name}; {rest}")
    if control is not None:
        sign = 1 if first.results[metric].better == "higher" else -1
        weak = [row.name for row in scored if not _beats(row, control, metric, sign)]
        if weak:
            told.append(f"{title}: not better than {control.name}: {', '.join(weak)}")
    return told


def _is_noise(row: Row, other: Row, metric: str) -> bool:
    return difference(row, other, metric).within_noise


def _beats(row: Row, control: Row, metric: str, sign: int) -> bool:
    """Return True if a row is better than a control by more than noise."""
    between = difference(row, control, metric)
    return sign * between.result.mean > 0 and not between.within_noise


def _mean(row: Row, metric: str) -> float:
    return row.results[metric].mean if metric in row.results else nan
