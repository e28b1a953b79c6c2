"""Samples that a bottleneck explains, and the parts of the model's graph that run on them."""

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
from captum_mipin.graph.layout import batch_dimension
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.signature import pick
from captum_mipin.graph.subgraph import Part
from captum_mipin.graph.validate import finite
from captum_mipin.propagation.fingerprint import structure
from captum_mipin.rules import MIPIN
from captum_mipin.types import Extras, Inputs, Target

#: Number of masked values that are optimised at a time, on a CPU and on any other device. It is
#: smaller on a CPU, so that the values fit into the cache.
CPU_VALUES, OTHER_VALUES = 1 << 21, 1 << 26


class Parts:
    """A captured graph, and its parts, which are made at their first use.

    Args:
        captured: The graph.
    """

    def __init__(self, captured: CapturedGraph) -> None:
        self.captured = captured
        self._parts: dict[tuple[str, str | None], Part] = {}

    @cached_property
    def structure(self) -> str:
        """Return a text that describes the graph's operations, see ``fingerprint.structure``."""
        return structure(self.captured, MIPIN)

    def __call__(self, start: str, end: str | None = None) -> Part:
        """Return the part of the graph between two tensors.

        Args:
            start: Name of the tensor at which the part starts.
            end: Name of the tensor at which it ends; None for the model's output.
        """
        if (start, end) not in self._parts:
            self._parts[start, end] = Part(self.captured, start, end)
        return self._parts[start, end]


@dataclass(frozen=True)
class Samples:
    """Samples that are optimised together.

    Attributes:
        model: The model.
        parts: The model's graph for these inputs, and its parts.
        inputs: The inputs of the model, each (batch, ...).
        extras: The further arguments of the model.
        targets: The target of each sample.
        first: Index of the first of these samples in the user's batch.
    """

    model: nn.Module
    parts: Parts
    inputs: Inputs
    extras: Extras
    targets: list[Target]
    first: int = 0

    @property
    def rows(self) -> slice:
        """Return the slice of these samples in the user's batch."""
        return slice(self.first, self.first + len(self.targets))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the graph, without the batch."""
        nodes = self.parts.captured.graph.nodes
        (value,) = (value_of(node) for node in nodes if node.name == name)
        at = batch_dimension(value, self.parts.captured.batch)
        return tuple(int(size) for dim, size in enumerate(value.shape) if dim != at)

    def groups(self, name: str, copies: int, size: int | None) -> list["Samples"]:
        """Return the samples in groups; the samples of a group are optimised together.

        Args:
            name: Name of the tensor that is masked.
            copies: Number of masked copies of each sample.
            size: Number of samples per group. None: as many as :data:`CPU_VALUES` or
                :data:`OTHER_VALUES` allow.
        """
        index = torch.arange(len(self.targets), device=self.inputs[0].device)
        if size is None:
            most = CPU_VALUES if index.device.type == "cpu" else OTHER_VALUES
            size = max(1, most // (copies * prod(self.shape(name))))
        return [self.pick(some) for some in index.split(size)] if len(index) > size else [self]

    def pick(self, index: Tensor) -> "Samples":
        """Return the samples at the positions in ``index``, which may contain repetitions."""
        inputs, extras = pick(self.inputs, self.extras, index, self.parts.captured.shared)
        targets = [self.targets[i] for i in index.tolist()]
        return Samples(self.model, self.parts, inputs, extras, targets, self.first + int(index[0]))

    def below(self, part: Part) -> tuple[Tensor, Sequence[Any]]:
        """Return the tensor at which a part starts, and the part's other arguments."""
        return part.below(self.parts.captured.values(self.model, self.inputs, self.extras))

    def beside(self, part: Part, copies: int, others: Sequence[Any]) -> Sequence[Any]:
        """Return the other arguments of a part, for several copies of each sample.

        Args:
            part: The part.
            copies: Number of copies of each sample.
            others: The other arguments for one copy, which :meth:`below` returned.
        """
        if not part.bypassed:
            return others
        index = torch.arange(len(self.targets), device=self.inputs[0].device).repeat(copies)
        with torch.no_grad():
            return self.pick(index).below(part)[1]

    def objective(
        self, name: str, copies: int, classes: int
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return a tensor, and the cross entropy as a function of masked copies of this tensor.

        Args:
            name: Name of the tensor.
            copies: Number of masked copies of each sample.
            classes: The dimension of the model's output that holds the classes.

        Returns:
            The tensor (batch, ...), and a function that maps copies (copies, batch, ...) to the
            cross entropy of each sample (batch,).

        Raises:
            InputError: The model's output contains NaN or Inf.
        """
        part = self.parts(name)
        with torch.no_grad():
            x, others = self.below(part)
            logits = part.above(x, others)
            others = self.beside(part, copies, others)
        if not finite(logits):
            raise InputError(
                "the model's output for these inputs contains NaN or Inf, expected finite values: "
                "scale the inputs, or use a wider dtype"
            )
        entropy = CrossEntropy(logits, self.targets, classes)
        return x, lambda z: entropy(part.above(z.flatten(0, 1), others))
