"""The surrogates of a model, one per kind of inputs that the model is called with.

An inverse that was fitted on inputs of one size also explains inputs of another size, if the
model's operations are the same for both.
"""

from ast import literal_eval
from collections.abc import Mapping
from contextlib import suppress

from torch import nn

from captum_mipin.errors import CaptureError, ModelChangedError
from captum_mipin.graph.cache import Graphs, Starts
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layers import Site, tensors_at
from captum_mipin.graph.signature import Signature, first_example, shapes
from captum_mipin.inverse.state import Origin
from captum_mipin.propagation.final import below_final, require_logits
from captum_mipin.propagation.fingerprint import difference, structure
from captum_mipin.propagation.independent import capture_apart, check_graph
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.rules import Rule, table
from captum_mipin.types import Extras, Inputs, Output

#: The inputs and the further arguments of one call.
Call = tuple[Inputs, Extras]


class Surrogates:
    """A store of the graphs of a model and of the surrogates made from them.

    Args:
        model: The model.
        output: The choice of the explained output, if the model has several.
    """

    def __init__(self, model: nn.Module, output: Output) -> None:
        self._model, self._output = model, output
        self.graphs = Graphs[Surrogate]()

    def of(
        self,
        call: Call,
        layer: Site,
        origin: Origin | None,
        *,
        stop: Site,
        joint: bool,
    ) -> Surrogate:
        """Return the surrogate for the inputs of a call.

        Args:
            call: Inputs and further arguments.
            layer: The place where backward passes stop.
            origin: The model and inputs of the fit; None before the first fit.
            stop: The place where the inverse stops. There the scale of the signal is learned.
            joint: True to learn the signal of a tensor with several branches in one regression.

        Raises:
            CaptureError: The model cannot be captured, or its operations differ for inputs of this
                size.
            ModelChangedError: The model is not the one of the fit.
        """
        rules = table()

        def accept(signature: Signature, graph: CapturedGraph) -> None:
            if origin and structure(graph, rules) != origin.structure:
                self._check_same_model(origin, signature, graph, call, rules)

        def find() -> Signature:
            fitted = origin.signature if origin else None
            hint = (lambda: size_hint(origin, *call)) if origin else str
            return self.graphs.find(
                *call, self._capture,
                prepare=require_logits, fitted=fitted, accept=accept, hint=hint,
            )  # fmt: skip

        def starts(graph: CapturedGraph, place: Site = layer) -> Starts:
            return tensors_at(graph, self._model, place, call)

        def build(graph: CapturedGraph, start: Starts) -> Surrogate:
            calibrate = start == starts(graph, stop)
            surrogate = Surrogate(graph, rules, start, calibrate=calibrate, joint=joint)
            check_graph(graph, self._model, call, self._output)
            return surrogate

        return self.graphs.build(starts, rules, find, build)[1]

    def _capture(self, inputs: Inputs, extras: Extras, shared: bool) -> CapturedGraph:
        return capture_apart(
            self._model, inputs, extras, shared, output=self._output, explained=False
        )

    def _check_same_model(
        self,
        origin: Origin,
        signature: Signature,
        graph: CapturedGraph,
        call: Call,
        rules: Mapping[str, Rule],
    ) -> None:
        """Raise an error unless two graphs differ only in sizes.

        To find out if the model itself has changed, it is captured with inputs like those of the
        fit.

        Raises:
            ModelChangedError: The model or a rule is not the one of the fit.
            CaptureError: The model's operations differ for inputs of this size.
        """
        fitted = None
        if signature != origin.signature:
            example = first_example(*call, graph.shared)
            extras = example[1] if origin.extras is None else origin.extras
            shared = Signature.of(origin.example, extras, True) == origin.signature
            with suppress(CaptureError):
                fitted, _ = below_final(self._capture(origin.example, extras, shared))
        if fitted is None or structure(fitted, rules) != origin.structure:
            raise ModelChangedError(
                "the model's operations differ from those of the model that the inverse was fitted "
                "to, or a registered rule has changed, or an older captum-mipin wrote the file: "
                "fit a new InverseNetwork"
            )
        place = difference(fitted, graph, rules)
        if place is not None:
            raise CaptureError(
                f"for inputs and further arguments {shapes(signature)} the model's operations "
                "differ from those for the inputs that the inverse was fitted on, first at "
                f"{place}.\n{size_hint(origin, *call)}"
            )


def size_hint(origin: Origin, inputs: Inputs, extras: Extras) -> str:
    """Return advice, for error messages, about a call that differs from the calls of the fit.

    Args:
        origin: The model and inputs of the fit.
        inputs: Inputs of the call.
        extras: Further arguments of the call.
    """
    if bool(extras) != bool(origin.signature.structure):
        return (
            f"The inverse was fitted {'without' if extras else 'with'} additional_forward_args: "
            + ("leave them out" if extras else "pass them")
            + ", or fit another InverseNetwork with such calls by unpack=."
        )
    fitted = f"The inverse was fitted on {shapes(origin.signature)} per example"
    dims = [literal_eval(leaf[1]) for leaf in origin.signature.leaves[: len(inputs)]]
    if [x.ndim - 1 for x in inputs] != list(map(len, dims)):
        return f"{fitted}: pass a batch of such examples, (batch, ...)."
    return (
        f"{fitted}. Resize the inputs to this shape, or fit another InverseNetwork on the new "
        "size. A network accepts any size if it pools to a fixed size (nn.AdaptiveAvgPool2d) "
        "before its dense layers."
    )
