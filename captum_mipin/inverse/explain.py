"""What an inverse is asked to explain, and what it answers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_mipin.graph.signature import pick
from captum_mipin.types import Extras, Inputs


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be explained, and how.

    Attributes:
        inputs: Tensors (batch, ...).
        target: The class, as Captum's ``target``; examples may have different ones.
        extras: Further arguments of the model.
        biases: One pass back for each entry: True for the source signal S, False for the
            attribution A. All share one pass forward.
        local: Use masks, switches and shares of each example (equation 9). Gates that multiply,
            attention weights, and the switches of ``where`` and ``maximum`` are used in any case.
        mask: Apply equation 9 also to the inputs. To the output of ``layer`` it is always applied
            if ``local``.
        layer: The module at whose output the passes end; None for the inputs.
        evidence: Send back only what speaks for the target at each place, if the model's output is
            an average over places.
        unit: Send back 1 instead of the logit.
    """

    inputs: Inputs
    target: Any
    extras: Extras = ()
    biases: Sequence[bool] = (False,)
    local: bool = True
    mask: bool = False
    layer: nn.Module | None = None
    evidence: bool = False
    unit: bool = False

    def pick(self, rows: Tensor, shared: bool) -> "Request":
        """Return the same request for some of the examples.

        Args:
            rows: (examples,) their indices. ``target`` must hold one class an example.
            shared: True if no tensor among ``extras`` is per example.
        """
        inputs, extras = pick(self.inputs, self.extras, rows, shared)
        target = [self.target[row] for row in rows.tolist()]
        return replace(self, inputs=inputs, extras=extras, target=target)


@dataclass(frozen=True)
class Explanation:
    """The result of one pass forward and of some passes back.

    Attributes:
        features: Values where the passes end, at the inputs or at a layer, each (batch, ...).
        signals: For each pass back, what came to the features; shaped like them.
        output: (batch,) the explained output Φ_c(x) of each example.
    """

    features: Inputs
    signals: tuple[Inputs, ...]
    output: Tensor

    def pick(self, rows: Tensor) -> "Explanation":
        """Return the explanation of some of the examples, in the order of ``rows``."""
        features = tuple(x[rows] for x in self.features)
        signals = tuple(tuple(s[rows] for s in signal) for signal in self.signals)
        return Explanation(features, signals, self.output[rows])

    @classmethod
    def join(cls, parts: Sequence["Explanation"]) -> "Explanation":
        """Return the explanation of the examples of all parts, one part after the other."""
        passes = zip(*(part.signals for part in parts), strict=True)
        return cls(
            _joined(part.features for part in parts),
            tuple(map(_joined, passes)),
            torch.cat([part.output for part in parts]),
        )


def _joined(batches: Iterable[Inputs]) -> Inputs:
    return tuple(map(torch.cat, zip(*batches, strict=True)))
