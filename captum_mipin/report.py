"""The results of ``fit`` and ``check``: small frozen records that print as tables."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from captum_mipin.calls import Helpful, no_list

_SINGLE = (
    "The model takes no free batch size, so it was captured for one example: each example of a "
    "batch is computed as if it were alone."
)
_DEAD = "dead: signals that never vary in the fit, as those of other classes next to the output"
#: Largest number of rows in a block that is looked for, and fewest rows that are left out.
_BLOCK, _FOLDED = 64, 40


@dataclass(frozen=True)
class LayerFit:
    """The quality of the inverse of one operation for one target.

    Attributes:
        target: The class, in the form of Captum's ``target``.
        layer: Module path and name of the operation.
        rows: Number of rows of the regression. This is the number of examples; for a convolution,
            it is multiplied by the number of positions, or by the number of tiles if the windows
            tile the input.
        features: Number of regressed features; each has its own coefficients.
        signals: Number of signals that each feature is regressed on.
        explained_variance: Share of the features' variance that the inverse explains on the
            fitting data, before the forward mask; at most 1.
        dead: Number of signals that never vary, such as those of a ReLU that is never active, or,
            next to the output, those of other classes. The inverse learns nothing from them.
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
class FitReport(Helpful):
    """The quality of the inverse of every layer for every target.

    Examples:
        >>> print(FitReport((LayerFit(3, "0/linear", 100, 784, 512, 0.81, 12, 5.2e3, "exact"),)))
        layer     rows  features  signals  explained variance  dead  condition  solver  targets
        0/linear   100       784      512               0.810    12    5.2e+03   exact        1
        dead: signals that never vary in the fit, as those of other classes next to the output
    """

    layers: tuple[LayerFit, ...]
    if not TYPE_CHECKING:  # type checkers still report it
        __getitem__ = no_list("take report.layers")

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
        text = table(header, rows)
        return f"{text}\n{_DEAD}" if any(fit.dead for fit in self.layers) else text

    def to_dict(self) -> list[dict[str, Any]]:
        """Return one dictionary per layer and target."""
        return [asdict(fit) for fit in self.layers]


@dataclass(frozen=True)
class CheckRow:
    """The result of ``check`` for one operation of a model.

    Attributes:
        path: Path of the module that contains the operation.
        operation: Name of the operation.
        status: "supported" if a rule inverts the operation, "passes" if its adjoint is the correct
            inverse, "refused" if it cannot be inverted.
        note: The effect of the operation on the signal.
        caveat: The property of the method that does not hold at this operation; empty if all hold.
    """

    path: str
    operation: str
    status: str
    note: str
    caveat: str = ""


@dataclass(frozen=True)
class CheckReport(Helpful):
    """The results of ``check`` for every operation between input and output of a model.

    If it is printed, a block of rows that repeats many times stands there once.

    Attributes:
        rows: One row per operation.
        single: Whether the model takes no free batch size. Then each example of a batch is
            explained as if it were alone.
    """

    rows: tuple[CheckRow, ...]
    single: bool = False
    if not TYPE_CHECKING:
        __getitem__ = no_list("take report.rows")

    @property
    def refused(self) -> tuple[CheckRow, ...]:
        """The operations that cannot send a signal back."""
        return tuple(row for row in self.rows if row.status == "refused")

    @property
    def caveats(self) -> tuple[CheckRow, ...]:
        """The operations that do not conserve the signal, or that the paper does not define."""
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
        text = table(header[:columns], _folded([row[:columns] for row in rows]), left=columns)
        return f"{text}\n{_SINGLE}" if self.single else text


def _folded(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return rows in which a block that repeats, as in recurrent layers, stands only once."""
    result, at = list[tuple[str, ...]](), 0
    while at < len(rows):
        size, times = _repetition(rows, at)
        result += rows[at : at + size]
        if times > 1:
            place, *others = rows[at]
            note = f"the {size} rows above, {times} times in all"
            result.append((place, *("..." for _ in others[:2]), note, *("" for _ in others[3:])))
        at += size * times
    return result


def _repetition(rows: Sequence[tuple[str, ...]], at: int) -> tuple[int, int]:
    """Return the size of the block that begins at a row, and how often it stands there."""
    for size in range(1, _BLOCK + 1):
        times, block = 1, rows[at : at + size]
        while rows[at + size * times : at + size * (times + 1)] == block:
            times += 1
        if size * (times - 1) >= _FOLDED:
            return size, times
    return 1, 1


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table as text; its first ``left`` columns are aligned left, the others right."""
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
    """Return the range of the values as text, such as "2-5", or "2" if all are equal."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}-{high}"
