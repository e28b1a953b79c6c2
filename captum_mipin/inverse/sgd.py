"""The paper's way to invert a convolution, for comparison: gradient descent on equation 7."""

import torch
from torch import Tensor

from captum_mipin.rules import Inverse
from captum_mipin.rules.linear import Convolution


class Descent:
    """Gradient descent with momentum 0.9 on ½ mean ‖X − g(S)‖² over the kernel and bias of one convolution's inverse.

    Args:
        inverter: Of one convolution.
        x, s: The first batch: features (batch, channels, *size), and signals at the convolution's output.
        rate: The learning rate; None for the inverse of the largest curvature on this batch.
    """

    def __init__(self, inverter: Convolution, x: Tensor, s: Tensor, rate: float | None) -> None:
        self.inverter, (self._geometry,) = inverter, inverter.geometries
        self.weight = x.new_zeros(self._geometry.weight_shape)
        self.bias = x.new_zeros(x.shape[1])
        self._velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.rate = rate or 1 / self._curvature(x, s)
        self._epoch, self._residual, self._variance, self.rows = -1, 0.0, 0.0, 0

    def _curvature(self, x: Tensor, s: Tensor) -> float:
        """Largest eigenvalue of the Gram matrix of patches and the constant 1."""
        moments = self.inverter.moments(x, (s,))
        mean = moments.mean_s
        gram = moments.ss / moments.count + mean.unsqueeze(2) * mean.unsqueeze(1)
        return float(torch.linalg.matrix_norm(gram, 2).max()) / self.inverter.tied + 1

    def step(self, epoch: int, x: Tensor, s: Tensor) -> None:
        """Go down by one batch."""
        if epoch != self._epoch:
            self._epoch, self._residual, self._variance, self.rows = epoch, 0.0, 0.0, 0
        error = self.inverter.apply(Inverse(self.weight.flatten(), self.bias), (s,), True) - x
        over = (0, *range(2, x.ndim))
        rows = x.numel() // x.shape[1]
        self.rows += rows
        self._residual += float(error.square().sum())
        self._variance += float((x - x.mean(over, keepdim=True)).square().sum())
        gradients = (
            self._geometry.gradient(s, error, self.weight, of=1) / rows,
            error.sum(over) / rows,
        )
        for value, velocity, gradient in zip(
            (self.weight, self.bias), self._velocity, gradients, strict=True
        ):
            velocity.mul_(0.9).add_(gradient)
            value.sub_(self.rate * velocity)

    def explained_variance(self) -> float:
        """Over the last epoch, each batch before its own step."""
        return 1 - self._residual / self._variance if self._variance else 1.0
