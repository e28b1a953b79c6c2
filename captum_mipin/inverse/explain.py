"""The request for an explanation by an inverse, and the explanation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_mipin.graph.layers import Site
from captum_mipin.graph.signature import pick
from captum_mipin.types import Extras, Inputs


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for the signals or attributions of a batch.

    Attributes:
        inputs: Tensors (batch, ...).
        target: The class, in any form of Captum's ``target``; it may differ between examples.
        extras: Further arguments of the model.
        biases: One backward pass per entry: True for the source signal S, False for the
            attribution A. All backward passes share one forward pass.
        local: True to use masks, switches and shares of each example (equation 9). Gates that
            multiply, attention weights, and the switches of ``where`` and ``maximum`` are used in
            any case.
        mask: True to apply equation 9 to the inputs as well. With ``local``, it always applies to
            the output of ``layer``.
        layer: The place where the backward passes stop.
        evidence: True to send back only the evidence for the target at each position. This needs a
            model whose output is an average over positions.
        contrast: True for evidence that the target has beyond all other classes.
        unit: True to send back 1 instead of the logit.
    """

    inputs: Inputs
    target: Any
    extras: Extras = ()
    biases: Sequence[bool] = (False,)
    local: bool = True
    mask: bool = False
    layer: Site = None
    evidence: bool = False
    contrast: bool = False
    unit: bool = False

    @property
    def speaks(self) -> str:
        """The name of the option that asks for evidence at each position; "" for none."""
        return "contrast" if self.contrast else "evidence" if self.evidence else ""

    def pick(self, rows: Tensor, shared: bool) -> "Request":
        """Return the same request for some of the examples.

        Args:
            rows: Integer tensor (examples,), indices of the examples. ``target`` must be a list
                with one class per example.
            shared: True if no tensor among ``extras`` has one row per example.
        """
        inputs, extras = pick(self.inputs, self.extras, rows, shared)
        target = [self.target[row] for row in rows.tolist()]
        return replace(self, inputs=inputs, extras=extras, target=target)


@dataclass(frozen=True)
class Explanation:
    """The result of one forward pass and one or more backward passes.

    Attributes:
        features: Values of the inputs or of the layer where the backward passes stop: tensors
            (batch, ...).
        signals: Result of each backward pass: tensors with the shapes of ``features``.
        output: Tensor (batch,), the explained output Φ_c(x) of each example.
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
        """Return the explanations of all parts as one, with the examples in the same order."""
        passes = zip(*(part.signals for part in parts), strict=True)
        return cls(
            _joined(part.features for part in parts),
            tuple(map(_joined, passes)),
            torch.cat([part.output for part in parts]),
        )


def _joined(batches: Iterable[Inputs]) -> Inputs:
    return tuple(map(torch.cat, zip(*batches, strict=True)))
