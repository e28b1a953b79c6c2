"""Gradient descent on equation 7: the paper's way to invert a convolution, for comparison."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from captum_mipin.errors import FitError
from captum_mipin.graph.validate import finite
from captum_mipin.rules import Inverse, Inverter
from captum_mipin.rules.linear import Convolution
from captum_mipin.targets import target_label
from captum_mipin.types import Target

#: Number of steps of the power iteration that estimates the largest curvature.
_POWERS = 20

#: The family of inverses, the features, and target → signals.
_Batch = tuple[Inverter, Tensor, Callable[[Target], tuple[Tensor, ...]]]


def descend(
    key: str,
    targets: Sequence[Target],
    epochs: Iterable[Iterable[_Batch]],
    rate: float | None,
) -> dict[Target, "Descent"]:
    """Learn the inverses of one convolution, batch by batch.

    Args:
        key: The key of the convolution's step, for error messages.
        targets: The classes.
        epochs: One iterable of batches per pass over the data.
        rate: The learning rate, as for :class:`Descent`.

    Raises:
        FitError: The descent diverged: weights are NaN or Inf.
    """
    states: dict[Target, Descent] = {}
    for epoch, batches in enumerate(epochs):
        for inverter, x, signals in batches:
            assert isinstance(inverter, Convolution)  # for mypy: the caller passes no other kind
            for target in targets:
                (s,) = signals(target)
                if target not in states:
                    states[target] = Descent(inverter, x, s, rate)
                states[target].step(epoch, x, s)
    for target, state in states.items():
        if not finite(state.inverse.weight):
            raise FitError(
                f"SGD diverged at {key}, target {target_label(target)}, to NaN or Inf: lower "
                f"learning_rate={state.rate:g}"
            )
    return states


class Descent:
    """Gradient descent for the inverse of one convolution and one target.

    It minimises ½ mean ‖X − g(S)‖² over the kernel and the bias of g, with momentum 0.9.

    Args:
        inverter: The family of inverses of a convolution. No other operation may use its input.
        x: Tensor (batch, channels, *size), the features of the first batch.
        s: Tensor (batch, channels, *size), the signals at the convolution's output.
        rate: Learning rate; None for 1 / L, where L is the largest curvature on this batch.

    Attributes:
        rows: Number of rows of the regression in the current epoch.
        inverse: The inverse after the last step.
    """

    #: Fields of the fit's report that gradient descent does not compute.
    dead, condition = 0, None

    def __init__(self, inverter: Convolution, x: Tensor, s: Tensor, rate: float | None) -> None:
        self.inverter, (self._geometry,) = inverter, inverter.geometries
        self._weight = x.new_zeros(self._geometry.weight_shape)
        self._bias = x.new_zeros(x.shape[1])
        self._velocity = torch.zeros_like(self._weight), torch.zeros_like(self._bias)
        self.rate = rate or 1 / self._curvature(x, s)
        self._epoch = -1

    @property
    def inverse(self) -> Inverse:
        """The inverse after the last step."""
        return Inverse(self._weight.flatten(), self._bias)

    def _curvature(self, x: Tensor, s: Tensor) -> float:
        """Return the largest eigenvalue of the loss's Hessian, by power iteration.

        The estimate is from below by a few percent; with momentum 0.9, descent is stable up to a
        rate of 3.8 / L. The Gram matrix of the patches, which may be large, is not computed.
        """
        elements = x.numel() // x.shape[1]
        draw = torch.Generator(x.device).manual_seed(0)
        weight = torch.randn(self._weight.shape, generator=draw, device=x.device, dtype=x.dtype)
        largest = 0.0
        for _ in range(_POWERS):
            weight /= torch.linalg.vector_norm(weight).clamp(min=torch.finfo(x.dtype).tiny)
            # H w = E[s sᵀ] w: the gradient of ½ mean ‖w ∗ᵀ S‖²
            y = self._geometry.apply(s, weight, x.shape)
            weight = self._geometry.gradient(s, y, self._weight, of=1) / elements
            largest = float(torch.linalg.vector_norm(weight))
        return largest + 1  # the bias has the curvature E[1²] = 1

    def step(self, epoch: int, x: Tensor, s: Tensor) -> None:
        """Take one step of descent on a batch.

        Args:
            epoch: Number of the pass over the data, from 0.
            x: Tensor (batch, channels, *size), the features.
            s: Tensor (batch, channels, *size), the signals at the convolution's output.
        """
        if epoch != self._epoch:
            self._epoch, self._residual, self._variance, self.rows = epoch, 0.0, 0.0, 0
        over, elements = (0, *range(2, x.ndim)), x.numel() // x.shape[1]
        # eq. 7: the loss is ½ mean ‖g(S) − X‖², with g(S) = W ∗ᵀ S + b
        error = self.inverter.apply(self.inverse, (s,), True) - x
        self.rows += elements // self.inverter.tied
        self._residual += float(error.square().sum())
        self._variance += float((x - x.mean(over, keepdim=True)).square().sum())
        gradients = self._geometry.gradient(s, error, self._weight, of=1), error.sum(over)
        values = self._weight, self._bias
        for value, velocity, gradient in zip(values, self._velocity, gradients, strict=True):
            # v ← 0.9 v + ∇, θ ← θ − rate · v
            velocity.mul_(0.9).add_(gradient / elements)
            value.sub_(self.rate * velocity)

    @property
    def explained_variance(self) -> float:
        """1 − residual / variance over the last epoch; each residual is taken before its step."""
        return 1 - self._residual / self._variance if self._variance else 1.0
