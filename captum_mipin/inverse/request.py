"""The settings, the request and the result of a fit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from captum_mipin.inverse.data import Activations
from captum_mipin.inverse.distributed import Processes
from captum_mipin.options import check_choice, check_number
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.ridge import RidgeScale
from captum_mipin.report import LayerFit
from captum_mipin.rules import Inverse
from captum_mipin.types import Extras, Inputs, Target

Solver = Literal["exact", "sgd"]


@dataclass(frozen=True)
class Settings:
    """The settings of a fit and its regressions.

    Attributes:
        ridge: λ of equation 6.
        ridge_scale: The unit of λ, see :func:`captum_mipin.regression.ridge.solve`.
        shares: True if average pooling sends the signal back by recorded shares, False if it
            spreads the signal evenly.
        solver: "exact" for least squares, "sgd" for the paper's gradient descent on convolutions.
        epochs: Number of passes of the SGD solver over the data.
        learning_rate: Learning rate of the SGD solver; None for 1 / L, where L is the largest
            curvature on the first batch.
        joint: True to regress a tensor that several branches use on the signals of all branches
            together, False to sum up the signals of the branches.
        double: True to compute products of moments in float64, False for the model's dtype.
        sharing: True if all targets share the inverses of all steps but the first one, which is
            closest to the output.
        autocast: Name of the dtype in which forward passes compute products with weights; None for
            the model's dtype.
        positions: Number (int) or share (float) of the positions of each batch's maps that
            convolutions are fitted on; None for all.
        seed: Random seed for the choice of these positions.

    Raises:
        InputError: ``ridge`` or ``ridge_scale`` has a value that is not allowed.
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
        check_number("ridge", self.ridge)


@dataclass
class Fitted:
    """The result of a fit.

    Attributes:
        inverses: The inverses, by target and then by the key of the step.
        layers: The quality of each inverse.
        information: For each target, the bits that each feature shares with the target's output.
    """

    inverses: dict[Target, dict[str, Inverse]] = field(default_factory=dict)
    layers: list[LayerFit] = field(default_factory=list)
    information: dict[Target, Inputs] = field(default_factory=dict)

    def has(self, target: Target, key: str) -> bool:
        """Return True if a step is fitted for a target."""
        return key in self.inverses.get(target, {})


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """The model, the data and the options of one fit.

    Attributes:
        model: The model; its parameters are not changed.
        surrogate: The module whose backward pass computes source signals.
        batches: The data; each pass iterates over it once.
        targets: The classes to fit.
        settings: The settings of the fit and its regressions.
        memory: Bytes for data stored between layers, and as many again for moments.
        progress: True to show a progress bar.
        processes: The processes that fit together, each with its own batches.
        example: A batch of one example, which shows the shapes to a process without data.
        activations: Store for the values where the inverted part of the model starts, from which
            classes are fitted later; None if all classes are fitted at once.
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
