"""Similarity of two maps: cosine, Pearson's and Spearman's correlation, structural similarity."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.metrics.maps import heat


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine (examples,) of the angle between maps (examples, ...).

    The cosine is NaN if a map is zero.

    Examples:
        >>> a, b = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        >>> cosine(a, b).tolist()
        [0.7071067811865475, nan]
    """
    # scale to maximum 1: squares of values near 1e-200 or 1e200 would become 0 or infinite
    a, b = _unit_maximum(a), _unit_maximum(b)
    # cos(a, b) = a·b / (‖a‖ ‖b‖)
    angle: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return angle


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation (rows,) between the rows of two tensors (rows, ...).

    The correlation is NaN if all entries of a row are within 1e-7 of the row's mean, relative to
    its largest absolute value: such differences can be rounding errors.
    """
    # cor(a, b) = cos(a - mean a, b - mean b)
    a, b = (x - x.mean(1, keepdim=True) for x in (_unit_maximum(a), _unit_maximum(b)))
    varies = (a.abs().amax(1) > 1e-7) & (b.abs().amax(1) > 1e-7)
    return torch.where(varies, cosine(a, b), torch.nan)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation (examples,) of maps (examples, ...).

    Equal entries have the mean of their ranks. The correlation is NaN if a map is constant.

    Examples:
        >>> a, b = torch.tensor([[1.0, 2.0, 2.0, 9.0]]), torch.tensor([[10.0, 30.0, 20.0, 40.0]])
        >>> round(float(spearman(a, b)), 12)
        0.948683298051
    """
    # Spearman's correlation = Pearson's correlation of the ranks
    return pearson(_ranks(a.double().flatten(1)), _ranks(b.double().flatten(1)))


def ssim(a: Tensor, b: Tensor, window: int = 5) -> Tensor:
    """Return the structural similarity (examples,) of maps (examples, height, width), 1 if equal.

    Each map is clipped at its percentiles 1 and 99 and scaled to [0, 1], as in Sixt et al. (ICML
    2020); a constant map becomes 0. All pixels of a window have equal weight, and variances are
    unbiased, as in scikit-image.

    Args:
        a: Maps (examples, height, width).
        b: Maps of the same shape, to compare with ``a``.
        window: Pixels along each side of a window; odd, from 3 to the shorter side of the maps.

    Source: Wang et al., IEEE TIP 2004, with K1 = 0.01, K2 = 0.03.

    Examples:
        >>> a = torch.rand(2, 8, 8)
        >>> ssim(a, 3 * a - 1).allclose(torch.ones(2).double())
        True
    """
    a, b = (_scaled(x.double())[:, None] for x in (a, b))

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    # means μ, and unbiased variances σ² and covariance σab, over each window
    unbiased = window**2 / (window**2 - 1)
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = unbiased * (mean(a * a) - mean_a**2), unbiased * (mean(b * b) - mean_b**2)
    both = unbiased * (mean(a * b) - mean_a * mean_b)
    # SSIM = (2 μa μb + C1)(2 σab + C2) / ((μa² + μb² + C1)(σa² + σb² + C2)), C1 = K1², C2 = K2²
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    structure = (2 * both + 9e-4) / (var_a + var_b + 9e-4)
    return (luminance * structure).flatten(1).mean(1)


def ssim_inputs(
    one: tuple[Tensor, ...], two: tuple[Tensor, ...], inputs: Tensor
) -> tuple[Tensor, Tensor, int] | None:
    """Return the arguments of :func:`ssim` for the maps of two methods.

    Args:
        one: Maps (examples, ...) of the first method.
        two: Maps of the second method, of the same shapes.
        inputs: The explained inputs (examples, ...).

    Returns:
        Two maps (examples, height, width), summed over channels, and the window's side: 5 pixels,
        or 3 for smaller maps. None if the maps are not images of at least 3 x 3 pixels.
    """
    a, b = (heat(maps[0], inputs) for maps in (one, two))
    if len(one) != 1 or a.ndim != 3 or min(a.shape[1:]) < 3:
        return None
    return a, b, 5 if min(a.shape[1:]) >= 5 else 3


def _unit_maximum(x: Tensor) -> Tensor:
    """Return rows (rows, entries) scaled to a largest absolute value of 1."""
    flat = x.double().flatten(1)
    return flat / flat.abs().amax(1, keepdim=True)


def _ranks(x: Tensor) -> Tensor:
    """Return the ranks (rows, entries) of entries in their row; NaN for a row that contains NaN."""
    ordered = x.sort(1).values
    # rank of x = (|{entries < x}| + |{entries ≤ x}| - 1) / 2, the mean rank of equal entries
    below = torch.searchsorted(ordered, x.contiguous())
    up_to = torch.searchsorted(ordered, x.contiguous(), right=True)
    ranks = (below + up_to - 1).double() / 2
    return ranks.masked_fill(x.isnan().any(1, keepdim=True), torch.nan)


def _scaled(x: Tensor) -> Tensor:
    """Return maps (examples, height, width) clipped at percentiles 1 and 99, scaled to [0, 1]."""
    # use NumPy, because torch.quantile refuses more than 2^24 numbers
    edges = np.percentile(x.flatten(1).numpy(force=True), (1, 99), axis=1)
    low, high = torch.from_numpy(edges).to(x)[..., None, None]
    span = high - low
    # x -> (clip(x, p1, p99) - p1) / (p99 - p1), where p1 and p99 are the percentiles;
    # a constant map becomes 0, and a map that contains NaN becomes NaN
    return torch.where(span == 0, 0.0, (x.clamp(low, high) - low) / span)
