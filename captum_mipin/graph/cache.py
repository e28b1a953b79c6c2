"""The graphs of a model and what is built from them, kept for the next call."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, TypeVar

from torch import nn

from captum_mipin.errors import CaptureError
from captum_mipin.graph.capture import (
    CapturedGraph,
    Extras,
    Inputs,
    Signature,
    glance,
    module_output,
)

#: Graphs kept for different input shapes.
_GRAPHS = 8

#: (inputs, extras, shared) → their graph.
Capture = Callable[[Inputs, Extras, bool], CapturedGraph]

Built = TypeVar("Built")


class Graphs(Generic[Built]):
    """A model's graph for each kind of inputs, and what was built from it: surrogates, or parts.

    All are forgotten once the model, but for its weights, or the rules are others than those they were made of; copies and
    pickles begin without any. Calls from several threads take turns.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Signature, CapturedGraph] = OrderedDict()
        self._built: dict[tuple[Signature, str | None], Built] = {}
        self._made_of: list[Any] = []
        self._lock = Lock()

    def get(self, signature: Signature) -> CapturedGraph | None:
        """The graph for inputs of this kind, if there is one."""
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
        """A graph, and what is built from it.

        Args:
            model: The model.
            layer: Where the way back ends; None for the inputs.
            rules: What, besides the model, all is made of.
            find: Says which graph, see :meth:`find`.
            build: Makes it, of a graph and the layer's node.
        """
        with self._lock:
            now = [glance(model), rules]
            if now != self._made_of:
                self._graphs.clear()
                self._built.clear()
                self._made_of = now
            signature = find()
            graph = self._graphs[signature]
            start = None if layer is None else module_output(graph, model, layer)
            if (signature, start) not in self._built:
                self._built[signature, start] = build(graph, start)
            found = self._built[signature, start]
            if len(self._graphs) > _GRAPHS:
                oldest, _ = self._graphs.popitem(last=False)
                self._built = {key: value for key, value in self._built.items() if key[0] != oldest}
            return graph, found

    def find(
        self,
        inputs: Inputs,
        extras: Extras,
        capture: Capture,
        fitted: Signature | None = None,
        accept: Callable[[Signature, CapturedGraph], None] = lambda signature, graph: None,
        hint: Callable[[], str] = str,
    ) -> Signature:
        """Which graph is for inputs of this kind, captured where there is none.

        A further tensor as long as the batch may be per example or shared: what a fit found decides, else what the model can
        be captured with.

        Args:
            inputs, extras: The call.
            capture: How a graph is captured.
            fitted: The kind of inputs of an earlier fit.
            accept: Raises where a new graph cannot be used.
            hint: What to add where inputs of another kind than those fitted on cannot be captured.
        """
        choices = {
            Signature.of(inputs, extras, shared): shared
            for shared in ((True, False) if extras else (False,))
        }
        kinds = fitted.kinds() if fitted else None
        failure: CaptureError | None = None
        for signature in sorted(
            choices, key=lambda choice: (choice.kinds() != kinds, choices[choice])
        ):
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
