"""The results of ``fit`` and ``check``: small frozen records that print as tables."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerFit:
    """How well one operation was inverted for one target.

    Attributes:
        target: The class, as users write it.
        layer: Module path and operation.
        rows: Rows of the regression: the examples, for a convolution times the positions, or times
            the tiles where its windows tile the input.
        features: How many features are regressed, each with coefficients of its own.
        signals: How many signals each feature is regressed on.
        explained_variance: The share of the features' variance that the inverse explains on the
            fitting data, before the forward mask; at most 1.
        dead: How many signals never vary.
        condition: 1-norm condition number of the regularised Gram matrix; None for SGD.
        solver: "exact" or "sgd".
    """

    target: int | tuple[int, ...] | None
    layer: str
    rows: int
    features: int
    signals: int
    explained_variance: float
    dead: int
    condition: float | None
    solver: str


@dataclass(frozen=True)
class FitReport:
    """The fit of every layer for every target.

    Examples:
        >>> print(FitReport((LayerFit(3, "0/linear", 100, 784, 512, 0.81, 12, 5.2e3, "exact"),)))
        layer     rows  features  signals  explained variance  dead  condition  solver  targets
        0/linear   100       784      512               0.810    12    5.2e+03   exact        1
    """

    layers: tuple[LayerFit, ...]

    def __str__(self) -> str:
        header = (
            *("layer", "rows", "features", "signals", "explained variance", "dead", "condition"),
            *("solver", "targets"),
        )
        rows = []
        for name in dict.fromkeys(fit.layer for fit in self.layers):
            fits = [fit for fit in self.layers if fit.layer == name]
            conditions = [fit.condition for fit in fits if fit.condition is not None]
            row = (
                name,
                _span([fit.rows for fit in fits], "d"),
                fits[0].features,
                fits[0].signals,
                _span([fit.explained_variance for fit in fits], ".3f"),
                _span([fit.dead for fit in fits], "d"),
                f"{max(conditions):.1e}" if conditions else "",
                "/".join(sorted({fit.solver for fit in fits})),
                len(fits),
            )
            rows.append([str(cell) for cell in row])
        return table(header, rows)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return one dictionary for each layer and target."""
        return [asdict(fit) for fit in self.layers]


@dataclass(frozen=True)
class CheckRow:
    """One operation of a model.

    Attributes:
        path: The path of its module.
        operation: Its name.
        status: "supported" by a rule, "passes" if its adjoint is right, or "refused".
        note: What happens to the signal there.
        caveat: In what respect the method does not hold there; empty for none.
    """

    path: str
    operation: str
    status: str
    note: str
    caveat: str = ""


@dataclass(frozen=True)
class CheckReport:
    """Every operation between input and output of a model."""

    rows: tuple[CheckRow, ...]

    @property
    def refused(self) -> tuple[CheckRow, ...]:
        """The operations that no signal can be sent back through."""
        return tuple(row for row in self.rows if row.status == "refused")

    @property
    def caveats(self) -> tuple[CheckRow, ...]:
        """The operations that do not conserve the signal, or that the method does not define."""
        return tuple(row for row in self.rows if row.caveat)

    @property
    def ok(self) -> bool:
        """True if the whole model can be inverted."""
        return not self.refused

    def __str__(self) -> str:
        header = ("module", "operation", "status", "what happens to the signal", "but")
        rows = [
            (row.path or "(model)", row.operation, row.status, row.note, row.caveat)
            for row in self.rows
        ]
        columns = 5 if self.caveats else 4
        return table(header[:columns], [row[:columns] for row in rows], left=columns)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return columns of text, of which the first ``left`` are aligned left, the others right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _span(values: Sequence[float], form: str) -> str:
    """Return the range of some values, or the one value that they have."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}-{high}"
