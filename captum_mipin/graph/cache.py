"""The graphs of a model and what is built from them, kept for the next call.

Every graph is made by :func:`captum_mipin.graph.capture.trace`; what is kept here is one model's.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, TypeVar

from torch import nn

from captum_mipin.errors import CaptureError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.modules import snapshot
from captum_mipin.graph.signature import Signature
from captum_mipin.graph.subgraph import module_output
from captum_mipin.types import Extras, Inputs

#: Graphs kept for different input shapes.
_GRAPHS = 8

#: (inputs, extras, shared) → their graph.
Capture = Callable[[Inputs, Extras, bool], CapturedGraph]

Built = TypeVar("Built")


class Graphs(Generic[Built]):
    """A model's graph for each kind of inputs, and what was built from it.

    All are forgotten once the model (but for its weights) or the rules have changed. Copies and
    pickles begin without any. Calls from several threads take turns.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Signature, CapturedGraph] = OrderedDict()
        self._built: dict[tuple[Signature, str | None], Built] = {}
        self._made_of: list[Any] = []
        self._lock = Lock()

    def get(self, signature: Signature) -> CapturedGraph | None:
        """Return the graph for inputs of this kind, None if there is none."""
        return self._graphs.get(signature)

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def build(
        self,
        model: nn.Module,
        layer: nn.Module | None,
        rules: Any,
        find: Callable[[], Signature],
        build: Callable[[CapturedGraph, str | None], Built],
    ) -> tuple[CapturedGraph, Built]:
        """Return a graph and what is built from it.

        Args:
            model: The model.
            layer: The layer where passes end; None for the inputs.
            rules: All that graphs and what is built depend on besides the model.
            find: Returns the signature of the graph, see :meth:`find`.
            build: (graph, name of the layer's node) → what is built.
        """
        with self._lock:
            made_of = [snapshot(model), rules]
            if made_of != self._made_of:
                self._graphs.clear()
                self._built.clear()
                self._made_of = made_of
            signature = find()
            graph = self._graphs[signature]
            start = None if layer is None else module_output(graph, model, layer)
            if (signature, start) not in self._built:
                self._built[signature, start] = build(graph, start)
            built = self._built[signature, start]
            if len(self._graphs) > _GRAPHS:
                oldest, _ = self._graphs.popitem(last=False)
                self._built = {key: value for key, value in self._built.items() if key[0] != oldest}
            return graph, built

    def find(
        self,
        inputs: Inputs,
        extras: Extras,
        capture: Capture,
        *,
        fitted: Signature | None = None,
        accept: Callable[[Signature, CapturedGraph], None] = lambda signature, graph: None,
        hint: Callable[[], str] = str,
    ) -> Signature:
        """Return the signature of the graph for a call; capture the graph if there is none.

        An extra tensor as long as the batch may be one row an example, or shared by all. An earlier
        fit decides; without one, the first choice with which the model can be captured.

        Args:
            inputs: Tensors (batch, ...).
            extras: Further arguments of the model.
            capture: How a graph is captured.
            fitted: The signature of an earlier fit.
            accept: Raises if a new graph cannot be used.
            hint: Returns what to add to the error if inputs of another kind than the fitted ones
                cannot be captured.

        Raises:
            CaptureError: The model cannot be captured.
        """
        kinds = fitted.kinds() if fitted else None
        shared = (False, True) if extras else (False,)
        choices = {Signature.of(inputs, extras, one): one for one in reversed(shared)}
        failure: CaptureError | None = None
        for signature in sorted(choices, key=lambda one: (one.kinds() != kinds, choices[one])):
            if signature not in self._graphs:
                try:
                    graph = capture(inputs, extras, choices[signature])
                except CaptureError as error:
                    failure = failure or error
                    continue
                accept(signature, graph)
                self._graphs[signature] = graph
            self._graphs.move_to_end(signature)
            return signature
        if failure is not None and fitted is not None and fitted not in choices:
            raise type(failure)(f"{failure}\n{hint()}".rstrip()) from failure
        raise failure or CaptureError("the model cannot be captured")
