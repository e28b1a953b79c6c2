"""The paper's way to invert a convolution, for comparison: gradient descent on equation 7."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from captum_mipin.errors import FitError
from captum_mipin.graph.validate import finite
from captum_mipin.rules import Inverse, Inverter
from captum_mipin.rules.linear import Convolution
from captum_mipin.targets import target_label
from captum_mipin.types import Target

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
        key: The step of the convolution, for errors.
        targets: The classes.
        epochs: For each pass over the data its batches.
        rate: The learning rate, as for :class:`Descent`.

    Raises:
        FitError: The weights are no longer finite.
    """
    states: dict[Target, Descent] = {}
    for epoch, batches in enumerate(epochs):
        for inverter, x, signals in batches:
            assert isinstance(inverter, Convolution)  # for mypy: only these are descended for
            for target in targets:
                (s,) = signals(target)
                if target not in states:
                    states[target] = Descent(inverter, x, s, rate)
                states[target].step(epoch, x, s)
    for target, state in states.items():
        if not finite(state.inverse.weight):
            raise FitError(
                f"SGD diverged at {key}, target {target_label(target)}: lower "
                f"learning_rate={state.rate:g}"
            )
    return states


class Descent:
    """Gradient descent for the inverse of one convolution and one target.

    It minimises ½ mean ‖X − g(S)‖² over the kernel and the bias of g, with momentum 0.9.

    Args:
        inverter: The family of inverses, of a convolution that shares its input with no other.
        x: (batch, channels, *size) the features of the first batch.
        s: The signals at the convolution's output for this batch.
        rate: Learning rate; None for 1 / L, L being the largest curvature on this batch.

    Attributes:
        rows: Rows of the regression in the current epoch.
        inverse: What has been learned so far.
    """

    #: Neither is known of a descent.
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
        """What has been learned so far."""
        return Inverse(self._weight.flatten(), self._bias)

    def _curvature(self, x: Tensor, s: Tensor) -> float:
        """Return a bound of the largest eigenvalue of the loss's Hessian."""
        moments = self.inverter.moments(x, (s,))
        mean = moments.mean_s
        # E[ssᵀ] = cov(s, s) + E[s] E[s]ᵀ; the constant 1, whose coefficient is the bias, adds 1
        gram = moments.ss / moments.count + mean.unsqueeze(2) * mean.unsqueeze(1)
        return float(torch.linalg.matrix_norm(gram, 2).max()) / self.inverter.tied + 1

    def step(self, epoch: int, x: Tensor, s: Tensor) -> None:
        """Descend by one batch: features ``x`` and signals ``s``, as at the start."""
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
        """1 − residual / variance over the last epoch, each batch before its own step."""
        return 1 - self._residual / self._variance if self._variance else 1.0
