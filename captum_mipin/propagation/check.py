"""What becomes of each operation of a model, before anything runs: where the signal goes, and what is refused.

Each node of the graph is marked by what it is to the signal on its way from the output back to the start: it carries
it, it is recorded (a gate or attention weights, to which nothing is sent), or neither.
"""

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from captum_mipin.errors import CaptureError, RuleError
from captum_mipin.graph.capture import CapturedGraph, capture
from captum_mipin.graph.layout import Layout, first_dimension
from captum_mipin.graph.marks import inherit, mark, marks, original, value_of
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.nodes import Place, operation, place
from captum_mipin.graph.subgraph import module_output
from captum_mipin.graph.validate import as_extras, as_inputs
from captum_mipin.propagation.averages import join_averages
from captum_mipin.propagation.batch_layout import lay_out
from captum_mipin.report import CheckReport, CheckRow
from captum_mipin.rules import RECORDABLE, Learned, Passes, Recorded, Rule, table
from captum_mipin.types import Inputs, Output

#: Operations that change a shape at most; sizes among their arguments are harmless.
SHAPE = ("view", "_unsafe_view", "reshape", "alias", "clone", "contiguous", "expand")


#: Values that follow from the size of the batch.
SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)

#: Operations whose result follows from the shape of their argument alone.
BLANK = (
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
)

#: What to do about some operations without a rule.
_HINTS = dict.fromkeys(
    ("softmax", "_softmax", "log_softmax", "_log_softmax"),
    "; where it ends the model, return the logits that go into it",
)

#: Operations that tell which dimension holds the channels.
_CHANNELS = {
    **dict.fromkeys(
        (
            "linear",
            "layer_norm",
            "rms_norm",
            "scaled_dot_product_attention",
            "matmul",
            "bmm",
            "mm",
            "addmm",
            "baddbmm",
        ),
        -1,
    ),
    **{
        f"{kind}{dims}d": 1
        for dims in (1, 2, 3)
        for kind in ("conv", "conv_transpose", "max_pool", "avg_pool")
    },
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "group_norm", "instance_norm"), 1),
}


#: What to do about inputs that are not to be explained.
_ARGUMENTS = ". Inputs that are not explained themselves go into additional_forward_args, which fit takes by unpack="

#: Operations that move values, so that their result is shaped like what they take by chance alone.
_MOVES = ("permute", "transpose", "t")


@dataclass(frozen=True)
class Treatment:
    """What becomes of one operation of the model.

    Attributes:
        place: Module path and name of the operation.
        operation: The operation as ``torch.export`` names it.
        status: "supported": inverted by a rule; "passes": its adjoint is right; "refused".
        note: What happens to the signal, or why the operation is refused.
        caveat: What of the method does not hold there.
    """

    place: Place
    operation: str
    status: str
    note: str
    caveat: str = ""


def survey(
    captured: CapturedGraph, rules: Mapping[str, Rule], start: str | None = None
) -> list[Treatment]:
    """What becomes of every operation between the start (or the inputs) and the output, in order of execution."""
    return treatments(marked_copy(captured, rules, start)[0], rules)


def marked_copy(
    captured: CapturedGraph, rules: Mapping[str, Rule], start: str | None
) -> tuple[fx.Graph, list[fx.Node]]:
    """A copy of the graph, cut to what the output needs, its nodes marked (see :func:`_mark`).

    Before rules rewrite it, "varies" marks what follows from the inputs, wherever the start is: all else is constant.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(captured.graph, copied))
    names = Counter[str]()
    for old, new in copied.items():
        name = str(place(old))
        names[name] += 1
        key = name if names[name] == 1 else f"{name}#{names[name]}"
        mark(new, origin=old.name, key=key)
    output = copied[captured.output]
    next(node for node in graph.nodes if node.op == "output").args = (output,)
    wanted = captured.inputs if start is None else (start,)
    starts = [next(new for old, new in copied.items() if old.name == name) for name in wanted]
    varying = _followers([new for old, new in copied.items() if old.name in captured.inputs])
    for node in graph.nodes:
        mark(node, varies=node in varying)
    needed = _needed(output)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and node not in needed:
            graph.erase_node(node)
    getattr(rules, "rewrite", join_averages)(graph, captured.batch, starts)
    _mark(graph, rules, starts, _needed(output))
    for node in graph.nodes:
        if marks(node).depends:
            lay_out(node, captured.batch, starts)
    lost = [node for node in starts if not marks(node).signal]
    if lost or not marks(output).signal:
        raise CaptureError(
            without_signal(lost, output)
            + (_ARGUMENTS if start is None and 0 < len(lost) < len(starts) else "")
        )
    for node in starts:
        if not first_dimension(value_of(node), captured.batch):
            shape = tuple(map(str, value_of(node).shape))
            raise CaptureError(
                f"{marks(node).key} has shape {shape}, expected the batch as its first dimension"
            )
    if marks(output).layout != Layout():
        shape = tuple(map(str, value_of(output).shape))
        raise CaptureError(
            f"the model's output has shape {shape}, expected the batch alone as its first dimension"
        )
    return graph, starts


def _needed(output: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    needed, stack = {output}, [output]
    while stack:
        new = [node for node in stack.pop().all_input_nodes if node not in needed]
        needed.update(new)
        stack.extend(new)
    return needed


def without_signal(lost: Sequence[fx.Node], output: fx.Node) -> str:
    """What is said of tensors to which no signal comes back."""
    names = {node: node.name if node.op == "placeholder" else marks(node).key for node in lost}
    steering = [names[node] for node in lost if output in _followers([node])]
    if steering:
        made = "nothing but gates, conditions or attention weights, to which no signal is sent"
        return f"the model makes of {', '.join(steering)} {made}, so nothing can be explained"
    return f"the model's output does not depend on {', '.join(names.values()) or 'its input'}, so nothing can be explained"


def _followers(starts: Sequence[fx.Node]) -> set[fx.Node]:
    """What is computed from these nodes, they included; not what follows from their shapes alone."""
    reached, queue = set(starts), list(starts)
    while queue:
        users = [
            user
            for user in queue.pop().users
            if user not in reached and operation(user) not in BLANK
        ]
        new = [user for user in users if not isinstance(value_of(user), SIZES)]
        reached.update(new)
        queue.extend(new)
    return reached


def _mark(
    graph: fx.Graph, rules: Mapping[str, Rule], starts: Sequence[fx.Node], needed: set[fx.Node]
) -> None:
    """Mark each node's ``meta``: "depends" on the starts, carries "signal" to the output, or is "recorded" on the way.

    "other" marks what would carry signal, had it a floating dtype.
    """
    for node in graph.nodes:
        sized = isinstance(value_of(node), SIZES) or operation(node) in BLANK
        follows = not sized and any(marks(n).depends for n in node.all_input_nodes)
        depends = node in needed and (node in starts or follows) and node.op != "output"
        mark(node, depends=depends)
    reached = {node for node in needed if any(user.op == "output" for user in node.users)}
    for node in reversed(list(graph.nodes)):
        if node in reached and node not in starts:
            positions = _carriers(node, rules)
            reached.update(
                n
                for position in positions
                for n in _nodes_in(node.args[position])
                if marks(n).depends
            )
        carries, value = node in reached and marks(node).depends, value_of(node)
        steers = marks(node).depends and not carries
        mark(
            node,
            signal=carries and _floating(value),
            discrete=carries and not _floating(value) and isinstance(value, Tensor),
            recorded=steers and isinstance(value, (Tensor, tuple, list)),
        )


def cut_recordings(graph: fx.Graph, rules: Mapping[str, Rule]) -> None:
    """Detach what carries signal wherever it is used to make gates or weights, so that nothing comes back from there."""
    for node in list(graph.nodes):
        part = (
            node.target is operator.getitem and marks(node).recorded and marks(node.args[0]).signal
        )
        if not part and not (marks(node).signal and isinstance(value_of(node), Tensor)):
            continue
        carried = {
            user: _carriers(user, rules) if marks(user).signal or user.op == "output" else ()
            for user in node.users
        }
        sizes = [user for user in node.users if isinstance(value_of(user), SIZES)]
        users = [
            user
            for user in node.users
            if user not in sizes
            and occurrences(user, node) > occurrences(user, node, carried[user])
        ]
        if not users:
            continue
        with graph.inserting_after(node):
            cut = graph.call_function(torch.ops.aten.detach.default, (node,))
        inherit(cut, node, signal=False)
        for user in users:
            spared = carried[user]
            parts = [a if i in spared else _swapped(a, node, cut) for i, a in enumerate(user.args)]
            user.args, user.kwargs = tuple(parts), _swapped(user.kwargs, node, cut)


def _swapped(argument: Any, old: fx.Node, new: fx.Node) -> Any:
    return fx.node.map_arg(argument, lambda n: new if n is old else n)


def channels(node: fx.Node, batch: int | None = None) -> int | None:
    """The dimension of a tensor's channels, as the operations nearest to it have it; None for one of one dimension.

    Args:
        node: The tensor.
        batch: The dimension of its examples; by default, as its layout has it.
    """
    value = value_of(node)
    if value.ndim < 2:
        return None
    at = marks(node).layout.dim if batch is None else batch
    for downwards in (True, False):
        seen, queue = {node}, [node]
        for this in queue:
            others = this.users if downwards else this.all_input_nodes
            said = (
                [_channels_of(other, this) for other in others]
                if downwards
                else [_channels_of(this, this)]
            )
            for dim in said:
                if dim is not None and dim % value.ndim != at:
                    return int(dim % value.ndim)
            if not downwards and operation(this) in _MOVES:
                continue
            for other in others:
                alike = isinstance(value_of(other), Tensor) and str(value_of(other).shape) == str(
                    value.shape
                )
                if alike and other not in seen and not (downwards and operation(other) in _MOVES):
                    seen.add(other)
                    queue.append(other)
    return next(dim for dim in (1, value.ndim - 1, 0) if dim != at)


def _channels_of(user: fx.Node, node: fx.Node) -> int | None:
    """Where an operation has the channels of ``node``, which it takes or is."""
    if operation(user) == "pooled_linear":
        return int(user.args[-1]) if user.args[0] is node else None  # type: ignore[arg-type]  # see PooledLinear
    return _CHANNELS.get(operation(user))


def _carriers(node: fx.Node, rules: Mapping[str, Rule]) -> Sequence[int]:
    """Positions of the arguments that carry a node's signal."""
    rule = rules.get(str(node.target))
    if node.op == "output" or rule is None or not _floating(value_of(node)):
        return range(len(node.args))
    positions = rule.carriers(node)
    if not isinstance(positions, Sequence) or any(
        at not in range(len(node.args)) for at in positions
    ):
        raise RuleError(
            f"the rule of {place(node)} says that the arguments at {positions!r} carry signal, expected a tuple of positions "
            f"among the {len(node.args)} that {node.target} is given by position"
        )
    return positions


def treatments(graph: fx.Graph, rules: Mapping[str, Rule]) -> list[Treatment]:
    """What becomes of every marked operation, in order of execution."""
    result = []
    for node in graph.nodes:
        follows = any(marks(n).depends for n in node.all_input_nodes)
        marked = marks(node).signal or marks(node).discrete or marks(node).recorded
        if (
            node.op != "call_function"
            or not marked
            or not follows
            or node.target is operator.getitem
            or marks(node).added
        ):
            continue
        rule = rules.get(str(node.target))
        if marks(node).discrete:
            reason = f"it turns the input into {value_of(node).dtype}, and what follows from that cannot be sent back"
        elif rule is None and not (marks(node).recorded and str(node.target) in RECORDABLE):
            reason = "no rule covers it" + _HINTS.get(operation(node), "")
        else:
            reason = _objection(node, rule) or ""
        if marks(node).joined:
            status, note = "supported", "taken together with the dense layer behind it"
        elif marks(node).recorded:
            status, note = "supported", "recorded: it makes gates or weights, and gets no signal"
        else:
            status, note = (
                "passes" if isinstance(rule, Passes) else "supported",
                rule.note if rule else "",
            )
        name = str(original(node))
        caveat = rule.caveat(node) if rule and not (reason or marks(node).recorded) else None
        result.append(
            Treatment(
                place(node), name, "refused" if reason else status, reason or note, caveat or ""
            )
        )
    return result


def _objection(node: fx.Node, rule: Rule | None) -> str | None:
    """Why a rule cannot treat this node, if so."""
    others = [n for argument in node.args[1:] for n in _nodes_in(argument)]
    others += [n for argument in node.kwargs.values() for n in _nodes_in(argument)]
    if operation(node) not in SHAPE and any(isinstance(value_of(n), SIZES) for n in others):
        return "it uses the size of the batch as a value, so an explanation would depend on the other examples"
    mixes = marks(node).mixes or None
    if rule is None or marks(node).recorded:
        return mixes
    carried = {n for position in rule.carriers(node) for n in _nodes_in(node.args[position])}
    if not rule.records and any(marks(n).depends for n in node.all_input_nodes if n not in carried):
        return "a second argument of it depends on the input as well"
    several = isinstance(rule, Passes) or (isinstance(rule, Recorded) and rule.several)
    if not several and len(rule.carriers(node)) != 1:
        return "its rule sends signal to other than one argument, which only Passes can"
    values = value_of(node)
    outputs = isinstance(values, (tuple, list)) and not isinstance(rule, Passes)
    if outputs and any(
        user.target is operator.getitem and user.args[1] != 0 for user in node.users
    ):
        return "another of its outputs than the first is used"
    return mixes or rule.refuse(node)


#: What to do where operations are refused.
_WAY_OUT = (
    "Start above it, with InverseNetwork(model, layer=...) at a module behind it, write that part of the model with supported "
    "operations, or give an operation without a rule one of your own with captum_mipin.register_rule; check(model, inputs) "
    "lists all."
)


def refusal(refused: Sequence[Treatment], rules: Mapping[str, Rule]) -> str:
    """What is said of refused operations: their names, their places, and the way out."""
    lines = [
        f"  {t.operation} in {t.place.path or 'the model itself'!s}: {t.note}" for t in refused[:8]
    ]
    if len(refused) > 8:
        lines.append(f"  … and {len(refused) - 8} more")
    return (
        "no signal can be sent back through\n"
        + "\n".join(lines)
        + "\n"
        + getattr(rules, "way_out", _WAY_OUT)
    )


def unscaled(node: fx.Node, rules: Mapping[str, Rule]) -> bool:
    """Whether the signal that reaches ``node`` has passed no learned inverse since its scale was lost."""
    while True:
        uses = carrying_users(node)
        if len(uses) != 1 or uses[0].op == "output":
            return len(uses) < 2
        node = uses[0]
        rule = rules.get(str(node.target))
        if isinstance(rule, Learned):
            return False
        if rule is not None and not rule.restores:
            return True


def carrying_users(node: fx.Node) -> list[fx.Node]:
    """Users of ``node`` that carry its signal on."""
    return [user for user in node.users if marks(user).signal or user.op == "output"]


def occurrences(user: fx.Node, node: fx.Node, positions: Sequence[int] | None = None) -> int:
    """How often ``user`` uses ``node``, or does so at these positions."""
    arguments = (
        [*user.args, *user.kwargs.values()]
        if positions is None
        else [user.args[i] for i in positions]
    )
    return sum(n is node for argument in arguments for n in _nodes_in(argument))


def redirect(old: fx.Node, new: Iterator[fx.Node], users: Sequence[fx.Node]) -> None:
    """Let ``users`` use the next of ``new`` each time they use ``old``."""
    for user in users:
        user.args = fx.node.map_arg(user.args, lambda n: next(new) if n is old else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: next(new) if n is old else n)


def _nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _floating(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_floating(v) for v in value)
    return isinstance(value, Tensor) and value.is_floating_point()


def check(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    additional_forward_args: Any = None,
    *,
    layer: nn.Module | None = None,
    output: Output = None,
    method: Any = None,
) -> CheckReport:
    """Tell for every operation of a model whether the signal can be sent back through it.

    Args:
        model: A module in evaluation mode.
        example_inputs: Tensor (batch, ...) or tuple of such; only shapes, dtypes and devices count.
        additional_forward_args: Further arguments of the model.
        layer: Look only at what lies above this module.
        output: Which of several outputs, as for :class:`InverseNetwork`.
        method: Another method of this package than MIP-IN: its class, or ``LRP(model, ...)`` with the options to look at. Where
            it does not conserve, or its definition does not reach, a column more says so.

    Returns:
        A table of operations, each "supported", "passes" or "refused" with its reason.

    Raises:
        CaptureError: The model as a whole cannot be captured.

    Examples:
        >>> print(check(nn.Sequential(nn.Linear(4, 2), nn.Softmax(1)).eval(), torch.ones(1, 4)))
        module  operation            status     what happens to the signal
        0       aten.linear.default  supported  learned dense inverse
        1       aten.softmax.int     refused    no rule covers it; where it ends the model, return the logits that go into it
    """
    model, inputs, extras = (
        unwrapped(model),
        as_inputs(example_inputs),
        as_extras(additional_forward_args),
    )
    graph = capture(model, inputs, extras, output=output, explained=layer is None)
    start = None if layer is None else module_output(graph, model, unwrapped(layer))
    method = method(model) if isinstance(method, type) else method
    found = survey(graph, table(), start) if method is None else method.survey(graph, start)
    return CheckReport(
        tuple(CheckRow(t.place.path, t.operation, t.status, t.note, t.caveat) for t in found)
    )
