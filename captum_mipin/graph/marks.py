"""What is known about a node of a graph: the only module that touches ``node.meta``.

``torch.export`` leaves two things at each node: the traced value, and the stack of modules that
ran it. What the passes of :mod:`captum_mipin.propagation` find out is one :class:`Marks` a node.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from captum_mipin.graph.layout import Layout

_KEY = "captum_mipin"


@dataclass(frozen=True)
class Marks:
    """What the passes have found out about one node; the defaults hold for a node without marks.

    Attributes:
        key: Name of the operation in fits and errors: module path, operation, and "#2" for its
            second call.
        origin: Name of the node in the captured graph; in a copy it may be called differently.
        original: The operation that the model has, where a rewrite put another one in its place.
        varies: Whether it is computed from the model's inputs.
        depends: Whether it is computed from what is explained: the inputs, or a layer's output.
        signal: Whether it carries signal on the way back from the output to what is explained.
        recorded: Whether it depends, but only steers, as a gate does: no signal is sent to it.
        discrete: Whether it would carry signal if its dtype were floating.
        layout: Where the examples lie in its value.
        mixes: Why the examples of its value are not kept apart; empty if they are.
        channels: The dimension of its channels; None where all is one channel.
        joined: Whether it is part of an average that is inverted with the dense layer behind it.
        added: Whether a rewrite put it in, so that no report names it.
        constant: Whether it follows from parameters and buffers alone.
    """

    key: str = ""
    origin: str = ""
    original: Any = None
    varies: bool = False
    depends: bool = False
    signal: bool = False
    recorded: bool = False
    discrete: bool = False
    layout: Layout = field(default_factory=Layout)
    mixes: str = ""
    channels: int | None = None
    joined: bool = False
    added: bool = False
    constant: bool = False


_UNMARKED = Marks()


def marks(node: fx.Node) -> Marks:
    """Return the marks of a node."""
    found: Marks = node.meta.get(_KEY, _UNMARKED)
    return found


def mark(node: fx.Node, **changes: Any) -> None:
    """Change some marks of a node; the names are the attributes of :class:`Marks`.

    Examples:
        >>> x = fx.Graph().placeholder("x")
        >>> mark(x, key="input x/input", depends=True)
        >>> mark(x, signal=True)
        >>> marks(x).key, marks(x).depends, marks(x).signal, marks(x).recorded
        ('input x/input', True, True, False)
    """
    node.meta[_KEY] = replace(marks(node), **changes)


def inherit(node: fx.Node, source: fx.Node, **changes: Any) -> None:
    """Give a node all that is known about another one, with some marks changed."""
    node.meta = dict(source.meta)
    if changes:
        mark(node, **changes)


def original(node: fx.Node) -> Any:
    """Return the operation of a node as the model has it, whatever rewrites made of it."""
    kept = marks(node).original
    return node.target if kept is None else kept


def value_of(node: fx.Node) -> Any:
    """Return the traced value of a node: fake tensors, symbolic sizes; None if it has none."""
    return node.meta.get("val")


def set_value(node: fx.Node, value: Any) -> None:
    """Change the traced value of a node."""
    node.meta["val"] = value


def module_stack(node: fx.Node) -> Mapping[str, tuple[str, Any]]:
    """Return the modules that were running when the node was traced, outermost first.

    Returns:
        Name of the call → (path of the module, its type).
    """
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    return stack


def set_module_stack(node: fx.Node, stack: Mapping[str, tuple[str, Any]]) -> None:
    """Let a node count as traced in these modules."""
    node.meta["nn_module_stack"] = stack
