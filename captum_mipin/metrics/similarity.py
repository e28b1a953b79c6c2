"""How alike two maps are: rank correlation, cosine, structure."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(examples,) cosine of the angle between maps (examples, ...); NaN where one is zero.

    Examples:
        >>> cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist()
        [0.7071067811865475, nan]
    """
    a, b = (one.double().flatten(1) for one in (a, b))
    a, b = (
        one / one.abs().amax(1, keepdim=True) for one in (a, b)
    )  # no squares that over- or underflow
    found: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return found


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """(examples,) Spearman's rank correlation, equal entries having the mean of their ranks; NaN where one is constant.

    Examples:
        >>> spearman(torch.tensor([[1.0, 2.0, 2.0, 9.0]]), torch.tensor([[10.0, 30.0, 20.0, 40.0]])).tolist()
        [0.9486832980505138]
    """
    a, b = (ranks(one.double().flatten(1)) for one in (a, b))
    a, b = (one - one.mean(1, keepdim=True) for one in (a, b))
    found: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return found


def ranks(x: Tensor) -> Tensor:
    """Ranks of each row's entries, equal ones having their mean; NaN for rows with NaN."""
    ordered = x.sort(1).values
    below, upto = (
        torch.searchsorted(ordered, x.contiguous(), right=right) for right in (False, True)
    )
    return torch.where(x.isnan().any(1, keepdim=True), torch.nan, (below + upto - 1).double() / 2)


def ssim(a: Tensor, b: Tensor, window: int = 5) -> Tensor:
    """(examples,) structural similarity of maps (examples, height, width), 1 for equal ones (Wang et al., 2004).

    As Sixt et al. (ICML 2020) compare maps: each is cut at its percentiles 1 and 99 and scaled to [0, 1]; then uniform windows.
    A constant map becomes 0.

    Args:
        a, b: Maps.
        window: Pixels along each side, odd, at least 3, at most those of the maps.

    Examples:
        >>> a = torch.rand(2, 8, 8)
        >>> ssim(a, 3 * a - 1).allclose(torch.ones(2).double())
        True
    """
    a, b = (_scaled(one.double())[:, None] for one in (a, b))

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    pixels = window * window
    unbiased = pixels / (pixels - 1)
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = unbiased * (mean(a * a) - mean_a**2), unbiased * (mean(b * b) - mean_b**2)
    both = unbiased * (mean(a * b) - mean_a * mean_b)
    found = (
        (2 * mean_a * mean_b + 1e-4)
        * (2 * both + 9e-4)
        / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
    )
    return found.flatten(1).mean(1)


def ssim_window(height: int, width: int) -> int | None:
    """The window for maps of this size: 5, or what fits; None where even 3 does not."""
    largest = min(height, width, 5)
    largest -= largest % 2 == 0
    return largest if largest >= 3 else None


def _scaled(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    low, high = (_percentile(flat, share) for share in (0.01, 0.99))
    span = high - low
    return torch.where(
        span > 0,
        (flat.clamp(low, high) - low) / span.where(span > 0, 1),
        torch.where(span.isnan(), span, 0),
    ).view_as(x)


def _percentile(flat: Tensor, share: float) -> Tensor:
    """(examples, 1), as ``numpy.percentile``; of maps of any size, which ``torch.quantile`` does not take."""
    ordered = flat.sort(1).values
    place = share * (flat.shape[1] - 1)
    low = int(place)
    high = min(low + 1, flat.shape[1] - 1)
    return torch.lerp(ordered[:, low], ordered[:, high], place - low)[:, None]
