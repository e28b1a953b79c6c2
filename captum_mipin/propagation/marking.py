"""The passes that mark the role of each node in the backward pass of the signal."""

from collections.abc import Sequence

from torch import Tensor, fx

from captum_mipin.errors import CaptureError
from captum_mipin.graph.layout import Layout, first_dimension
from captum_mipin.graph.marks import mark, marks, value_of
from captum_mipin.graph.nodes import ancestors
from captum_mipin.propagation.averages import join_averages
from captum_mipin.propagation.draft import Draft, descendants, is_constant
from captum_mipin.rules.base import is_floating


def mark_varying(draft: Draft) -> None:
    """Mark the nodes that are computed from the model's inputs; all others are constant."""
    varying = descendants(draft.inputs)
    for node in draft.graph.nodes:
        mark(node, varies=node in varying)


def drop_unused(draft: Draft) -> None:
    """Erase operations that the output does not need."""
    needed = ancestors([draft.output])
    for node in reversed(list(draft.graph.nodes)):
        if node.op not in ("placeholder", "output") and node not in needed:
            draft.graph.erase_node(node)


def rewrite_for_method(draft: Draft) -> None:
    """Run the rewrite of a method: ``rewrite`` of its table of rules, by default for MIP-IN.

    MIP-IN has the rewrite :func:`~captum_mipin.propagation.averages.join_averages`.
    """
    rewrite = getattr(draft.rules, "rewrite", join_averages)
    rewrite(draft.graph, draft.batch, draft.starts)


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
        CaptureError: An explained node gets no signal, or the batch is not the first dimension of
            an explained node or of the output.
    """
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
        if not first_dimension(value_of(node), draft.batch):
            raise CaptureError(
                f"{marks(node).key} has shape {_shape(node)}, expected the batch as its first "
                "dimension: name another layer"
            )
    if marks(draft.output).layout != Layout():
        raise CaptureError(
            f"the model's output has shape {_shape(draft.output)}, expected the batch as its first "
            "dimension, with one row per example: wrap the model in a module that moves it there"
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


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(map(str, value_of(node).shape))
