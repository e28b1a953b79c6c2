"""The bits that each feature shares with the output of a class (section 3.2 of the paper)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_mipin.inverse.distributed import Processes
from captum_mipin.inverse.trace import Trace
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.moments import Moments, gaussian_information
from captum_mipin.types import Inputs, Target


class SharedInformation:
    """Moments of the features where the inverse stops, together with the targets' outputs.

    Args:
        surrogate: The surrogate of the model, which gives the batch dimension of these features.
        targets: The classes.
    """

    def __init__(self, surrogate: Surrogate, targets: Sequence[Target]) -> None:
        self._layouts, self._targets = surrogate.layouts, targets
        self._moments: list[Moments] = []
        self._example: list[Tensor] = []

    @property
    def empty(self) -> bool:
        """True before the first batch."""
        return not self._moments

    def add(self, trace: Trace, counted: bool = True) -> None:
        """Add a batch; if ``counted`` is False, store only its shapes."""
        every: tuple[Any, ...] = (slice(None),)
        output = trace.output.detach()
        y = torch.stack([output[every + target] for target in self._targets], 1)[None]
        pairs = zip(self._layouts, trace.sources, strict=True)
        features = [layout.first(x.detach()) for layout, x in pairs]
        if self.empty:
            self._example = [x[:1].clone() for x in features]
            self._moments = [
                Moments.zeros(1, x[0].numel(), len(self._targets), device=x.device)
                for x in features
            ]
        if counted:
            for moments, x in zip(self._moments, features, strict=True):
                moments.update(x.reshape(1, len(x), -1), y.to(x.dtype))

    def pool(self, processes: Processes) -> None:
        """Replace the moments by those of the data of all processes."""
        self._moments = [moments.pooled(processes.sum) for moments in self._moments]

    def bits(self) -> dict[Target, Inputs]:
        """Return the bits of each feature for each target, as float32 tensors (1, ...)."""
        # section 3.2: −½ log₂(1 − ρ²) bits, where ρ is the correlation of feature and output
        maps = [gaussian_information(moments).float()[0] for moments in self._moments]
        parts = list(zip(maps, self._layouts, self._example, strict=True))
        return {
            target: tuple(
                layout.restored(bits[:, index].reshape(x.shape)).clone()
                for bits, layout, x in parts
            )
            for index, target in enumerate(self._targets)
        }
