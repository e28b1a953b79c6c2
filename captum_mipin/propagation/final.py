"""The sigmoid or softmax that ends a model, and the logits below it.

Methods that send back a value of the output, or that compute a cross entropy, start from logits.
The functions of this module replace the output of a captured graph by these logits. All such
methods use them. Gradients do not, because the gradient of a probability is well defined; they say
what they explain.

A sigmoid is known by its values, however it is written: if the output is f(z) for each element z,
and f(z) = σ(a z + b) or log σ(a z + b) on a grid, the logits are a z + b. So is a softmax, see
:mod:`softmax`. Behind it, log p and, in a loss, −log p may be computed.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import isclose, isfinite
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import hardsigmoid

from captum_mipin.errors import LogitsWarning, UnsupportedOperationError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.marks import inherit
from captum_mipin.graph.nodes import operation, place
from captum_mipin.graph.validate import level_of_caller
from captum_mipin.propagation.draft import descendants
from captum_mipin.propagation.elementwise import ELEMENTWISE, arguments_of
from captum_mipin.propagation.softmax import softmax
from captum_mipin.report import CheckRow
from captum_mipin.rules.gates import REARRANGED

#: Operations by which a model may compute its output from several probabilities.
_COMBINED = REARRANGED | {
    "cat", "stack", "mean", "sum", "amax", "max", "clamp", "clamp_min", "clamp_max", "minimum",
    "maximum", "add", "sub", "rsub", "mul", "div", "neg", "log", "log1p", "exp",
    "log2", "log10", "expm1", "pow", "square", "sqrt", "rsqrt", "reciprocal", "abs",
    "gather", "index", "index_select", "masked_fill",
}  # fmt: skip

#: Operations that move and choose the elements of their first argument.
_MOVES = REARRANGED - {"rsub"} | {"gather", "index", "index_select", "masked_fill"}

#: Operations that compute each element of their result from the same element of their arguments.
_FUNCTIONS = ELEMENTWISE | {
    "special_expit", "log_sigmoid", "log_sigmoid_forward", "getitem", "log2", "log10", "exp2",
    "logaddexp",
}  # fmt: skip

#: Operations with a constant result → its value.
_CONSTANTS = {
    f"{prefix}{name}{suffix}": torch.tensor(value, dtype=torch.float64)
    for name, value in (("zeros", 0.0), ("ones", 1.0))
    for prefix, suffix in (("new_", ""), ("", "_like"), ("", ""))
}

#: Points at which functions are compared; at ±30, a probability that is clamped shows.
_GRID = torch.linspace(-30, 30, 121, dtype=torch.float64)


@dataclass(frozen=True)
class Final:
    """A sigmoid or softmax, or a function of it that rises or falls with its logits.

    Attributes:
        name: "sigmoid", "softmax", ...
        node: The node of its result.
        source: The node z of its argument.
        scale: The factor a of the logits a z + b.
        shift: The summand b.
    """

    name: str
    node: fx.Node
    source: fx.Node
    scale: float = 1.0
    shift: float = 0.0

    @property
    def is_loss(self) -> bool:
        """Return True for minus the logarithm of a softmax."""
        return self.scale < 0 and "softmax" in self.name

    @property
    def note(self) -> str:
        """The note in a table of :func:`~captum_mipin.check`."""
        if self.is_loss:
            return (
                f"the {self.name} ends the model, in a loss that falls with it: minus the logits "
                "that go into it are explained"
            )
        return f"the {self.name} ends the model: the logits that go into it are explained"


def below_final(captured: CapturedGraph) -> tuple[CapturedGraph, CheckRow | None]:
    """Return the graph whose output are the logits, and the row of the sigmoid or softmax above.

    Rearrangements behind the sigmoid or softmax, such as ``squeeze``, slices and the choice of an
    entry by ``gather``, stay.

    Args:
        captured: The graph of a model.

    Returns:
        The graph, and its row in a table of :func:`~captum_mipin.check`: None if the model does not
        end in a sigmoid or softmax; "refused" if the output is computed from probabilities in a way
        for which no logits are defined, such as their mean. The graph then is the same.
    """
    final, moves = _end(captured)
    if final is None:
        return captured, None
    if moves is not None:
        return _moved(captured, final, moves), _row(final, "supported", final.note)
    note = (
        f"the output is computed from the result of a {final.name}, so that its logits are not "
        "known: return the logits"
    )
    return captured, _row(final, "refused", note)


def _end(captured: CapturedGraph) -> tuple[Final | None, list[fx.Node] | None]:
    """Return the sigmoid or softmax that the output is, and the rearrangements behind it.

    Both are None if there is none; the second is None if more than rearrangements is behind it.
    """
    search, node = _Search(captured), captured.output
    behind: list[fx.Node] = []  # the operations behind ``node``, in order of execution
    while True:
        final = search.final(node, [n for n in behind if operation(n) not in _MOVES])
        if final is not None:
            return final, [n for n in behind if operation(n) in _MOVES]
        if operation(node) not in _MOVES and not search.is_function(node):
            return search.combined(), None
        behind.insert(0, node)
        node = node.all_input_nodes[0]


def result_row(captured: CapturedGraph) -> CheckRow | None:
    """Return the row of the sigmoid or softmax of a model, for methods that explain its result.

    A model that returns its loss has none: it is clear what the gradient of a loss is.
    """
    final, _ = _end(captured)
    if final is None or final.is_loss:
        return None
    caveat = f"the {final.name} ends the model: its result is explained, not the logits below it"
    return replace(_row(final, "passes", "derivative"), caveat=caveat)


def warn_of_result(captured: CapturedGraph) -> CapturedGraph:
    """Return the graph as it is, with a warning if it ends in a sigmoid or softmax."""
    row = result_row(captured)
    if row is not None:
        _warn(row, "explain the logits")
    return captured


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
    _warn(row, "avoid this warning")
    return graph


def _warn(row: CheckRow, purpose: str) -> None:
    text = f"{row.operation} in {row.path or 'the model itself'}: {row.caveat or row.note}"
    text += f". Pass the model without it to {purpose}"
    warnings.warn(text, LogitsWarning, stacklevel=level_of_caller())


def _row(final: Final, status: str, note: str) -> CheckRow:
    return CheckRow(place(final.node).path, str(final.node.target), status, note)


def _moved(captured: CapturedGraph, final: Final, moves: Sequence[fx.Node]) -> CapturedGraph:
    """Return the graph whose output are the logits after some rearrangements.

    Args:
        captured: The graph, which is copied if the output is not ``final.source`` itself.
        final: The sigmoid or softmax.
        moves: The nodes of the rearrangements, in order of execution.
    """
    if not moves and (final.scale, final.shift) == (1, 0):
        return replace(captured, output=final.source, places={})
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.graph_copy(captured.graph, copies)
    names = {node.name: copy.name for node, copy in copies.items()}
    output = copies[final.source]
    for move in moves:
        sources = {**copies, move.all_input_nodes[0]: output}
        with graph.inserting_after(copies[move]):
            output = graph.node_copy(move, sources.__getitem__)
    aten, a, b = torch.ops.aten, final.scale, final.shift
    calls = [(aten.neg.default,)] if a == -1 else [(aten.mul.Tensor, a)] if a != 1 else []
    for target, *numbers in [*calls, *([(aten.add.Tensor, b)] if b else [])]:
        with graph.inserting_after(output):
            source, output = output, graph.call_function(target, (output, *numbers))
        inherit(output, source, original=target)
    return replace(
        captured,
        graph=graph,
        constants={names[name]: source for name, source in captured.constants.items()},
        inputs=tuple(names[name] for name in captured.inputs),
        arguments=tuple(name and names[name] for name in captured.arguments),
        output=output,
        places={},
    )


class _Search:
    """The search for a sigmoid or softmax at the end of a graph.

    Args:
        captured: The graph.
    """

    def __init__(self, captured: CapturedGraph) -> None:
        self._output = captured.output
        named = {node.name: node for node in captured.graph.nodes}
        arguments = [named[name] for name in captured.arguments if name in named]
        self._varying = descendants(arguments)

    def final(self, node: Any, behind: Collection[fx.Node] = ()) -> Final | None:
        """Return the sigmoid or softmax whose result a node is, also one that is written by hand.

        Args:
            node: The node.
            behind: Functions of one element that follow, in order of execution. The result of the
                last of them has to rise or fall with the logits.
        """
        varies = self._varying.__contains__
        found = softmax(node, varies)
        if found is not None:
            name, logits = found
            p = _GRID.sigmoid()
            y = _value({node: p.log() if name == "log-softmax" else p}, [], behind)
            for form, sign in ((p, 1), (p.log(), 1), (-p.log(), -1)):
                if y is not None and torch.allclose(y, form, 1e-11, 1e-15):
                    return Final(name, node, logits, sign)
            return None
        other: Final | None = None
        if operation(node) in _FUNCTIONS:
            for z, inside in arguments_of(node, varies, _FUNCTIONS):
                y = _value({z: _GRID}, sorted(inside), behind)
                match = None if y is None else _logistic(y)
                if match is not None and match[1:] == (1, 0):
                    return Final(match[0], node, z)
                if match is not None and other is None:
                    other = Final(match[0], node, z, *match[1:])
        return other

    def is_function(self, node: fx.Node) -> bool:
        """Return True for a function of each element of the first argument and of numbers."""
        return operation(node) in _FUNCTIONS and len(node.all_input_nodes) == 1

    def combined(self) -> Final | None:
        """Return a sigmoid or softmax if the output is computed from such probabilities alone."""
        found: Final | None = None
        stack, seen = [self._output], set[fx.Node]()
        while stack:
            node = stack.pop()
            if node in seen or node not in self._varying:
                continue
            seen.add(node)
            final = self.final(node)
            if final is not None:
                found = found or final
            elif operation(node) in _COMBINED:
                stack.extend(node.all_input_nodes)
            else:
                return None
        return found


def _value(
    values: dict[fx.Node, Any], nodes: Collection[fx.Node], behind: Collection[fx.Node]
) -> Tensor | None:
    """Return the result of functions of one element; None if it depends on the model's weights.

    Args:
        values: The node that the functions begin at, and its value.
        nodes: The functions up to some result, in order of execution.
        behind: Further functions of this result, one of the other.
    """
    (result,) = values.values()
    try:
        for node in nodes:
            result = values[node] = _run(node, values)
        for node in behind:
            result = _run(node, {node.all_input_nodes[0]: result})
    except Exception:  # of any type: a weight is not known, or the operation takes no such numbers
        return None
    fits = isinstance(result, Tensor) and (result.shape, result.dtype) == (_GRID.shape, _GRID.dtype)
    return result if fits else None


def _run(node: Any, values: dict[fx.Node, Any]) -> Any:
    """Return the value of a node for the values of others."""
    if operation(node) in ("_to_copy", "clone", "alias", "contiguous", "detach"):
        return values[node.args[0]]

    def known(n: fx.Node) -> Any:
        return values[n] if n in values else _CONSTANTS[operation(n)]

    args, kwargs = fx.map_arg((node.args, node.kwargs), known)
    return node.target(*args, **kwargs)


def _logistic(y: Tensor) -> tuple[str, float, float] | None:
    """Return name, a and b if y = σ(a z + b) or log σ(a z + b) for the points z; else None."""
    middle = len(_GRID) // 2
    for name, p in (("sigmoid", y), ("log-sigmoid", y.exp())):
        # log(p / (1 − p)) = a z + b at z = −1, 0 and 1
        below, b, above = map(float, p[[middle - 2, middle, middle + 2]].logit())
        a = (above - below) / 2
        if not isfinite(a) or not isfinite(b):
            continue
        a, b = (float(round(n)) if isclose(n, round(n), abs_tol=1e-9) else n for n in (a, b))
        if a != 0 and torch.allclose(p, (a * _GRID + b).sigmoid(), 1e-11, 1e-15):
            return name, a, b
    for a in (1.0, -1.0):
        if torch.allclose(y, hardsigmoid(a * _GRID), 1e-11, 1e-15):
            return "hardsigmoid", a, 0.0
    return None
