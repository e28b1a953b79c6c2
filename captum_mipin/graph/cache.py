"""A cache for the graphs of one model, and for the objects that are built from these graphs.

The graphs themselves are made by :func:`captum_mipin.graph.capture.trace`.
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
from captum_mipin.types import Extras, Inputs

#: Largest number of graphs in a cache; each is for other shapes of the inputs.
_GRAPHS = 8

#: (inputs, extras, shared) → the graph for a call with these arguments.
Capture = Callable[[Inputs, Extras, bool], CapturedGraph]

#: Names of the nodes that are explained.
Starts = tuple[str, ...]

Built = TypeVar("Built")


class Graphs(Generic[Built]):
    """A cache of a model's graphs by signature, and of the objects that were built from them.

    The cache is emptied when the rules change, or when the model changes in anything but its
    weights. Copies and pickles of a cache are empty. Calls from several threads wait for each
    other.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Signature, CapturedGraph] = OrderedDict()
        self._built: dict[tuple[Signature, Starts], Built] = {}
        self._made_of: list[Any] = []
        self._lock = Lock()

    def get(self, signature: Signature) -> CapturedGraph | None:
        """Return the graph with this signature, or None if the cache does not contain one."""
        return self._graphs.get(signature)

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def build(
        self,
        model: nn.Module,
        starts: Callable[[CapturedGraph], Starts],
        rules: Any,
        find: Callable[[], Signature],
        build: Callable[[CapturedGraph, Starts], Built],
    ) -> tuple[CapturedGraph, Built]:
        """Return a graph and the object that is built from it.

        Args:
            model: The model.
            starts: Function graph → names of the nodes that are explained.
            rules: The rules, and all other settings on which graphs and objects depend. They are
                compared by ``==``.
            find: Function that returns the signature of the graph, see :meth:`find`.
            build: Function (graph, names of the nodes that are explained) → object.
        """
        with self._lock:
            made_of = [snapshot(model), rules]
            if made_of != self._made_of:
                self._graphs.clear()
                self._built.clear()
                self._made_of = made_of
            signature = find()
            graph = self._graphs[signature]
            start = starts(graph)
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
        """Return the signature of the graph for a call, and capture the graph if it is missing.

        An extra tensor whose length is the batch size has two possible meanings: it has one row per
        example, or all examples share it. An earlier fit decides between them. Without a fit,
        "one row per example" is tried first, and the first meaning with which the model can be
        captured is used.

        Args:
            inputs: Tensors (batch, ...).
            extras: Further arguments of the model.
            capture: Function that captures a graph.
            fitted: The signature of an earlier fit, if there is one.
            accept: Function (signature, graph) that raises an error if a new graph cannot be used.
            hint: Function that returns advice for the error message. It is called if the capture
                fails for inputs whose signature differs from ``fitted``.

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
        raise failure or CaptureError(
            "the model cannot be captured for these inputs, expected a model that torch.export "
            "accepts: run torch.export.export(model, inputs) to see where it fails"
        )
