"""The parts of a model's graph that an information bottleneck cuts it into."""

from functools import cached_property

from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.subgraph import Part
from captum_mipin.propagation.fingerprint import structure
from captum_mipin.rules import MIPIN


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
