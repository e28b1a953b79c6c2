"""The scale of the data of a fit, with which the scale of explained inputs is compared."""

import warnings
from collections.abc import Sequence
from math import hypot, isfinite

import torch
from torch import Tensor

from captum_mipin.errors import DataWarning
from captum_mipin.graph.validate import level_of_caller
from captum_mipin.types import Inputs

#: A fit on fewer examples gives a warning.
FEW = 10
#: Root mean square distance from the mean of the fit, in standard deviations of the fit, above
#: which inputs have another scale; and the share of these deviations below which they do.
_FAR, _NARROW = 20.0, 1 / 50
#: Values in 0 ... 1 deviate by at most 0.5: if those of images deviate more, they are normalised.
_NORMALISED = 0.6


class Scale:
    """Mean and standard deviation of all values of each input, added up batch by batch.

    Attributes:
        examples: Number of examples.
    """

    def __init__(self) -> None:
        self.examples = self._batches = 0
        self._sums: list[Tensor | None] = []

    def add(self, inputs: Inputs, index: int) -> None:
        """Add the batch with number ``index``, unless it has been added in an earlier pass."""
        if index < self._batches:
            return
        self._batches = index + 1
        self.examples += len(inputs[0])
        sums = [_sums(x) for x in inputs]
        before = self._sums or [None] * len(sums)
        pairs = zip(before, sums, strict=True)
        self._sums = [new if old is None or new is None else old + new for old, new in pairs]

    def moments(self) -> list[tuple[float, float] | None]:
        """Return the mean and the standard deviation of each input; None for integers."""
        found: list[tuple[float, float] | None] = []
        for sums in self._sums:
            if sums is None:
                found.append(None)
                continue
            count, first, second = sums.tolist()
            mean = first / count
            found.append((mean, max(second / count - mean * mean, 0.0) ** 0.5))
        return found


def _sums(x: Tensor) -> Tensor | None:
    """Return the count, the sum and the sum of squares of the values; None for integers."""
    if not x.is_floating_point():
        return None
    # float64 from the means of float32 or wider: sums of a large batch would lose digits
    deviation, mean = torch.var_mean(
        x.detach().flatten().to(torch.promote_types(x.dtype, torch.float32)), correction=0
    )
    deviation, mean = deviation.double(), mean.double()
    ones = torch.ones_like(mean)
    return x.numel() * torch.stack([ones, mean, deviation + mean**2])


def warn_of_few(examples: int) -> None:
    """Warn if the fit has so few examples that regressions of dense layers only memorise them."""
    if examples < FEW:
        warnings.warn(
            f"the fit has only {examples} examples, expected at least {FEW}: dense layers have one "
            "row for each example, and their inverses remember so few. Pass more data. (For the "
            "map of for_photographs, 5 did as well as 200 by box accuracy, see docs/results.md.)",
            DataWarning,
            stacklevel=level_of_caller(),
        )


def warn_of_scale(inputs: Inputs, fitted: Sequence[tuple[float, float] | None] | None) -> None:
    """Warn if explained inputs have quite another scale than the data of the fit.

    Args:
        inputs: The explained inputs.
        fitted: Mean and standard deviation of each input of the fit, None for integers; or None if
            they are not known.
    """
    for number, (x, moments) in enumerate(zip(inputs, fitted or (), strict=False)):
        if moments is None or not x.numel() or not moments[1] > 0:
            continue
        mean, deviation = moments
        variance, own = (float(t) for t in torch.var_mean(x.detach().float(), correction=0))
        # √E[(x − mean)²] in standard deviations of the fit
        far = hypot(variance**0.5, own - mean) / deviation
        # inputs of one value, such as a black image, have no scale
        narrow = 0 < variance**0.5 < _NARROW * deviation and len(x.unique()) > 2
        plain = x.ndim == 4 and deviation > _NORMALISED and _from_zero_to_one(x)
        # E[x²] ≤ E[x] for values in 0 ... 1
        fit_plain = x.ndim == 4 and mean**2 + deviation**2 <= mean
        moved = abs(own - mean) > deviation / 2  # which the noise of a NoiseTunnel is not
        normalised = fit_plain and moved and variance**0.5 > _NORMALISED and bool((x < 0).any())
        # values that overflow have an error of their own
        if (far > _FAR and isfinite(far)) or narrow or plain or normalised:
            name = f"input {number} has" if len(inputs) > 1 else "the inputs have"
            warnings.warn(
                f"{name} mean {own:.3g} and standard deviation {variance**0.5:.3g}, expected about "
                f"{mean:.3g} and {deviation:.3g} as in the fit: scale the inputs as for the fit, "
                "for example to 0 ... 1 instead of 0 ... 255, and normalise them as for the fit, "
                "or not if those of the fit were not",
                DataWarning,
                stacklevel=level_of_caller(),
            )


def _from_zero_to_one(x: Tensor) -> bool:
    """Return True for images of several values from 0 to 1, as before normalisation."""
    low, high = (float(bound) for bound in x.detach().aminmax())
    return low >= 0 and 0.5 < high <= 1 and low < high
