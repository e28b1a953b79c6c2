"""A cache for the graphs of one model, and for the objects that are built from these graphs.

The graphs themselves are captured and shared by :func:`captum_mipin.graph.capture.capture`.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

from captum_mipin.errors import CaptureError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.rows import LostRowsError
from captum_mipin.graph.signature import Signature
from captum_mipin.types import Extras, Inputs

#: Largest number of graphs in a cache; each is for other shapes of the inputs.
_GRAPHS = 8

#: (inputs, extras, shared) → the model's graph for a call with these arguments.
Capture = Callable[[Inputs, Extras, bool], CapturedGraph]

#: Names of the nodes that are explained.
Starts = tuple[str, ...]

Built = TypeVar("Built")


class _Known(NamedTuple):
    """A graph of the model, and the graph that is used in its place."""

    captured: CapturedGraph
    graph: CapturedGraph


class Graphs(Generic[Built]):
    """A cache of a model's graphs by signature, and of the objects that were built from them.

    The graphs themselves are shared by all objects that explain the model. An object is built again
    when the rules change, or when the model is captured again. Copies and pickles of a cache are
    empty. Calls from several threads wait for each other.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Signature, _Known] = OrderedDict()
        self._built: dict[tuple[Signature, Starts], Built] = {}
        self._rules: Any = None
        self._lock = Lock()

    def get(self, signature: Signature) -> CapturedGraph | None:
        """Return the graph with this signature, or None if the cache does not contain one."""
        return self._graphs[signature].graph if signature in self._graphs else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def build(
        self,
        starts: Callable[[CapturedGraph], Starts],
        rules: Any,
        find: Callable[[], Signature],
        build: Callable[[CapturedGraph, Starts], Built],
    ) -> tuple[CapturedGraph, Built]:
        """Return a graph and the object that is built from it.

        Args:
            starts: Function graph → names of the nodes that are explained.
            rules: The rules, and all other settings on which graphs and objects depend. They are
                compared by ``==``.
            find: Function that returns the signature of the graph, see :meth:`find`.
            build: Function (graph, names of the nodes that are explained) → object.
        """
        with self._lock:
            if rules != self._rules:
                self._graphs.clear()
                self._built.clear()
                self._rules = rules
            signature = find()
            graph = self._graphs[signature].graph
            start = starts(graph)
            if (signature, start) not in self._built:
                self._built[signature, start] = build(graph, start)
            built = self._built[signature, start]
            if len(self._graphs) > _GRAPHS:
                self._forget(next(iter(self._graphs)))
            return graph, built

    def find(
        self,
        inputs: Inputs,
        extras: Extras,
        capture: Capture,
        *,
        prepare: Callable[[CapturedGraph], CapturedGraph] = lambda graph: graph,
        fitted: Signature | None = None,
        accept: Callable[[Signature, CapturedGraph], None] = lambda signature, graph: None,
        hint: Callable[[], str] = str,
    ) -> Signature:
        """Return the signature of the graph for a call, which is captured if it is missing.

        An extra tensor whose length is the batch size has two possible meanings: it has one row per
        example, or all examples share it. An earlier fit decides between them, or an earlier call
        with a batch of another size. Else "one row per example" is tried first, and the first
        meaning with which the model can be captured is used.

        Args:
            inputs: Tensors (batch, ...).
            extras: Further arguments of the model.
            capture: Function that returns the model's graph. It is called each time.
            prepare: Function captured graph → graph that is used. It is called for new graphs.
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
        told = () if fitted else self._graphs
        keys = {one: (one.kinds() != kinds, one not in told, choices[one]) for one in choices}
        for signature in sorted(choices, key=keys.__getitem__):
            try:
                captured = capture(inputs, extras, choices[signature])
                known = self._graphs.get(signature)
                graph = known.graph if known and known.captured is captured else prepare(captured)
            except CaptureError as error:
                named = isinstance(error, LostRowsError)
                failure = failure if failure and not named else error
                continue
            if known is None or graph is not known.graph:
                self._forget(signature)
                accept(signature, graph)
                self._graphs[signature] = _Known(captured, graph)
            self._graphs.move_to_end(signature)
            return signature
        if failure is not None and fitted is not None and fitted not in choices:
            raise type(failure)(f"{failure}\n{hint()}".rstrip()) from failure
        raise failure or CaptureError(
            "the model cannot be captured for these inputs, expected a model that torch.export "
            "accepts: run torch.export.export(model, inputs) to see where it fails"
        )

    def _forget(self, signature: Signature) -> None:
        """Drop the graph with this signature, and the objects that were built from it."""
        self._graphs.pop(signature, None)
        self._built = {key: value for key, value in self._built.items() if key[0] != signature}
