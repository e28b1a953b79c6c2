"""The sigmoid or softmax that ends a model, and the logits below it.

Methods that send back a value of the output, or that compute a cross entropy, start from logits.
The functions of this module replace the output of a captured graph by these logits. All such
methods use them; gradients do not, because the gradient of a probability is well defined.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from captum_mipin.errors import LogitsWarning, UnsupportedOperationError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import argument, operation, place
from captum_mipin.graph.validate import level_of_caller
from captum_mipin.propagation.draft import descendants
from captum_mipin.report import CheckRow
from captum_mipin.rules.gates import REARRANGED

#: Operation on logits → its name in messages. Each has the logits as its first argument.
_NAMES = {
    "sigmoid": "sigmoid", "hardsigmoid": "hardsigmoid", "special_expit": "sigmoid",
    "log_sigmoid": "log-sigmoid", "softmax": "softmax", "_softmax": "softmax",
    "log_softmax": "log-softmax", "_log_softmax": "log-softmax",
}  # fmt: skip
#: Operations by which a model may compute its output from several probabilities.
_COMBINED = REARRANGED | {
    "cat", "stack", "mean", "sum", "amax", "max", "clamp", "clamp_min", "clamp_max", "minimum",
    "maximum", "add", "sub", "rsub", "mul", "div", "neg", "log", "log1p", "exp",
    "log2", "log10", "expm1", "pow", "square", "sqrt", "rsqrt", "reciprocal", "abs",
}  # fmt: skip
_MOVES = REARRANGED - {"rsub"}


@dataclass(frozen=True)
class Final:
    """A sigmoid or softmax.

    Attributes:
        name: "sigmoid", "softmax", ...
        node: The node of its result.
        logits: The node of its argument.
    """

    name: str
    node: fx.Node
    logits: fx.Node

    def __str__(self) -> str:
        return f"{self.name} ({place(self.node).path or 'the model itself'})"


def below_final(captured: CapturedGraph) -> tuple[CapturedGraph, CheckRow | None]:
    """Return the graph whose output are the logits, and the row of the sigmoid or softmax above.

    Rearrangements behind the sigmoid or softmax, such as ``squeeze`` and slices, stay.

    Args:
        captured: The graph of a model.

    Returns:
        The graph, and its row in a table of :func:`~captum_mipin.check`: None if the model does not
        end in a sigmoid or softmax; "refused" if the output is computed from probabilities in a way
        for which no logits are defined, such as 1 − p. The graph then is the same.
    """
    node, moves = captured.output, list[fx.Node]()
    while operation(node) in _MOVES:
        moves.append(node)
        node = node.all_input_nodes[0]
    final = _final(node)
    if final is None:
        final = _combined(captured)
        if final is None:
            return captured, None
        note = (
            f"the output is computed from the result of a {final.name}, so that its logits are not "
            "known: return the logits"
        )
        return captured, _row(final, "refused", note)
    note = f"the {final.name} ends the model: the logits that go into it are explained"
    row = _row(final, "supported", note)
    return _moved(captured, final.logits, moves[::-1]), row


def require_logits(captured: CapturedGraph) -> CapturedGraph:
    """Return the graph whose output are the logits, with a warning if the model's output are not.

    Args:
        captured: The graph of a model.

    Raises:
        UnsupportedOperationError: The output is computed from probabilities in a way for which no
            logits are defined.
    """
    graph, row = below_final(captured)
    if row is None:
        return graph
    if row.status == "refused":
        raise UnsupportedOperationError(
            f"{row.operation} in {row.path or 'the model itself'}: {row.note}. This method starts "
            "from logits: pass a model without this last part"
        )
    warnings.warn(
        f"{row.operation} in {row.path or 'the model itself'}: {row.note}. Pass the model without "
        "it to avoid this warning",
        LogitsWarning,
        stacklevel=level_of_caller(),
    )
    return graph


def _row(final: Final, status: str, note: str) -> CheckRow:
    return CheckRow(place(final.node).path, str(final.node.target), status, note)


def _moved(captured: CapturedGraph, logits: fx.Node, moves: Sequence[fx.Node]) -> CapturedGraph:
    """Return the graph whose output are the logits after some rearrangements.

    Args:
        captured: The graph, which is copied if there are rearrangements.
        logits: The node of the logits.
        moves: The nodes of the rearrangements, in order of execution.
    """
    if not moves:
        return replace(captured, output=logits, places={})
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.graph_copy(captured.graph, copies)
    names = {node.name: copy.name for node, copy in copies.items()}
    output = copies[logits]
    for move in moves:
        sources = {**copies, move.all_input_nodes[0]: output}
        with graph.inserting_after(copies[move]):
            output = graph.node_copy(move, sources.__getitem__)
    return replace(
        captured,
        graph=graph,
        constants={names[name]: source for name, source in captured.constants.items()},
        inputs=tuple(names[name] for name in captured.inputs),
        arguments=tuple(name and names[name] for name in captured.arguments),
        output=output,
        places={},
    )


def _combined(captured: CapturedGraph) -> Final | None:
    """Return a sigmoid or softmax if the output is computed from such probabilities alone."""
    named = {node.name: node for node in captured.graph.nodes}
    varying = descendants([named[name] for name in captured.arguments if name in named])
    found: Final | None = None
    stack, seen = [captured.output], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen or node not in varying:
            continue
        seen.add(node)
        final = _final(node)
        if final is not None:
            found = found or final
        elif operation(node) in _COMBINED:
            stack.extend(node.all_input_nodes)
        else:
            return None
    return found


def _final(node: Any) -> Final | None:
    """Return the sigmoid or softmax whose result a node is, also one that is written by hand."""
    kind: str = operation(node)
    args: Any = getattr(node, "args", ())
    if kind in _NAMES:
        if "softmax" in kind and _over_batch(node):
            return None  # it mixes the examples
        return Final(_NAMES[kind], node, args[0])
    if kind == "getitem" and operation(args[0]) == "log_sigmoid_forward":
        return Final("log-sigmoid", node, args[0].args[0])
    if kind in ("log", "exp"):  # the log of a softmax, or the exp of a log-softmax
        inner = _final(args[0])
        inverse = inner is not None and inner.name.startswith("log-") == (kind == "exp")
        return Final(f"{kind} of {inner.name}", node, inner.logits) if inner and inverse else None
    if kind == "mul" and 1 in args:  # 1 / x is traced as reciprocal(x) * 1
        return _final(args[0])
    written = _by_hand(kind, args)
    return written and Final(written[0], node, written[1])


def _by_hand(kind: str, args: Any) -> tuple[str, fx.Node] | None:
    """Return the name and the logits of a sigmoid or softmax made of other operations."""
    if kind == "sub" and operation(args[1]) == "logsumexp" and args[1].args[0] is args[0]:
        return None if _over_batch(args[1]) else ("log-softmax", args[0])
    if kind == "neg" and operation(args[0]) == "softplus" and len(args[0].args) == 1:
        inner = args[0].args[0]
        return ("log-sigmoid", inner.args[0]) if operation(inner) == "neg" else None
    if kind == "div":
        top, bottom = args[:2]
    elif kind == "reciprocal":
        top, bottom = 1, args[0]
    else:
        return None
    if operation(top) == "exp":
        z = top.args[0]
        if operation(bottom) == "sum" and _same(bottom.args[0], top):
            return None if _over_batch(bottom) else ("softmax", _unshifted(z))
        if operation(bottom) == "add" and 1 in bottom.args:  # exp(z) / (1 + exp(z))
            (exp,) = bottom.all_input_nodes
            return ("sigmoid", z) if _same(exp, top) else None
    # 1 / (1 + exp(−z))
    if type(top) in (int, float) and top == 1 and operation(bottom) == "add" and 1 in bottom.args:
        (exp,) = bottom.all_input_nodes
        if operation(exp) == "exp" and operation(exp.args[0]) == "neg":
            return "sigmoid", exp.args[0].args[0]
    return None


def _over_batch(node: Any) -> bool:
    """Return True if a softmax, ``sum`` or ``logsumexp`` goes over the first dimension."""
    dims = argument(node, 1, "dim")
    if not isinstance(dims, (int, list, tuple)) or dims == []:
        return True  # over all dimensions
    dims = [dims] if isinstance(dims, int) else dims
    return any(dim % value_of(node.args[0]).ndim == 0 for dim in dims)


def _same(node: Any, other: Any) -> bool:
    """Return True if two nodes are the same operation on the same tensor."""
    return operation(node) == operation(other) and bool(node.args == other.args)


def _unshifted(z: Any) -> Any:
    """Return x for z = x − max(x), by which a softmax avoids overflow; else z."""
    if operation(z) != "sub" or not isinstance(z.args[1], fx.Node):
        return z
    x, shift = z.args[:2]
    while operation(shift) in ("detach", "getitem", "alias", "unsqueeze"):
        shift = shift.args[0]
    largest = operation(shift) in ("amax", "max", "logsumexp")
    return x if largest and argument(shift, 0, "self") is x else z
