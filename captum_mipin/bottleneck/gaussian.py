"""Gaussian information bottlenecks: noise replaces what a prediction can do without.

A bottleneck passes z = λ x + (1 − λ) ε instead of x, where ε is normal with the mean μ and the
standard deviation σ that each element has on data. What z tells of x is at most
KL[p(z|x) ‖ q(z)], q being what passes without knowing x. The mask λ = sigmoid(α) is optimised for
each sample by gradient descent on cross entropy + β · mean information. This module knows
no networks.

Source: Schulz et al., "Restricting the Flow: Information Bottlenecks for Attribution", ICLR 2020.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from captum_mipin.errors import CaptureError, InputError, TargetError
from captum_mipin.types import Target

#: A sample has settled if its mean loss over so many steps hardly differs from that before.
_WINDOW = 3

#: The largest parameter of a mask: with larger ones the logarithm of 1 − λ is not finite.
_WIDEST = 80


def check_settings(settings: object, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raise InputError for the first setting out of its range.

    Args:
        settings: An object with settings as attributes.
        rules: Name of a setting → whether its value is valid, and which values are.
    """
    for name, (valid, expected) in rules.items():
        if not valid:
            raise InputError(f"{name}={getattr(settings, name)!r} {expected}")


def is_whole(value: object, least: int) -> bool:
    """Return True if ``value`` is an int of at least ``least``; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Bottleneck:
    """How a mask is optimised; the defaults are those of Schulz et al.

    Attributes:
        beta: β, weight of the mean information (nats an element) against the cross entropy.
        steps: Steps of Adam.
        learning_rate: Learning rate of Adam.
        copies: Noisy copies of each sample, drawn anew in each step.
        sigma: Standard deviation, in positions, of the Gaussian that smooths the mask; 0 for none.
        start: The first α, where λ = sigmoid(α).
        tolerance: A sample stops once the mean loss of three steps differs from that of the three
            before by at most this share; None to take all steps.

    Raises:
        InputError: A value is out of its range.
    """

    beta: float = 10.0
    steps: int = 10
    learning_rate: float = 1.0
    copies: int = 10
    sigma: float = 1.0
    start: float = 5.0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        number, whole = "must be a number of at least 0", "must be a whole number of at least"
        between = f"must be between {-_WIDEST} and {_WIDEST}: no gradient moves others"
        settles = self.tolerance is None or self.tolerance > 0
        rules = {
            "beta": (0 <= self.beta < math.inf, number),
            "steps": (is_whole(self.steps, 0), f"{whole} 0"),
            "learning_rate": (0 < self.learning_rate < math.inf, "must be above 0"),
            "copies": (is_whole(self.copies, 1), f"{whole} 1"),
            "sigma": (0 <= self.sigma < math.inf, number),
            "start": (abs(self.start) <= _WIDEST, between),
            "tolerance": (settles, "must be above 0, or None"),
        }
        check_settings(self, rules)


@dataclass(frozen=True)
class Noise:
    """The noise that replaces a tensor's elements where they are masked.

    Attributes:
        mean: μ of each element, or of several where it broadcasts.
        std: σ, shaped like ``mean``.
        active: 0 where an element is left out: it passes nothing, and tells nothing; else 1.
    """

    mean: Tensor
    std: Tensor
    active: Tensor


@dataclass(frozen=True)
class Optimised:
    """The optimised bottlenecks of some samples.

    Attributes:
        information: (batch, ...) what each element tells, in bits.
        alpha: (batch, ...) the masks' parameter α before smoothing, λ = sigmoid(α).
        losses: (steps, batch) the loss before each step; NaN after a sample has stopped.
        cross_entropy: (steps, batch) the part of the loss that is not information.
    """

    information: Tensor
    alpha: Tensor
    losses: Tensor
    cross_entropy: Tensor


def joined(groups: Sequence[Optimised]) -> Optimised:
    """Return several groups of samples as one."""
    alike = [(part.information, part.alpha) for part in groups]
    by_step = [(part.losses, part.cross_entropy) for part in groups]
    information, alpha = (torch.cat(parts) for parts in zip(*alike, strict=True))
    losses, entropy = (torch.cat(parts, 1) for parts in zip(*by_step, strict=True))
    return Optimised(information, alpha, losses, entropy)


def information(r: Tensor, passed: Tensor, blocked: Tensor, prior: Tensor | float = 0.0) -> Tensor:
    """Return KL[N(λ r, (1 − λ)²) ‖ N(m λ r, (1 − m λ)²)] in nats: what each element tells.

    Args:
        r: The elements, standardised: (x − μ) / σ.
        passed: λ.
        blocked: 1 − λ. It is passed by itself, since floating-point numbers near 1 are too coarse
            for 1 − λ.
        prior: m, the mask of what is known already; with 0 the KL is against N(0, 1).

    Examples:
        >>> half = torch.tensor([0.5])
        >>> information(torch.tensor([2.0]), half, half)
        tensor([0.8181])
        >>> information(torch.tensor([2.0]), half, half, prior=torch.tensor([1.0]))
        tensor([0.])
    """
    width = blocked + (1 - prior) * passed  # 1 − m λ
    ratio, shift = blocked / width, passed * (1 - prior) * r / width
    # KL[N(a, s²) ‖ N(b, t²)] = ((a − b)² / t² + s² / t² − 1) / 2 − log(s / t)
    return ((shift.square() + ratio.square() - 1) / 2 - ratio.log()).clamp(min=0)


def mask(alpha: Tensor, sigma: float, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return λ = sigmoid(α) and 1 − λ = sigmoid(−α), both smoothed over positions."""
    alpha = alpha.clamp(max=_WIDEST)
    return smooth(alpha.sigmoid(), sigma, positions), smooth((-alpha).sigmoid(), sigma, positions)


def smooth(x: Tensor, sigma: float, positions: Sequence[int]) -> Tensor:
    """Return a Gaussian mean over some dimensions, 2·round(2σ) + 1 wide, reflected at the borders.

    Raises:
        InputError: A dimension is too small to be reflected.
    """
    reach = round(2 * sigma)
    if not reach or not positions:
        return x
    at = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    for dim in positions:
        size = x.shape[dim]
        if size <= reach:
            raise InputError(
                f"a map of {size} positions cannot be smoothed with sigma={sigma:g}, which reaches "
                f"{reach} beyond its border: take a layer with a larger map, or sigma=0"
            )
        rows = x.movedim(dim, -1)
        padded = F.pad(rows.reshape(-1, 1, size), (reach, reach), mode="reflect")
        x = F.conv1d(padded, kernel).reshape(rows.shape).movedim(-1, dim)
    return x


class _Masked:
    """A tensor behind a mask: what passes, and what it tells."""

    def __init__(
        self, x: Tensor, noise: Noise, sigma: float, positions: Sequence[int], prior: Tensor | float
    ) -> None:
        # half precision is too coarse for the noise and its logarithms
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        parts = (noise.mean, noise.std, noise.active)
        self._mean, self._std, self._active = (part.to(x.device, self.dtype) for part in parts)
        self.r = (x.to(self.dtype) - self._mean) / self._std
        self._sigma, self._positions, self._prior = sigma, positions, prior

    def __call__(self, alpha: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Return the information of each element in nats, and z for standard normal noise."""
        passed, blocked = mask(alpha, self._sigma, self._positions)
        # z = λ x + (1 − λ) ε with x = σ r + μ and ε = σ n + μ
        z = ((passed * self.r + blocked * normal) * self._std + self._mean) * self._active
        return information(self.r, passed, blocked, self._prior) * self._active, z


def optimise(
    x: Tensor,
    noise: Noise,
    cross_entropy: Callable[[Tensor], Tensor],
    settings: Bottleneck,
    *,
    positions: Sequence[int] = (),
    prior: Tensor | float = 0.0,
    seed: int = 0,
    first: int = 0,
    bar: "tqdm[Any] | None" = None,
) -> Optimised:
    """Optimise a mask for each sample, each as if it were alone: all meet the same noise.

    Args:
        x: (batch, ...) the tensor to be masked.
        noise: What replaces it.
        cross_entropy: Masked copies (copies, batch, ...) → (batch,), the mean over the copies.
        settings: How to optimise.
        positions: Dimensions of ``x`` over which the mask is smoothed.
        prior: The mask of what is known already, see :func:`information`.
        seed: Seed of the noise.
        first: Number of the first sample, for errors.
        bar: A progress bar.

    Raises:
        InputError: A loss or gradient is NaN or Inf.
        CaptureError: The cross entropy has no gradient.
    """
    masked = _Masked(x, noise, settings.sigma, positions, prior)
    generator = torch.Generator(x.device).manual_seed(seed)
    alpha = torch.full_like(masked.r, settings.start).requires_grad_()
    adam = torch.optim.Adam([alpha], lr=settings.learning_rate)
    stopped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    losses = torch.full((2, settings.steps, len(x)), math.nan, dtype=masked.dtype, device=x.device)
    for step in range(settings.steps):
        draw = normal(generator, settings.copies, 1, *x.shape[1:]).to(masked.dtype)
        told, z = masked(alpha, draw)
        entropy = cross_entropy(z.to(x.dtype)).to(masked.dtype)
        if not entropy.requires_grad:
            raise CaptureError(
                "no gradient of the model's output reaches the layer: take another layer"
            )
        # L = L_CE + β L_I (Schulz et al.)
        loss = entropy + settings.beta * told.flatten(1).mean(1)
        (alpha.grad,) = torch.autograd.grad(loss.sum(), alpha)
        _check_finite(loss, alpha.grad, stopped, step, first)
        losses[:, step] = torch.stack([loss, entropy]).detach().where(~stopped, math.nan)
        stopped |= settled(losses[0, : step + 1], settings.tolerance)
        before = alpha.detach().clone()
        adam.step()
        with torch.no_grad():
            alpha[stopped] = before[stopped]
        if bar is not None:
            bar.update(len(x))
        if bool(stopped.all()):
            break
    with torch.no_grad():
        bits = masked(alpha, torch.zeros_like(masked.r))[0] / math.log(2)
    return Optimised(bits, alpha.detach(), *losses)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Return standard normal noise in float32, so that it is the same for tensors of any dtype."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


def _check_finite(loss: Tensor, gradient: Tensor, stopped: Tensor, step: int, first: int) -> None:
    """Raise InputError if a sample that goes on has a loss or gradient that is NaN or Inf."""
    fine = torch.isfinite(loss.detach()) & torch.isfinite(gradient.flatten(1)).all(1) | stopped
    if not bool(fine.all()):
        raise InputError(
            f"the loss of sample {first + int((~fine).nonzero()[0])} or its gradient is NaN or Inf "
            f"at step {step}: the model overflows when the noise of the bottleneck replaces "
            "features. Look at their standard deviations, or leave this sample out"
        )


def settled(losses: Tensor, tolerance: float | None) -> Tensor:
    """Return for each sample (column) whether its loss has hardly changed in the last steps."""
    if tolerance is None or len(losses) < 2 * _WINDOW:
        return torch.zeros(losses.shape[1], dtype=torch.bool, device=losses.device)
    late, early = losses[-_WINDOW:].mean(0), losses[-2 * _WINDOW : -_WINDOW].mean(0)
    return (late - early).abs() <= tolerance * early.abs()


class CrossEntropy:
    """The cross entropy of each sample's target, from logits of several copies.

    A model with one logit an example decides by its sign; the target is then what it decides.

    Args:
        logits: (batch, *dims) the model's output without any noise.
        targets: One class for each sample.
        classes: The dimension of ``logits`` that holds the classes.

    Raises:
        TargetError: The dimension holds one class only, or is not there.
    """

    def __init__(self, logits: Tensor, targets: Sequence[Target], classes: int = 1) -> None:
        self._classes = classes if classes < 0 else classes + 1  # behind the copies
        self._sign: Tensor | None = None
        if logits.ndim == 1 or logits[0].numel() == 1:
            self._sign = torch.where(logits.flatten() > 0, 1.0, -1.0).to(logits.dtype)
        elif classes == 0 or not -logits.ndim < classes < logits.ndim or logits.shape[classes] == 1:
            raise TargetError(
                f"the model's output has shape {tuple(logits.shape)}, so dimension {classes} "
                "cannot hold the classes: say which one does with classes="
            )
        index = torch.tensor(targets, device=logits.device).reshape(len(logits), -1)
        self._index = (torch.arange(len(logits), device=logits.device), *index.unbind(1))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return (batch,) the mean over the copies of logits (copies · batch, *dims)."""
        copies = logits.unflatten(0, (-1, len(self._index[0])))
        if self._sign is not None:
            # −log sigmoid(± y) = softplus(∓ y)
            return F.softplus(-copies.reshape(len(copies), -1) * self._sign).mean(0)
        chosen = copies.log_softmax(self._classes)[(slice(None), *self._index)]
        mean: Tensor = -chosen.mean(0)
        return mean
