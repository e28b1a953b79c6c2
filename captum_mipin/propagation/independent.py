"""The check that a model computes each example alone, and the same in each call.

Otherwise the map of an example would depend on the other examples of its batch, or on the call. The
captured graph names the operation. Where a model joins the examples and separates them again, as
by ``cat`` and ``chunk``, calls of the model tell that no example depends on another one. A model
that cannot be captured is only called.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from torch import fx, nn
from torch._ops import OpOverload

from captum_mipin.errors import CaptureError, UnsupportedOperationError
from captum_mipin.graph.alone import Fault, fault, takes_all_rows
from captum_mipin.graph.cache import Graphs
from captum_mipin.graph.capture import CapturedGraph, capture
from captum_mipin.graph.layout import folded_batch
from captum_mipin.graph.marks import marks, original, value_of
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.nodes import is_random, nodes_in, operation, place
from captum_mipin.graph.rows import SHARED
from captum_mipin.graph.signature import Signature, plain
from captum_mipin.graph.state import State
from captum_mipin.graph.trials import Trial
from captum_mipin.propagation.batch_layout import ALONG, lay_out_batch
from captum_mipin.propagation.beside import BATCH_SIZE, lay_out_beside
from captum_mipin.propagation.final import warn_of_result
from captum_mipin.propagation.marking import drop_unused, mark_signal, mark_varying
from captum_mipin.propagation.passes import draft
from captum_mipin.propagation.treatments import RANDOM, listed, uses_batch
from captum_mipin.report import CheckRow
from captum_mipin.rules import Passes, Rule
from captum_mipin.rules.base import is_floating
from captum_mipin.rules.gates import REARRANGED
from captum_mipin.training import check_evaluation
from captum_mipin.types import Extras, Inputs, Output

#: Inputs and further arguments of a call.
Call = tuple[Inputs, Extras]

#: Model → signature of a call → state of the model when it last passed the check.
_PASSED: WeakKeyDictionary[nn.Module, dict[Signature, State | None]] = WeakKeyDictionary()

#: Graph → name of the explained output → what :func:`_dependent` returns for it.
_DEPENDENT: WeakKeyDictionary[fx.Graph, dict[str, list[tuple[fx.Node, str]]]] = WeakKeyDictionary()

#: Operations that only move the examples to other places, from which later ones may move them back,
#: and ``embedding_bag``, whose offsets tell which of all words are an example's.
_MOVES = REARRANGED | {
    "cat", "stack", "unbind", "split_with_sizes", "index", "index_select", "gather", "flip", "roll",
    "repeat", "movedim", "embedding_bag",
}  # fmt: skip

_PASSES = (mark_varying, drop_unused, mark_signal, lay_out_beside, lay_out_batch)

_WAY_OUT = (
    "Expected a model that computes each example alone, and the same in each call: give batch "
    "norms running statistics (track_running_stats=True), compute along other dimensions than "
    "that of the batch, and switch random operations off in evaluation mode. If the inputs are one "
    "example, pass x.unsqueeze(0)."
)


class _Any(Mapping[str, Rule]):
    """Rules with which every operation passes a signal, so that nothing else is refused."""

    other: Rule = Passes(
        note="",
        carriers=lambda node: tuple(i for i, n in enumerate(node.args) if is_floating(_values(n))),
        records=True,
    )

    def __getitem__(self, operation: str) -> Rule:
        return self.other

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Called(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def require_independent(model: Any, inputs: Inputs, extras: Extras = ()) -> None:
    """Raise an error if a model mixes the examples of a batch, or draws random numbers.

    The graph of a module is captured once for each signature of calls. If the module's attributes
    change afterwards, it is only called with a few examples.

    Args:
        model: A module, or any other function of the inputs.
        inputs: Tensors (batch, ...).
        extras: Further arguments of the model.

    Raises:
        UnsupportedOperationError: The result for an example depends on the other examples of its
            batch, or on the call.
        TrainingModeError: A module is in training mode and computes something else in it.

    Examples:
        >>> import torch
        >>> require_independent(nn.Linear(3, 2).eval(), (torch.randn(4, 3),))
    """
    model = unwrapped(model)
    call = plain((inputs, extras))
    if not isinstance(model, nn.Module):
        _check_calls(_Called(model), call)
        return
    check_evaluation(model)
    passed, signature = _PASSED.setdefault(model, {}), Signature.of(*call)
    state = passed.get(signature)
    if state is None or not state.holds():
        captured = None if signature in passed else _captured(model, call)
        if captured is None:
            _check_calls(model, call)
        else:
            check_graph(warn_of_result(captured), model, call)
        passed[signature] = None  # of a model that cannot be read, no later call is trusted
        with suppress(Exception):
            passed[signature] = State(model)


class Differentiated:
    """Base class of methods that use the derivatives of the operations, without further rules."""

    @staticmethod
    def survey(captured: CapturedGraph, start: Sequence[str] | None = None) -> list[CheckRow]:
        """Return one row per operation of a graph; those that mix examples are refused."""
        rows = []
        for node in draft(captured, _Any(), start, _PASSES).graph.nodes:
            why = _dependence(node)
            if why or (isinstance(original(node), OpOverload) and marks(node).signal):
                status, note = ("refused", why) if why else ("passes", "derivative")
                rows.append(CheckRow(place(node).path, str(original(node)), status, note))
        return rows


def capture_apart(
    model: nn.Module, inputs: Inputs, extras: Extras = (), shared: bool = False, **options: Any
) -> CapturedGraph:
    """Capture a model; if its examples only seem to depend on each other, for one example.

    See :func:`captum_mipin.graph.capture.capture` for the arguments.
    """
    told: dict[str, Any] = {"mixes": _seems_to_mix, "counts": _counts_examples}
    return capture(model, inputs, extras, shared, **told, **options)


def _seems_to_mix(captured: CapturedGraph) -> bool:
    """Return True if a graph only moves its examples to other places, and none is random."""
    try:
        dependent = _dependent(captured)
    except UnsupportedOperationError:  # a size depends on values
        return False
    return bool(dependent) and _may_seem(dependent)


def _counts_examples(captured: CapturedGraph) -> bool:
    """Return True if a graph uses the number of examples as a value."""
    try:
        dependent = _dependent(captured)
        counts = any(reason == BATCH_SIZE for _, reason in dependent)
        return counts and not _may_seem(dependent)
    except UnsupportedOperationError:
        return False


def _may_seem(dependent: Sequence[tuple[fx.Node, str]]) -> bool:
    """Return True if calls can tell whether the operations that join examples mix them.

    What only moves does so for all values alike. A choice by values, such as the best of a batch,
    may mix for other values than those of the calls.
    """
    # offsets of indices, as in idx + n * arange(len(x)), are told by the operation that takes them
    first = next((node for node, _ in dependent if is_floating(value_of(node))), dependent[0][0])
    moved = operation(first) in _MOVES
    return moved and all(reason is not RANDOM for _, reason in dependent)


def check_graph(
    captured: CapturedGraph, model: nn.Module, call: Call, output: Output = None
) -> None:
    """Raise UnsupportedOperationError if a captured model mixes examples, or is random.

    Args:
        captured: The graph of the model.
        model: The model.
        call: Inputs and further arguments of a call of the model.
        output: Which output, see :func:`captum_mipin.graph.signature.select`.
    """
    dependent = _dependent(captured)
    if not dependent:
        return
    lost = folded_batch(value_of(captured.output), captured.batch) is None
    if lost or not _may_seem(dependent) or _fault(model, call, (captured.shared,), output):
        _refuse(CheckRow(place(n).path, str(original(n)), "refused", why) for n, why in dependent)


def _check_calls(model: nn.Module, call: Call) -> None:
    """Raise UnsupportedOperationError if calls of a model show that it mixes examples."""
    found = _fault(model, call, (False,))
    if found is not None:
        kind = type(model.get_submodule(found.path)).__name__ if found.path else "an operation"
        why = RANDOM if found.kind == "random" else ALONG
        if call[1] and _fault(model, call, (True,)) is None:
            if takes_all_rows(Trial(model, None), (*call, False)):
                return
            why = f"{ALONG}, by their rows of a further argument; {SHARED}"
        _refuse([CheckRow(found.path, kind, "refused", why)])


def _refuse(rows: Iterable[CheckRow]) -> NoReturn:
    rows = list(rows)
    found = "draws random numbers" if rows[0].note == RANDOM else "mixes the examples of a batch"
    raise UnsupportedOperationError("\n".join([f"the model {found}", *listed(rows), _WAY_OUT]))


def _captured(model: nn.Module, call: Call) -> CapturedGraph | None:
    """Return the graph of a model; None if it cannot be captured."""
    graphs = Graphs[None]()
    try:
        return graphs.get(graphs.find(*call, partial(capture_apart, model, explained=False)))
    except CaptureError:
        return None


def _fault(
    model: nn.Module, call: Call, meanings: Sequence[bool], output: Output = None
) -> Fault | None:
    """Return what calls of a model show; None also for a model that cannot be copied."""
    try:
        return fault(Trial(model, output), *call, meanings)
    except Exception:  # of any type: the model decides how it is copied
        return None


def _dependent(captured: CapturedGraph) -> list[tuple[fx.Node, str]]:
    """Return the operations that join examples, count them or are random, with the reasons."""
    known = _DEPENDENT.setdefault(captured.graph, {})
    output = captured.output.name
    if output not in known:
        nodes = draft(captured, _Any(), None, _PASSES).graph.nodes
        known[output] = [(node, reason) for node in nodes if (reason := _dependence(node))]
    return known[output]


def _dependence(node: fx.Node) -> str:
    """Return the reason why the result for an example depends on others or on the call, or ""."""
    if is_random(node):
        return RANDOM
    if not any(marks(n).depends for n in node.all_input_nodes):
        return ""
    return uses_batch(node) or marks(node).mixes


def _values(argument: Any) -> list[Any]:
    return [value_of(node) for node in nodes_in(argument)]
