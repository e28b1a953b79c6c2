"""The surrogates of a model, for each kind of inputs that it is called with.

An inverse that was fitted on inputs of one size explains inputs of another, if the model computes
the same for them.
"""

from collections.abc import Mapping
from contextlib import suppress

from torch import nn

from captum_mipin.errors import CaptureError, ModelChangedError
from captum_mipin.graph.cache import Graphs
from captum_mipin.graph.capture import CapturedGraph, capture
from captum_mipin.graph.signature import Signature, first_example
from captum_mipin.inverse.state import Origin
from captum_mipin.propagation.fingerprint import difference, structure
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.rules import Rule, table
from captum_mipin.types import Extras, Inputs, Output

#: The inputs and the further arguments of one call.
Call = tuple[Inputs, Extras]


class Surrogates:
    """The graphs of a model and the surrogates made from them, kept for the next call.

    Args:
        model: The model.
        output: Which of its outputs is explained.
    """

    def __init__(self, model: nn.Module, output: Output) -> None:
        self._model, self._output = model, output
        self.graphs = Graphs[Surrogate]()

    def of(
        self,
        call: Call,
        layer: nn.Module | None,
        origin: Origin | None,
        *,
        calibrate: bool,
        joint: bool,
    ) -> Surrogate:
        """Return the surrogate for the inputs of a call.

        Args:
            call: Inputs and further arguments.
            layer: The module at whose output passes back end; None for the inputs.
            origin: What the inverse was fitted on; None before the first fit.
            calibrate: Learn the scale of the signal there, since the inverse stops there.
            joint: Learn what comes back to a tensor from all its branches together.

        Raises:
            CaptureError: The model cannot be captured, or differs for inputs of this size.
            ModelChangedError: The model is not the one of the fit.
        """
        rules = table()

        def accept(signature: Signature, graph: CapturedGraph) -> None:
            if origin and structure(graph, rules) != origin.structure:
                self._check_same_model(origin, signature, graph, call, rules)

        def find() -> Signature:
            fitted = origin.signature if origin else None
            hint = (lambda: size_hint(origin)) if origin else str
            return self.graphs.find(*call, self._capture, fitted=fitted, accept=accept, hint=hint)

        def build(graph: CapturedGraph, start: str | None) -> Surrogate:
            return Surrogate(graph, rules, start, calibrate=calibrate, joint=joint)

        return self.graphs.build(self._model, layer, rules, find, build)[1]

    def _capture(self, inputs: Inputs, extras: Extras, shared: bool) -> CapturedGraph:
        return capture(self._model, inputs, extras, shared, output=self._output, explained=False)

    def _check_same_model(
        self,
        origin: Origin,
        signature: Signature,
        graph: CapturedGraph,
        call: Call,
        rules: Mapping[str, Rule],
    ) -> None:
        """Raise an error unless only the size of the inputs makes the graph differ.

        The graph for inputs like those of the fit tells whether the model itself has changed.

        Raises:
            ModelChangedError: The model, or a rule, is not the one of the fit.
            CaptureError: The model computes something else for inputs of this size.
        """
        fitted = None
        if signature != origin.signature:
            fitted = self.graphs.get(origin.signature)
            if fitted is None:
                example = first_example(*call, graph.shared)
                extras = example[1] if origin.extras is None else origin.extras
                shared = Signature.of(origin.example, extras, True) == origin.signature
                with suppress(CaptureError):
                    fitted = self._capture(origin.example, extras, shared)
        if fitted is None or structure(fitted, rules) != origin.structure:
            raise ModelChangedError(
                "the model computes something else than the one the inverse was fitted to, or a "
                "registered rule has changed: fit a new InverseNetwork"
            )
        place = difference(fitted, graph, rules)
        if place is not None:
            raise CaptureError(
                f"for inputs and further arguments {shapes(signature)} the model computes "
                "something else than for those that the inverse was fitted on, first at "
                f"{place}.\n{size_hint(origin)}"
            )


def size_hint(origin: Origin) -> str:
    """Return what to do about inputs of another kind than those of the fit."""
    return (
        f"The inverse was fitted on {shapes(origin.signature)}. Pass such inputs, resized if need "
        "be, or fit another InverseNetwork on the others. A network takes any size if it pools to "
        "a fixed one (nn.AdaptiveAvgPool2d) before its dense layers."
    )


def shapes(signature: Signature) -> str:
    """Return shapes and dtypes of inputs and further arguments, as errors show them."""
    return ", ".join(" ".join(leaf[1:3]) for leaf in signature.leaves)
