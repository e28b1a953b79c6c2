"""The rows of one regression, for steps with fewer rows than signals."""

import torch
from torch import Tensor

from captum_mipin.graph.validate import finite
from captum_mipin.regression.dual import Rows, RowSolution, solve_rows, solve_table
from captum_mipin.regression.ridge import RidgeScale, Solution
from captum_mipin.rules import Inverse
from captum_mipin.rules.linear import Convolution, Dense
from captum_mipin.types import Target


class Table:
    """The features and the signals of all batches of one step, and the solver by the dual.

    Args:
        inverter: The family of inverses.
        rows: The rows of features, if an earlier regression of this step has made them.

    Attributes:
        rows: The rows of features that all classes share; None before the first class is solved,
            and if the step's features have own signals or the step is a convolution.
    """

    def __init__(self, inverter: Dense | Convolution, rows: Rows | None) -> None:
        self._inverter, self.rows = inverter, rows
        self._x: list[Tensor] = []
        self._signals: dict[Target, list[tuple[Tensor, list[Tensor]]]] = {}

    def add(
        self,
        x: Tensor,
        target: Target,
        signals: tuple[Tensor, ...],
        places: Tensor | None = None,
    ) -> bool:
        """Add a batch for one target, and return False if a value is NaN or Inf.

        Args:
            x: The features of the batch.
            target: The target; the first target's features serve all targets.
            signals: The signals of the batch.
            places: Indices of the positions that a convolution is fitted on; None for all.
        """
        inverter = self._inverter
        drawn = () if places is None or isinstance(inverter, Dense) else (places,)
        rows, s, own = inverter.rows(x, signals, *drawn)
        parts = self._signals.setdefault(target, [])
        if target == next(iter(self._signals)):
            self._x.append(rows[0])
        parts.append((s[0], own))
        return all(map(finite, (x, s, *own)))

    @property
    def count(self) -> int:
        """Return the number of rows."""
        return sum(map(len, self._x))

    def solve(
        self, target: Target, ridge: float, scale: RidgeScale
    ) -> tuple[Inverse, Solution | RowSolution, int]:
        """Return the inverse of a target, its solution, and the number of signals left out.

        This drops the signals of the target.
        """
        parts, owns = zip(*self._signals.pop(target), strict=True)
        s, own = torch.cat(parts), [torch.cat(o, 1) for o in zip(*owns, strict=True)]
        if isinstance(self._inverter, Convolution) or own:
            x = torch.cat(self._x)
            solution = solve_table(torch.cat([x.unsqueeze(0), *own]), s, ridge, scale)
            return self._inverter.inverse(solution, x), solution, 0
        self.rows = self.rows or Rows(torch.cat(self._x))
        live = s.any(0).nonzero().squeeze(1)
        factored = solve_rows(self.rows, s[:, live], ridge, scale)
        inverse = self._inverter.inverse_of_rows(factored, live, self.rows)
        return inverse, factored, s.shape[1] - len(live)
