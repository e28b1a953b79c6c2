"""What a fit is asked for, and what it returns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from captum_mipin.errors import InputError
from captum_mipin.graph.validate import check_choice
from captum_mipin.inverse.data import Activations
from captum_mipin.inverse.distributed import Processes
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.ridge import RidgeScale
from captum_mipin.report import LayerFit
from captum_mipin.rules import Inverse
from captum_mipin.types import Extras, Inputs, Target

Solver = Literal["exact", "sgd"]


@dataclass(frozen=True)
class Settings:
    """How the regressions are solved.

    Attributes:
        ridge: λ of equation 6.
        ridge_scale: The unit of λ, see :func:`captum_mipin.regression.ridge.solve`.
        shares: True for average pooling by recorded shares, False for an even spread.
        solver: "exact", or the paper's "sgd" for convolutions.
        epochs: Passes over the data of the SGD solver.
        learning_rate: Of the SGD solver; None for 1 / L, L being the largest curvature on the
            first batch.
        joint: True if what comes back to a tensor from several branches is learned together,
            False if it is summed up.
        double: True if products of moments are taken in float64, False for the model's dtype.
        sharing: True if all targets have one inverse below the first step.
        autocast: Name of the dtype in which forward passes compute products with weights; None for
            the model's dtype.
        positions: How many positions of each batch's maps convolutions are fitted on (int), or
            which share of them (float); None for all.
        seed: Draws these positions.

    Raises:
        InputError: λ or its unit is out of its range.
    """

    ridge: float = 1e-3
    ridge_scale: RidgeScale = "relative"
    shares: bool = True
    solver: Solver = "exact"
    epochs: int = 20
    learning_rate: float | None = None
    joint: bool = True
    double: bool = False
    sharing: bool = False
    autocast: str | None = None
    positions: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("ridge_scale", self.ridge_scale, ("relative", "mean", "sum"))
        if not 0 <= self.ridge < float("inf"):
            raise InputError(f"ridge={self.ridge!r} must be a number of at least 0")


@dataclass
class Fitted:
    """The result of a fit.

    Attributes:
        inverses: The inverses by target and by the key of the step.
        layers: How well each of them was fitted.
        information: For each target the bits that each feature shares with the target's output.
    """

    inverses: dict[Target, dict[str, Inverse]] = field(default_factory=dict)
    layers: list[LayerFit] = field(default_factory=list)
    information: dict[Target, Inputs] = field(default_factory=dict)

    def has(self, target: Target, key: str) -> bool:
        """Return True if a step is fitted for a target."""
        return key in self.inverses.get(target, {})


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """Everything that a fit needs.

    Attributes:
        model: The model, whose parameters are used as they are.
        surrogate: The module whose backward pass is the method.
        batches: The data; each pass goes through it once.
        targets: The classes to fit.
        settings: How the regressions are solved.
        memory: Bytes for what is kept of the data between layers, and as many for moments.
        progress: True to show a progress bar.
        processes: The processes that fit together, each with its own batches.
        example: A batch of one example, from which a process without data learns the shapes.
        activations: Where the start of the inverted part is kept, for classes fitted later; None
            if there are none.
    """

    model: nn.Module
    surrogate: Surrogate
    batches: Iterable[tuple[Inputs, Extras]]
    targets: Sequence[Target]
    settings: Settings
    memory: int
    progress: bool
    processes: Processes
    example: tuple[Inputs, Extras]
    activations: Activations | None = None
