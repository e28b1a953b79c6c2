"""The samples that a bottleneck explains, in groups, and the graph that they run through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from captum_mipin.bottleneck.gaussian import CrossEntropy
from captum_mipin.errors import InputError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.signature import pick
from captum_mipin.graph.subgraph import Part
from captum_mipin.graph.validate import finite
from captum_mipin.propagation.fingerprint import structure
from captum_mipin.rules import MIPIN
from captum_mipin.types import Extras, Inputs, Target

#: Masked values that are optimised at a time: few on a CPU, whose cache should hold them.
CPU_VALUES, OTHER_VALUES = 1 << 21, 1 << 26


class Parts:
    """A captured graph and the parts of it that were asked for.

    Args:
        captured: The graph.
    """

    def __init__(self, captured: CapturedGraph) -> None:
        self.captured = captured
        self._parts: dict[tuple[str, str | None], Part] = {}

    @cached_property
    def structure(self) -> str:
        """What the graph computes, see :func:`captum_mipin.propagation.fingerprint.structure`."""
        return structure(self.captured, MIPIN)

    def __call__(self, start: str, end: str | None = None) -> Part:
        """Return the part from one tensor to another, by default to the output."""
        if (start, end) not in self._parts:
            self._parts[start, end] = Part(self.captured, start, end)
        return self._parts[start, end]


@dataclass(frozen=True)
class Samples:
    """Samples that are optimised together.

    Attributes:
        model: The model.
        parts: Its graph for them.
        inputs: The inputs of the model.
        extras: Its further arguments.
        targets: One class for each sample.
        first: The number of the first sample among all.
    """

    model: nn.Module
    parts: Parts
    inputs: Inputs
    extras: Extras
    targets: list[Target]
    first: int = 0

    @property
    def rows(self) -> slice:
        """The place of these samples among all."""
        return slice(self.first, self.first + len(self.targets))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the graph, without the batch."""
        nodes = self.parts.captured.graph.nodes
        (value,) = (value_of(node) for node in nodes if node.name == name)
        return tuple(map(int, value.shape[1:]))

    def groups(self, name: str, copies: int, size: int | None) -> list["Samples"]:
        """Return the samples in groups to be optimised together.

        Args:
            name: The tensor that is masked.
            copies: Masked copies of each sample.
            size: Samples in a group; None for as many as memory and speed suggest.
        """
        index = torch.arange(len(self.targets), device=self.inputs[0].device)
        if size is None:
            most = CPU_VALUES if index.device.type == "cpu" else OTHER_VALUES
            size = max(1, most // (copies * prod(self.shape(name))))
        return [self.pick(some) for some in index.split(size)] if len(index) > size else [self]

    def pick(self, index: Tensor) -> "Samples":
        """Return some of the samples, each as often as ``index`` names it."""
        inputs, extras = pick(self.inputs, self.extras, index, self.parts.captured.shared)
        targets = [self.targets[i] for i in index.tolist()]
        return Samples(self.model, self.parts, inputs, extras, targets, self.first + int(index[0]))

    def below(self, part: Part) -> tuple[Tensor, Sequence[Any]]:
        """Return the tensor at which a part starts, and all else that it takes."""
        return part.below(self.parts.captured.values(self.model, self.inputs, self.extras))

    def beside(self, part: Part, copies: int, others: Sequence[Any]) -> Sequence[Any]:
        """Return what a part takes besides its tensor, for several copies of each sample."""
        if not part.bypassed:
            return others
        index = torch.arange(len(self.targets), device=self.inputs[0].device).repeat(copies)
        with torch.no_grad():
            return self.pick(index).below(part)[1]

    def objective(
        self, name: str, copies: int, classes: int
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return a tensor, and the cross entropy of masked copies of it.

        Args:
            name: The tensor.
            copies: Masked copies of each sample.
            classes: The dimension of the output that holds the classes.

        Raises:
            InputError: The output is not finite.
        """
        part = self.parts(name)
        with torch.no_grad():
            x, others = self.below(part)
            logits = part.above(x, others)
            others = self.beside(part, copies, others)
        if not finite(logits):
            raise InputError(
                "the model's output overflows for these inputs: it contains NaN or Inf"
            )
        entropy = CrossEntropy(logits, self.targets, classes)
        return x, lambda z: entropy(part.above(z.flatten(0, 1), others))
