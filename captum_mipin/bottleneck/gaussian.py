"""Gaussian information bottlenecks: noise replaces features that a prediction does not need.

A bottleneck replaces x by z = λ x + (1 − λ) ε, where ε is normal noise with the mean μ and the
standard deviation σ that each element has on data. The information of z about x is at most
KL[p(z|x) ‖ q(z)], where q is the distribution of z without any information about x. The mask
λ = sigmoid(α) is optimised for each sample by gradient descent on
cross entropy + β · mean information. This module does not depend on networks or graphs.

Source: Schulz et al., "Restricting the Flow: Information Bottlenecks for Attribution", ICLR 2020.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from captum_mipin.calls import made_by_name
from captum_mipin.errors import CaptureError, InputError, TargetError
from captum_mipin.options import check_number
from captum_mipin.types import Target

#: Number of steps in each of the two windows whose mean losses decide if a sample has converged.
_WINDOW = 3

#: The largest |α| of a mask. With larger values the logarithm of 1 − λ is not finite.
_WIDEST = 80


def check_tolerance(tolerance: float | None) -> None:
    """Raise InputError unless a tolerance is a finite number above 0, or None."""
    if tolerance is not None:
        check_number("tolerance", tolerance, above=True)


@made_by_name
@dataclass(frozen=True)
class Bottleneck:
    """The settings of a mask's optimisation; the defaults are those of Schulz et al.

    Attributes:
        beta: β, the factor of the mean information (nats per element) in the loss.
        steps: Number of steps of Adam.
        learning_rate: Learning rate of Adam.
        copies: Number of noisy copies of each sample; each step draws new noise.
        sigma: Standard deviation, in positions, of the Gaussian that smooths the mask; 0 for no
            smoothing.
        start: The initial α of all elements, where λ = sigmoid(α).
        tolerance: Largest relative change of a sample's mean loss, from three steps to the next
            three, at which its optimisation stops. None: it takes all steps.

    Raises:
        InputError: A value is out of its range.

    Examples:
        >>> Bottleneck(beta=5).beta
        5
    """

    beta: float = 10.0
    steps: int = 10
    learning_rate: float = 1.0
    copies: int = 10
    sigma: float = 1.0
    start: float = 5.0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_number("beta", self.beta)
        check_number("steps", self.steps, whole=True)
        check_number("learning_rate", self.learning_rate, above=True)
        check_number("copies", self.copies, 1, whole=True)
        check_number("sigma", self.sigma)
        check_number("start", self.start, -_WIDEST)
        check_tolerance(self.tolerance)
        if self.start > _WIDEST:
            raise InputError(
                f"start={self.start!r} must be between {-_WIDEST} and {_WIDEST}, because beyond "
                "the gradient is 0: change it"
            )


@dataclass(frozen=True)
class Noise:
    """The noise that replaces masked elements of a tensor.

    Attributes:
        mean: μ, the mean of the noise; it broadcasts against one sample of the tensor.
        std: σ, the standard deviation of the noise, shaped like ``mean``.
        active: Mask of active elements, shaped like ``mean``. An inactive element is replaced by
            0, and its information is 0.
    """

    mean: Tensor
    std: Tensor
    active: Tensor


@dataclass(frozen=True)
class Optimised:
    """The optimised bottlenecks of some samples.

    Attributes:
        information: (batch, ...) the information of each element, in bits. As in the released
            code, it is that of the last forward pass, so of the masks before their last step.
        alpha: (batch, ...) the parameter α of the masks after their last step; the mask is
            λ = sigmoid(α), smoothed.
        losses: (steps, batch) the loss before each step; NaN after a sample has stopped.
        cross_entropy: (steps, batch) the cross entropy in this loss; NaN after a sample has
            stopped.
    """

    information: Tensor
    alpha: Tensor
    losses: Tensor
    cross_entropy: Tensor


def joined(groups: Sequence[Optimised]) -> Optimised:
    """Return the bottlenecks of several groups of samples, concatenated along the batch."""
    alike = [(part.information, part.alpha) for part in groups]
    by_step = [(part.losses, part.cross_entropy) for part in groups]
    information, alpha = (torch.cat(parts) for parts in zip(*alike, strict=True))
    losses, entropy = (torch.cat(parts, 1) for parts in zip(*by_step, strict=True))
    return Optimised(information, alpha, losses, entropy)


def information(r: Tensor, passed: Tensor, blocked: Tensor, prior: Tensor | float = 0.0) -> Tensor:
    """Return each element's information KL[N(λ r, (1 − λ)²) ‖ N(m λ r, (1 − m λ)²)] in nats.

    Args:
        r: (batch, ...) the standardised elements, (x − μ) / σ.
        passed: λ, shaped like ``r``.
        blocked: 1 − λ, shaped like ``r``. It is an argument of its own, because 1 − λ loses its
            digits to rounding when λ is near 1.
        prior: m, the mask of a prior; information that passes the mask m λ is not counted. With
            m = 0 all information is counted, and the second distribution is N(0, 1).

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
    """Smooth a tensor along some dimensions with a Gaussian kernel, and return the result.

    Args:
        x: The tensor. It is padded by reflection at its borders.
        sigma: σ, the standard deviation of the kernel, in positions. The kernel has
            2·round(2σ) + 1 positions.
        positions: The dimensions along which to smooth.

    Raises:
        InputError: A dimension has too few positions for the padding.
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
                f"a map of {size} positions cannot be smoothed with sigma={sigma:g}, which needs "
                f"more than {reach} positions: use a layer with a larger map, or pass "
                "settings=Bottleneck(sigma=0)"
            )
        rows = x.movedim(dim, -1)
        padded = F.pad(rows.reshape(-1, 1, size), (reach, reach), mode="reflect")
        x = F.conv1d(padded, kernel).reshape(rows.shape).movedim(-1, dim)
    return x


class _Masked:
    """A tensor behind a mask: a function of α that returns its information and its values."""

    def __init__(
        self, x: Tensor, noise: Noise, sigma: float, positions: Sequence[int], prior: Tensor | float
    ) -> None:
        # half precision has too few digits for the noise and its logarithms
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        parts = (noise.mean, noise.std, noise.active)
        self._mean, self._std, self._active = (part.to(x.device, self.dtype) for part in parts)
        self.r = (x.to(self.dtype) - self._mean) / self._std
        self._sigma, self._positions, self._prior = sigma, positions, prior

    def __call__(self, alpha: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Return the information of each element in nats, and the masked tensor z.

        Args:
            alpha: (batch, ...) the parameter α of the mask.
            normal: (copies, 1, ...) standard normal noise n, the same for all samples.
        """
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
    """Optimise a mask for each sample; all get the same noise, so they do not affect each other.

    Args:
        x: (batch, ...) the tensor to be masked.
        noise: The noise that replaces masked elements.
        cross_entropy: Masked copies (copies, batch, ...) → their mean cross entropy (batch,).
        settings: The settings of the optimisation.
        positions: Dimensions of ``x`` along which the mask is smoothed.
        prior: (batch, ...) mask of a prior, or 0 for no prior; see :func:`information`.
        seed: Seed of the noise.
        first: Number of the first sample, for errors.
        bar: Progress bar, advanced by the batch size after each step.

    Raises:
        InputError: A loss or gradient is NaN or Inf.
        CaptureError: The cross entropy has no gradient.
    """
    masked = _Masked(x, noise, settings.sigma, positions, prior)
    generator = torch.Generator(x.device).manual_seed(seed)
    alpha = torch.full_like(masked.r, settings.start).requires_grad_()
    adam = torch.optim.Adam([alpha], lr=settings.learning_rate)
    stopped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with torch.no_grad():
        told = masked(alpha, torch.zeros_like(masked.r))[0]  # the result without any step
    losses = torch.full((2, settings.steps, len(x)), math.nan, dtype=masked.dtype, device=x.device)
    for step in range(settings.steps):
        draw = normal(generator, settings.copies, 1, *x.shape[1:]).to(masked.dtype)
        told, z = masked(alpha, draw)
        entropy = cross_entropy(z.to(x.dtype)).to(masked.dtype)
        if not entropy.requires_grad:
            raise CaptureError(
                "no gradient of the model's output reaches the layer: use a layer that affects it"
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
    return Optimised(told.detach() / math.log(2), alpha.detach(), *losses)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Return standard normal noise in float32; masks of any dtype get the same noise."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


def _check_finite(loss: Tensor, gradient: Tensor, stopped: Tensor, step: int, first: int) -> None:
    """Raise InputError if the loss or gradient of a sample is NaN or Inf before it has stopped."""
    fine = torch.isfinite(loss.detach()) & torch.isfinite(gradient.flatten(1)).all(1) | stopped
    if not bool(fine.all()):
        raise InputError(
            f"the loss of sample {first + int((~fine).nonzero()[0])} or its gradient is NaN or Inf "
            f"at step {step}: the model's values overflow when the bottleneck's noise replaces "
            "features. Check the features' standard deviations, or remove this sample"
        )


def settled(losses: Tensor, tolerance: float | None) -> Tensor:
    """Return a mask of the samples that have converged: their mean loss has hardly changed.

    Args:
        losses: (steps, batch) the losses up to now.
        tolerance: Largest relative change of the mean loss, from three steps to the next three.
            None: no sample has converged.

    Returns:
        (batch,) True for a sample that has converged.
    """
    if tolerance is None or len(losses) < 2 * _WINDOW:
        return torch.zeros(losses.shape[1], dtype=torch.bool, device=losses.device)
    late, early = losses[-_WINDOW:].mean(0), losses[-2 * _WINDOW : -_WINDOW].mean(0)
    return (late - early).abs() <= tolerance * early.abs()


class CrossEntropy:
    """The cross entropy of each sample's target, the mean over several copies of the logits.

    If the model has one logit per example, its sign is the predicted class. The target is then the
    sign of the logit without noise.

    Args:
        logits: (batch, *dims) the model's output without noise.
        targets: The target of each sample.
        classes: The dimension of ``logits`` that holds the classes.

    Raises:
        TargetError: ``logits`` has no such dimension, or its size is 1.
    """

    def __init__(self, logits: Tensor, targets: Sequence[Target], classes: int = 1) -> None:
        self._classes = classes if classes < 0 else classes + 1  # dimension 0 will be the copies
        self._sign: Tensor | None = None
        if logits.ndim == 1 or logits[0].numel() == 1:
            self._sign = torch.where(logits.flatten() > 0, 1.0, -1.0).to(logits.dtype)
        elif classes == 0 or not -logits.ndim < classes < logits.ndim or logits.shape[classes] == 1:
            raise TargetError(
                f"the model's output has shape {tuple(logits.shape)}, so dimension {classes} "
                "cannot hold the classes: pass the dimension that does as classes="
            )
        index = torch.tensor(targets, device=logits.device).reshape(len(logits), -1)
        self._index = (torch.arange(len(logits), device=logits.device), *index.unbind(1))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the cross entropy (batch,) of logits (copies · batch, *dims)."""
        copies = logits.unflatten(0, (-1, len(self._index[0])))
        if self._sign is not None:
            # −log sigmoid(± y) = softplus(∓ y)
            return F.softplus(-copies.reshape(len(copies), -1) * self._sign).mean(0)
        chosen = copies.log_softmax(self._classes)[(slice(None), *self._index)]
        mean: Tensor = -chosen.mean(0)
        return mean
