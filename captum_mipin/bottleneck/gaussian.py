"""Gaussian information bottlenecks: noise in place of whatever a prediction can do without.

A bottleneck lets z = λ x + (1 − λ) ε through instead of x, ε being normal with the mean μ and the standard deviation σ
that each element has on data. What z still tells of x is at most KL[p(z|x) ‖ q(z)], q being what passes without looking
at x. The mask λ = sigmoid(α) is found for each sample by gradient descent on cross entropy + β · mean information. This
module knows nothing of networks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from captum_mipin.errors import CaptureError, InputError, TargetError
from captum_mipin.types import Target

#: Steps over which the loss is averaged where a sample stops once it has settled.
_WINDOW = 3

#: The largest parameter of a mask, so that the logarithm of 1 − λ is finite.
_WIDEST = 80


@dataclass(frozen=True)
class Bottleneck:
    """How a mask is optimised; the defaults are those of Schulz et al.

    Attributes:
        beta: Weight of the mean information, in nats an element, against the cross entropy.
        steps: Of Adam.
        learning_rate: Of Adam.
        copies: Noisy copies of each sample, anew in each step.
        sigma: Standard deviation of the Gaussian that smooths the mask over positions; 0 for none.
        start: Of α, where λ = sigmoid(α).
        tolerance: A sample stops once the mean loss of three steps is within this share of that of the three before;
            None to take all steps.

    Raises:
        InputError: A value out of its range.

    Source: Schulz et al., "Restricting the Flow: Information Bottlenecks for Attribution", ICLR 2020.
    """

    beta: float = 10.0
    steps: int = 10
    learning_rate: float = 1.0
    copies: int = 10
    sigma: float = 1.0
    start: float = 5.0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name, value, fine, expected in (
            ("beta", self.beta, 0 <= self.beta < math.inf, "a number of at least 0"),
            (
                "steps",
                self.steps,
                whole(self.steps) and self.steps >= 0,
                "a whole number of at least 0",
            ),
            ("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "above 0"),
            (
                "copies",
                self.copies,
                whole(self.copies) and self.copies >= 1,
                "a whole number of at least 1",
            ),
            ("sigma", self.sigma, 0 <= self.sigma < math.inf, "a number of at least 0"),
            (
                "start",
                self.start,
                abs(self.start) <= _WIDEST,
                f"between {-_WIDEST} and {_WIDEST}: no gradient moves others",
            ),
            (
                "tolerance",
                self.tolerance,
                self.tolerance is None or self.tolerance > 0,
                "above 0, or None",
            ),
        ):
            if not fine:
                raise InputError(f"{name}={value!r} must be {expected}")


@dataclass(frozen=True)
class Noise:
    """What stands in for a tensor's elements where they are masked.

    Attributes:
        mean, std: Of each element, or of several where they broadcast.
        active: 1 where an element takes part; where 0, nothing passes and nothing is told.
    """

    mean: Tensor
    std: Tensor
    active: Tensor


@dataclass(frozen=True)
class Optimised:
    """Bottlenecks of some samples.

    Attributes:
        information: (batch, ...) what each element tells, in bits.
        alpha: (batch, ...) the masks' parameter α, before smoothing: λ = sigmoid(α).
        losses: (steps, batch) loss before each step; NaN after a sample has stopped.
        cross_entropy: (steps, batch) the part of it that is not information.
    """

    information: Tensor
    alpha: Tensor
    losses: Tensor
    cross_entropy: Tensor


def information(r: Tensor, passed: Tensor, blocked: Tensor, prior: Tensor | float = 0.0) -> Tensor:
    """KL[N(λ r, (1 − λ)²) ‖ N(m λ r, (1 − m λ)²)] in nats: what a bottleneck tells of each element.

    Args:
        r: The elements, standardised: (x − μ) / σ.
        passed: λ.
        blocked: 1 − λ, by itself since floating-point numbers near 1 have no room for it.
        prior: m, the mask of what is known without looking; with 0 the KL is against N(0, 1).

    Examples:
        >>> half = torch.tensor([0.5])
        >>> information(torch.tensor([2.0]), half, half)
        tensor([0.8181])
        >>> information(torch.tensor([2.0]), half, half, prior=torch.tensor([1.0]))
        tensor([0.])
    """
    width = blocked + (1 - prior) * passed  # 1 − m λ
    ratio, shift = blocked / width, passed * (1 - prior) * r / width
    return ((shift.square() + ratio.square() - 1) / 2 - ratio.log()).clamp(min=0)


def mask(alpha: Tensor, sigma: float, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """λ and 1 − λ of the parameter α, smoothed over positions."""
    alpha = alpha.clamp(max=_WIDEST)
    return smooth(alpha.sigmoid(), sigma, positions), smooth((-alpha).sigmoid(), sigma, positions)


def smooth(x: Tensor, sigma: float, positions: Sequence[int]) -> Tensor:
    """A Gaussian mean over some dimensions, reflected at the borders, 2·round(2σ) + 1 wide.

    Raises:
        InputError: A dimension is too small to be reflected.
    """
    reach = round(2 * sigma)
    if not reach or not positions:
        return x
    kernel = torch.exp(
        -(torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) ** 2) / (2 * sigma**2)
    )
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    for dim in positions:
        if x.shape[dim] <= reach:
            raise InputError(
                f"a map of {x.shape[dim]} positions cannot be smoothed with sigma={sigma:g}, which reaches {reach} beyond "
                "its border: take a layer with a larger map, or sigma=0"
            )
        rows = x.movedim(dim, -1)
        padded = F.pad(rows.reshape(-1, 1, x.shape[dim]), (reach, reach), mode="reflect")
        x = F.conv1d(padded, kernel).reshape(rows.shape).movedim(-1, dim)
    return x


def optimise(
    x: Tensor,
    noise: Noise,
    cross_entropy: Callable[[Tensor], Tensor],
    how: Bottleneck,
    *,
    positions: Sequence[int] = (),
    prior: Tensor | float = 0.0,
    seed: int = 0,
    first: int = 0,
    bar: "tqdm[Any] | None" = None,
) -> Optimised:
    """Find a mask for each sample; no sample has a part in another's.

    Every sample meets the same noise, so that what is found for it depends neither on its company nor on its place.

    Args:
        x: (batch, ...) the tensor to be masked.
        noise: What stands in for it.
        cross_entropy: Masked copies (copies, batch, ...) → (batch,), mean over the copies.
        how: How.
        positions: Dimensions of ``x`` over which the mask is smoothed.
        prior: The mask of what is known without looking, see :func:`information`.
        seed: Of the noise.
        first: Number of the first sample, for errors.
        bar: Moved by each step.

    Raises:
        InputError: A loss or gradient is NaN or Inf.
        CaptureError: The cross entropy has no gradient.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    mean, std, active = (part.to(x.device, kind) for part in (noise.mean, noise.std, noise.active))
    r = (x.to(kind) - mean) / std
    generator = torch.Generator(x.device).manual_seed(seed)
    alpha = torch.full_like(r, how.start).requires_grad_()
    adam = torch.optim.Adam([alpha], lr=how.learning_rate)
    stopped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    losses, entropies = (
        torch.full((how.steps, len(x)), math.nan, dtype=kind, device=x.device) for _ in range(2)
    )
    for step in range(how.steps):
        passed, blocked = mask(alpha, how.sigma, positions)
        told = information(r, passed, blocked, prior) * active
        draw = normal(generator, how.copies, 1, *r.shape[1:]).to(kind)
        z = ((passed * r + blocked * draw) * std + mean) * active
        entropy = cross_entropy(z.to(x.dtype)).to(kind)
        if not entropy.requires_grad:
            raise CaptureError(
                "no gradient of the model's output reaches the layer: nothing of it can be weighed"
            )
        loss = entropy + how.beta * told.flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(loss.sum(), alpha)
        _check(loss, gradient, stopped, step, first)
        losses[step], entropies[step] = (
            value.detach().where(~stopped, math.nan) for value in (loss, entropy)
        )
        stopped |= settled(losses[: step + 1], how.tolerance)
        before, alpha.grad = alpha.detach().clone(), gradient
        adam.step()
        with torch.no_grad():
            alpha[stopped] = before[stopped]
        if bar is not None:
            bar.update(len(x))
        if bool(stopped.all()):
            break
    with torch.no_grad():
        told = information(r, *mask(alpha, how.sigma, positions), prior) * active / math.log(2)
    return Optimised(told, alpha.detach(), losses, entropies)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal noise in float32, so that it is the same for tensors of any dtype."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


def _check(loss: Tensor, gradient: Tensor, stopped: Tensor, step: int, first: int) -> None:
    wrong = ~(torch.isfinite(loss.detach()) & torch.isfinite(gradient.flatten(1)).all(1) | stopped)
    if bool(wrong.any()):
        sample = first + int(wrong.nonzero()[0])
        raise InputError(
            f"the loss of sample {sample} or its gradient is NaN or Inf at step {step}: the model overflows when the noise of "
            "the bottleneck stands in for features. Look at their standard deviations, or leave this sample out"
        )


def settled(losses: Tensor, tolerance: float | None) -> Tensor:
    """Whether the loss of a sample has hardly changed of late."""
    if tolerance is None or len(losses) < 2 * _WINDOW:
        return torch.zeros(losses.shape[1], dtype=torch.bool, device=losses.device)
    late, early = losses[-_WINDOW:].mean(0), losses[-2 * _WINDOW : -_WINDOW].mean(0)
    return (late - early).abs() <= tolerance * early.abs()


def whole(value: object) -> bool:
    """Whether a setting is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


class CrossEntropy:
    """The cross entropy of each sample's target, from logits of several copies.

    A model with one logit an example says yes or no by its sign; there, the cross entropy is that of what it says.

    Args:
        logits: (batch, *dims) the model's own, without any noise.
        targets: One class a sample.
        classes: The dimension of ``dims`` that holds the classes.

    Raises:
        TargetError: That dimension holds one class only, others more.
    """

    def __init__(self, logits: Tensor, targets: Sequence[Target], classes: int = 1) -> None:
        self._classes = classes
        single = logits.ndim == 1 or logits[0].numel() == 1
        self._sign = (
            torch.where(logits.flatten() > 0, 1.0, -1.0).to(logits.dtype) if single else None
        )
        if not single and (
            not -logits.ndim < classes < logits.ndim or classes == 0 or logits.shape[classes] == 1
        ):
            raise TargetError(
                f"the model's output has shape {tuple(logits.shape)}, so dimension {classes} cannot hold the classes: "
                "say which one does with classes="
            )
        index = torch.tensor(targets, device=logits.device).reshape(len(logits), -1)
        self._index = (torch.arange(len(logits), device=logits.device), *index.unbind(1))

    def __call__(self, logits: Tensor) -> Tensor:
        """(copies · batch, *dims) → (batch,), mean over the copies."""
        copies = logits.unflatten(0, (-1, len(self._index[0])))
        if self._sign is not None:
            return F.softplus(-copies.reshape(len(copies), -1) * self._sign).mean(0)
        dim = self._classes if self._classes < 0 else self._classes + 1
        chosen = copies.log_softmax(dim)[(slice(None), *self._index)]
        mean: Tensor = -chosen.mean(0)
        return mean
