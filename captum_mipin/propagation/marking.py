"""The passes that mark the role of each node in the backward pass of the signal."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from captum_mipin.errors import CaptureError
from captum_mipin.graph.layout import Layout, batch_dimension, shape_text
from captum_mipin.graph.marks import mark, marks, value_of
from captum_mipin.graph.nodes import ancestors, operation
from captum_mipin.propagation.draft import Draft, descendants, is_constant
from captum_mipin.rules.base import is_floating, varies
from captum_mipin.rules.gates import DIVISIONS, GATES_AND_SCALES


def mark_varying(draft: Draft) -> None:
    """Mark the nodes that are computed from the model's inputs, and count their gates.

    All other nodes are constant. So are masks of integers among the inputs, unless nothing else
    varies or they are explained: integers carry no signal.
    """
    for masks in (True, False):
        integers: set[fx.Node] = set()  # that are computed from integers among the inputs alone
        for node in draft.graph.nodes:
            mark_as_varying(node, node in draft.inputs)
            sources = [n for n in node.all_input_nodes if isinstance(value_of(n), Tensor)]
            whole = integers.issuperset(filter(varies, sources))
            if varies(node) and whole and not is_floating(value_of(node)):
                integers.add(node)
            elif masks and sources and whole and not any(is_floating(value_of(n)) for n in sources):
                mark(node, varies=False, gates=0)
        if all(map(varies, (draft.output, *draft.starts))):
            return


def mark_as_varying(node: fx.Node, is_input: bool = False) -> None:
    """Set the marks "varies" and "gates" of a node, by those of its arguments."""
    follows = not is_constant(node) and any(map(varies, node.all_input_nodes))
    mark(node, varies=is_input or follows, gates=_gates(node) if follows else 0)


def _gates(node: fx.Node) -> int:
    """Return the smallest number of gates and scales on a path from the inputs to a value.

    All that is computed from gates alone is a gate as well, by whatever operations.

    Args:
        node: An operation, whose arguments are marked already.
    """
    ratio = operation(node) in DIVISIONS
    if ratio and varies(node.args[0]):
        return marks(node.all_input_nodes[0]).gates  # the divisor only scales the dividend
    varying, value = [n for n in node.all_input_nodes if varies(n)], value_of(node)
    whole = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
    compares = whole and any(is_floating(value_of(n)) for n in varying)  # also argmax, isnan, ...
    compares = compares or (isinstance(value, Tensor) and value.dtype == torch.bool)
    makes = ratio or compares or operation(node) in GATES_AND_SCALES
    return makes + min(marks(n).gates for n in varying)


def drop_unused(draft: Draft) -> None:
    """Erase operations that the output does not need."""
    needed = ancestors([draft.output])
    for node in reversed(list(draft.graph.nodes)):
        if node.op not in ("placeholder", "output") and node not in needed:
            draft.graph.erase_node(node)


def mark_signal(draft: Draft) -> None:
    """Set the marks "depends", "signal", "recorded" and "discrete" of all nodes.

    See :class:`~captum_mipin.graph.marks.Marks` for their meanings.
    """
    nodes, starts, needed = list(draft.graph.nodes), draft.starts, ancestors([draft.output])
    for node in nodes:
        follows = not is_constant(node) and any(marks(n).depends for n in node.all_input_nodes)
        mark(node, depends=node in needed and (node in starts or follows))
    reached = {draft.output}
    # In reverse order of execution: all users of a node come before the node itself.
    for node in reversed(nodes):
        if node in reached and node not in starts:
            reached.update(n for n in draft.carried(node) if marks(n).depends)
        value, depends = value_of(node), marks(node).depends
        carries, floating = depends and node in reached, is_floating(value)
        mark(
            node,
            signal=carries and floating,
            discrete=carries and not floating and isinstance(value, Tensor),
            recorded=depends and not carries and isinstance(value, (Tensor, tuple, list)),
        )


def check_ends(draft: Draft) -> None:
    """Check the model's output and the explained nodes.

    Raises:
        CaptureError: An explained node gets no signal, the batch is no dimension of an explained
            node, or it is not the first dimension of the output.
    """
    for node in (*draft.starts, draft.output):
        if value_of(node).is_complex():
            what = "the model's output" if node is draft.output else marks(node).key or node.name
            raise CaptureError(
                f"{what} has {value_of(node).dtype} numbers, expected real ones: let forward "
                "return their absolute values or real parts, or name a layer with real numbers"
            )
    lost = [node for node in draft.starts if not marks(node).signal]
    if lost or not marks(draft.output).signal:
        detached = [n for n in descendants(lost) if str(n.target) == "aten.detach.default"]
        if any(not draft.carriers(node) for node in detached):
            raise CaptureError(
                "the model computes its output from the inputs under torch.no_grad() or behind "
                "detach(), where every gradient is 0; expected a path with gradients: remove "
                "no_grad() from forward, or use a method without gradients, such as LRP or MIP-IN"
            )
        text = without_signal(lost, draft.output)
        if draft.starts == draft.inputs and 0 < len(lost) < len(draft.starts):
            text += (
                ". Inputs that are not to be explained go into additional_forward_args, which fit "
                "takes by unpack="
            )
        raise CaptureError(text)
    for node in draft.starts:
        if batch_dimension(value_of(node), draft.batch) != 0:
            shape = shape_text(value_of(node), draft.batch)
            raise CaptureError(
                f"{marks(node).key} has shape {shape}, expected the batch as one of its "
                "dimensions: name another layer"
            )
    if marks(draft.output).layout != Layout():
        shape = shape_text(value_of(draft.output), draft.batch)
        raise CaptureError(
            f"the model's output has shape {shape}, expected the batch as its first dimension, "
            "with one row per example: wrap the model in a module that moves it there"
        )


def without_signal(lost: Sequence[fx.Node], output: fx.Node) -> str:
    """Return the error text for explained nodes that get no signal.

    Args:
        lost: The explained nodes without a signal.
        output: The node of the model's output.
    """
    names = {node: node.name if node.op == "placeholder" else marks(node).key for node in lost}
    steering = [names[node] for node in lost if output in descendants([node])]
    if steering:
        return (
            f"the model uses {', '.join(steering)} only for gates, conditions or attention "
            "weights. These get no signal, so nothing can be explained; expected a tensor whose "
            "values reach the output"
        )
    return (
        f"the model's output does not depend on {', '.join(names.values()) or 'its input'}, so "
        "nothing can be explained; expected a tensor whose values reach the output"
    )
