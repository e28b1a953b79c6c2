"""What becomes of each operation of a model, before anything runs: where the signal goes, and what is refused.

Each node of the graph is marked by what it is to the signal on its way from the output back to the start: it carries
it, it is recorded (a gate or attention weights, to which nothing is sent), or neither.
"""

import hashlib
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from captum_mipin.averages import join_averages
from captum_mipin.batch import Layout, first_dimension, layout
from captum_mipin.capture import CapturedGraph, Place, memory, place
from captum_mipin.errors import CaptureError
from captum_mipin.rules import MIPIN, RECORDABLE, Learned, Passes, Rule, operation
from captum_mipin.rules.base import is_gate

#: Operations that change a shape at most; sizes among their arguments are harmless.
_SHAPE = ("view", "_unsafe_view", "reshape", "alias", "clone", "contiguous", "expand")


#: Values that follow from the size of the batch.
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)

#: Operations whose result follows from the shape of their argument alone.
_BLANK = ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")

#: Operations that tell which dimension holds the channels.
_CHANNELS = {
    **dict.fromkeys(("linear", "layer_norm", "scaled_dot_product_attention", "matmul", "bmm"), -1),
    **{f"{kind}{dims}d": 1 for dims in (1, 2, 3) for kind in ("conv", "conv_transpose", "max_pool", "avg_pool")},
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "group_norm"), 1),
}


@dataclass(frozen=True)
class Treatment:
    """What becomes of one operation of the model.

    Attributes:
        place: Module path and name of the operation.
        operation: The operation as ``torch.export`` names it.
        status: "supported": inverted by a rule; "passes": its adjoint is right; "refused".
        note: What happens to the signal, or why the operation is refused.
    """

    place: Place
    operation: str
    status: str
    note: str


def structure(captured: CapturedGraph) -> str:
    """SHA-256 over what a model computes: its operations, where they are, how they are set and wired; not the weights.

    Changes of shape alone do not count: their arguments depend on the size of the inputs, and hooks put some in.
    """
    digest = hashlib.sha256()
    for _, line, _ in _lines(captured):
        digest.update(line.encode())
    return digest.hexdigest()


def difference(fitted: CapturedGraph, captured: CapturedGraph) -> str | None:
    """The first operation in which a model computes otherwise for some inputs than for those fitted on; None if all agree.

    Numbers that follow from the size of the inputs may differ where a rule restores the scale of the signal all the same:
    windows of pooling, slices, paddings.
    """
    for one, other in zip_longest(_lines(fitted), _lines(captured)):
        if one is None or other is None or one[2] != other[2]:
            node = (other or one)[0]
            name = node.target if isinstance(node.target, torch._ops.OpOverload) else operation(node)
            return f"{name} in {place(node).path or 'the model itself'}"
    return None


def _lines(captured: CapturedGraph) -> Iterator[tuple[fx.Node, str, str]]:
    """Each operation, how it is set and wired, and the same without the numbers that may follow from the inputs' size."""
    names: dict[fx.Node, str] = {}
    count = 0
    for node in captured.graph.nodes:
        if isinstance(node.meta.get("val"), torch.SymInt):
            names[node] = "size"
        elif node.op == "placeholder":
            constant = captured.constants.get(node.name, node.name)
            names[node] = constant if isinstance(constant, str) else hashlib.sha256(memory(constant)).hexdigest()
        elif node.op == "call_function" and place(node).operation in _SHAPE and not _added_up(node):
            names[node] = names[node.all_input_nodes[0]]
        elif node.op == "call_function":
            count += 1
            names[node] = f"%{count}"
            what = f"{names[node]} {place(node)} {node.target} {_added_up(node)}"
            arguments = fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
            rule = MIPIN.get(str(node.target))
            sized = rule is not None and rule.restores and not isinstance(rule, Learned)
            loose = pytree.tree_map(lambda a: "size" if type(a) is int else a, arguments) if sized else arguments
            yield node, f"{what} {arguments}", f"{what} {loose}"


def _added_up(node: fx.Node) -> list[int]:
    """Sizes on which the scale of the signal depends: those over which a value is spread, and of attention weights."""
    rule, value = MIPIN.get(str(node.target)), node.meta.get("val")
    if not isinstance(rule, Passes) or rule.restores or not isinstance(value, Tensor):
        return []
    factors = [n for n in node.all_input_nodes if _batched(n)]
    if operation(node) not in ("add", "sub", "rsub", "neg", "mul", "div", "expand"):
        return [n for factor in factors for n in factor.meta["val"].shape[-2:] if type(n) is int]
    spread = [n for n in factors if not _only_gate(n, node)]
    return [size for n in spread for size in _copies(n.meta["val"], value)]


def _batched(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(isinstance(n, torch.SymInt) for n in value.shape)


def _only_gate(node: fx.Node, user: fx.Node) -> bool:
    """Whether ``user`` takes ``node`` for a gate, to which no signal is sent."""
    if operation(user) == "expand":
        return bool(user.users) and all(_only_gate(user, other) for other in user.users)
    others = [n for n in user.all_input_nodes if n is not node and _batched(n) and not is_gate(n)]
    return operation(user) == "mul" and is_gate(node) and bool(others)


def _copies(value: Tensor, result: Tensor) -> list[int]:
    sizes = (1,) * (result.ndim - value.ndim) + tuple(value.shape)
    return [n for m, n in zip(sizes, result.shape, strict=True) if type(m) is type(n) is int and m == 1 and n != 1]


def survey(captured: CapturedGraph, rules: Mapping[str, Rule], start: str | None = None) -> list[Treatment]:
    """What becomes of every operation between the start (or the inputs) and the output, in order of execution."""
    return treatments(marked_copy(captured, rules, start)[0], rules)


def marked_copy(captured: CapturedGraph, rules: Mapping[str, Rule], start: str | None) -> tuple[fx.Graph, list[fx.Node]]:
    """A copy of the graph, cut to what the output needs, its nodes marked (see :func:`_mark`)."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(captured.graph, copied))
    names = Counter[str]()
    for old, new in copied.items():
        name = str(place(old))
        names[name] += 1
        new.meta["origin"] = old.name  # a copy may have to take another
        new.meta["key"] = name if names[name] == 1 else f"{name}#{names[name]}"
        if new.target is torch.ops.aten.view.default:  # the export saw contiguous tensors; others need a copy
            new.target = torch.ops.aten.reshape.default
            new.meta["shown"] = old.target
    output = copied[captured.output]
    next(node for node in graph.nodes if node.op == "output").args = (output,)
    wanted = captured.inputs if start is None else (start,)
    starts = [next(new for old, new in copied.items() if old.name == name) for name in wanted]
    needed, stack = {output}, [output]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                stack.append(node)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and node not in needed:
            graph.erase_node(node)
    join_averages(graph, captured.batch, starts)
    _mark(graph, rules, starts, needed)
    for node in graph.nodes:
        if node.meta["depends"]:
            node.meta["layout"] = Layout() if node in starts else layout(node, captured.batch)
    lost = [node.name for node in starts if not node.meta.get("signal")]
    if lost or not output.meta["signal"]:
        raise CaptureError(
            f"the model's output does not depend on {', '.join(lost) or 'its input'}, so nothing can be explained"
        )
    for node in starts:
        if not first_dimension(node.meta["val"], captured.batch):
            shape = tuple(map(str, node.meta["val"].shape))
            raise CaptureError(f"{node.meta['key']} has shape {shape}, expected the batch as its first dimension")
    at = output.meta.get("layout")
    if isinstance(at, Layout) and at != Layout():
        shape = tuple(map(str, output.meta["val"].shape))
        raise CaptureError(f"the model's output has shape {shape}, expected the batch alone as its first dimension")
    return graph, starts


def _mark(graph: fx.Graph, rules: Mapping[str, Rule], starts: Sequence[fx.Node], needed: set[fx.Node]) -> None:
    """Mark each node's ``meta``: "depends" on the starts, carries "signal" to the output, or is "recorded" on the way.

    "other" marks what would carry signal, had it a floating dtype.
    """
    for node in graph.nodes:
        sized = isinstance(node.meta.get("val"), _SIZES) or operation(node) in _BLANK
        follows = not sized and any(n.meta["depends"] for n in node.all_input_nodes)
        node.meta["depends"] = node in needed and (node in starts or follows) and node.op != "output"
    reached = {node for node in needed if any(user.op == "output" for user in node.users)}
    for node in reversed(list(graph.nodes)):
        if node in reached and node not in starts:
            positions = _carriers(node, rules)
            reached.update(n for position in positions for n in _nodes_in(node.args[position]) if n.meta["depends"])
        carries, value = node in reached and node.meta["depends"], node.meta.get("val")
        node.meta["signal"] = carries and _floating(value)
        node.meta["other"] = carries and not _floating(value) and isinstance(value, Tensor)
        node.meta["recorded"] = node.meta["depends"] and not carries and isinstance(value, (Tensor, tuple, list))


def cut_recordings(graph: fx.Graph, rules: Mapping[str, Rule]) -> None:
    """Detach what carries signal wherever it is used to make gates or weights, so that nothing comes back from there."""
    for node in list(graph.nodes):
        part = node.target is operator.getitem and node.meta["recorded"] and node.args[0].meta["signal"]
        if not part and not (node.meta["signal"] and isinstance(node.meta["val"], Tensor)):
            continue
        carried = {user: _carriers(user, rules) if user.meta["signal"] or user.op == "output" else () for user in node.users}
        sizes = [user for user in node.users if isinstance(user.meta.get("val"), _SIZES)]
        users = [
            user
            for user in node.users
            if user not in sizes and occurrences(user, node) > occurrences(user, node, carried[user])
        ]
        if not users:
            continue
        with graph.inserting_after(node):
            cut = graph.call_function(torch.ops.aten.detach.default, (node,))
        cut.meta = {**node.meta, "signal": False}
        for user in users:
            spared = carried[user]
            parts = [a if i in spared else _swapped(a, node, cut) for i, a in enumerate(user.args)]
            user.args, user.kwargs = tuple(parts), _swapped(user.kwargs, node, cut)


def _swapped(argument: Any, old: fx.Node, new: fx.Node) -> Any:
    return fx.node.map_arg(argument, lambda n: new if n is old else n)


def channels(node: fx.Node) -> int | None:
    """The dimension of a tensor's channels, as the operations nearest to it have it; None for one of one dimension."""
    value = node.meta["val"]
    if value.ndim < 2:
        return None
    at: Layout = node.meta["layout"]
    for downwards in (True, False):
        seen, queue = {node}, [node]
        for this in queue:
            if not downwards and _CHANNELS.get(operation(this), at.dim) % value.ndim != at.dim:
                return int(_CHANNELS[operation(this)] % value.ndim)
            for other in this.users if downwards else this.all_input_nodes:
                dim = _CHANNELS.get(operation(other), at.dim) % value.ndim
                if dim != at.dim:
                    return int(dim)
                alike = isinstance(other.meta.get("val"), Tensor) and str(other.meta["val"].shape) == str(value.shape)
                if alike and other not in seen:
                    seen.add(other)
                    queue.append(other)
    return next(dim for dim in (1, value.ndim - 1, 0) if dim != at.dim)


def _carriers(node: fx.Node, rules: Mapping[str, Rule]) -> Sequence[int]:
    """Positions of the arguments that carry a node's signal."""
    rule = rules.get(str(node.target))
    if node.op == "output" or rule is None or not _floating(node.meta.get("val")):
        return range(len(node.args))
    return rule.carriers(node)


def treatments(graph: fx.Graph, rules: Mapping[str, Rule]) -> list[Treatment]:
    """What becomes of every marked operation, in order of execution."""
    result = []
    for node in graph.nodes:
        follows = any(n.meta["depends"] for n in node.all_input_nodes)
        marked = node.meta["signal"] or node.meta["other"] or node.meta["recorded"]
        if node.op != "call_function" or not marked or not follows or node.target is operator.getitem:
            continue
        rule = rules.get(str(node.target))
        if node.meta["other"]:
            reason = f"it turns the input into {node.meta['val'].dtype}, and what follows from that cannot be sent back"
        elif rule is None and not (node.meta["recorded"] and str(node.target) in RECORDABLE):
            reason = "no rule covers it"
        else:
            reason = _objection(node, rule) or ""
        if node.meta["recorded"]:
            status, note = "supported", "recorded: it makes gates or weights, and gets no signal"
        else:
            status, note = "passes" if isinstance(rule, Passes) else "supported", rule.note if rule else ""
        name = str(node.meta.get("shown", node.target))
        result.append(Treatment(place(node), name, "refused" if reason else status, reason or note))
    return result


def _objection(node: fx.Node, rule: Rule | None) -> str | None:
    """Why a rule cannot treat this node, if so."""
    others = [n for argument in node.args[1:] for n in _nodes_in(argument)]
    others += [n for argument in node.kwargs.values() for n in _nodes_in(argument)]
    if place(node).operation not in _SHAPE and any(isinstance(n.meta.get("val"), _SIZES) for n in others):
        return "it uses the size of the batch as a value, so an explanation would depend on the other examples"
    at = node.meta["layout"]
    mixes = at if isinstance(at, str) else None
    if rule is None or node.meta["recorded"]:
        return mixes
    carried = {n for position in rule.carriers(node) for n in _nodes_in(node.args[position])}
    if not rule.records and any(n.meta["depends"] for n in node.all_input_nodes if n not in carried):
        return "a second argument of it depends on the input as well"
    values = node.meta["val"]
    several = isinstance(values, (tuple, list)) and not isinstance(rule, Passes)
    if several and any(user.target is operator.getitem and user.args[1] != 0 for user in node.users):
        return "another of its outputs than the first is used"
    return mixes or rule.refuse(node)


def refusal(refused: Sequence[Treatment]) -> str:
    """What is said of refused operations: their names, their places, and the way out."""
    lines = [f"  {t.operation} in {t.place.path or 'the model itself'!s}: {t.note}" for t in refused[:8]]
    if len(refused) > 8:
        lines.append(f"  … and {len(refused) - 8} more")
    return (
        "no signal can be sent back through\n" + "\n".join(lines) + "\nStart above it, with InverseNetwork(model, "
        "layer=...) at a module behind it, or write that part of the model with supported operations; "
        "check(model, inputs) lists all."
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
    return [user for user in node.users if user.meta.get("signal") or user.op == "output"]


def occurrences(user: fx.Node, node: fx.Node, positions: Sequence[int] | None = None) -> int:
    """How often ``user`` uses ``node``, or does so at these positions."""
    arguments = [*user.args, *user.kwargs.values()] if positions is None else [user.args[i] for i in positions]
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
