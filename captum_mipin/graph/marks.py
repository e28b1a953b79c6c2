"""The metadata of graph nodes. No other module reads or writes ``node.meta``.

``torch.export`` stores two entries at each node: the traced value, and the stack of modules that
were running. The passes of :mod:`captum_mipin.propagation` add one entry: a :class:`Marks` object.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from captum_mipin.graph.layout import Layout

_KEY = "captum_mipin"


@dataclass(frozen=True)
class Marks:
    """What the passes found out about one node; the defaults stand for a node without results.

    The explained tensors are the model's inputs, or the output of a layer. In the backward pass, a
    source signal goes from the model's output to the explained tensors.

    Attributes:
        key: Name of the operation in fits and errors: module path and operation, with "#2" added
            for the second call of the same operation in the same module.
        origin: Name of the node in the captured graph; a copy of the node may have another name.
        original: The model's own operation, if a rewrite replaced it; else None.
        varies: Whether the value is computed from the model's inputs.
        gates: Smallest number of gates and scales (sigmoid, softmax, comparison, norm, ...) on a
            path from the model's inputs to the value. In a product, the factors with the smallest
            number carry signal, and all others are recorded.
        depends: Whether the value is computed from the explained tensors.
        signal: Whether a signal is sent to the value in the backward pass.
        recorded: Whether the value depends on the explained tensors, but gets no signal because it
            is only used as a gate, condition or attention weight.
        discrete: Whether the value would get a signal if its dtype were floating.
        layout: Position of the examples within the value.
        beside: Whether the value is computed from the further arguments of each example, but not
            from the explained tensors.
        mixes: The reason why examples of a batch influence each other here; empty if they do not.
        channels: The dimension of the channels; None if the value has a single channel.
        joined: Whether the node is part of an average that is inverted together with the dense
            layer after it.
        added: Whether a rewrite added the node, so that reports leave it out.
        constant: Whether the value is computed from parameters and buffers alone.
    """

    key: str = ""
    origin: str = ""
    original: Any = None
    varies: bool = False
    gates: int = 0
    depends: bool = False
    signal: bool = False
    recorded: bool = False
    discrete: bool = False
    layout: Layout = field(default_factory=Layout)
    beside: bool = False
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
    before = vars(marks(node))
    after = before | changes
    if len(after) > len(before):
        raise TypeError(f"{changes.keys() - before.keys()} are no marks")
    node.meta[_KEY] = marked = object.__new__(Marks)  # in a fifth of the time of replace
    vars(marked).update(after)


def inherit(node: fx.Node, source: fx.Node, **changes: Any) -> None:
    """Copy the metadata of ``source`` to ``node``, then set the marks ``changes`` on ``node``."""
    node.meta = dict(source.meta)
    if changes:
        mark(node, **changes)


def original(node: fx.Node) -> Any:
    """Return the model's own operation of a node, even if a rewrite has replaced it."""
    kept = marks(node).original
    return node.target if kept is None else kept


def value_of(node: fx.Node) -> Any:
    """Return the traced value of a node: fake tensors or symbolic sizes; None if there is none."""
    return node.meta.get("val")


def set_value(node: fx.Node, value: Any) -> None:
    """Change the traced value of a node."""
    node.meta["val"] = value


def module_stack(node: fx.Node) -> Mapping[str, tuple[str, Any]]:
    """Return the modules that were running when the node was traced, outermost first.

    Returns:
        Name of the call → (path of the module, type of the module).
    """
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
    return stack


def set_module_stack(node: fx.Node, stack: Mapping[str, tuple[str, Any]]) -> None:
    """Change the stack of modules in which a node was traced."""
    node.meta["nn_module_stack"] = stack
