"""What a model computes, as one number and line by line: an inverse knows its model by it."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.modules import tensor_bytes
from captum_mipin.graph.nodes import argument, operation, place
from captum_mipin.propagation.averages import whole_dims
from captum_mipin.propagation.treatments import SHAPE
from captum_mipin.rules import MIPIN, Learned, Passes, Rule
from captum_mipin.rules.base import gate_source, is_gate

#: Operations whose result is spread like their arguments: no attention among them.
_SPREADING = ("add", "sub", "rsub", "neg", "mul", "div", "expand")


def structure(captured: CapturedGraph, rules: Mapping[str, Rule]) -> str:
    """Return the SHA-256 over what a model computes.

    Its operations count, where they are, how they are set and wired; its weights do not. Changes of
    shape alone do not count: their arguments depend on the size of the inputs, and hooks put some
    in. Rules that are not built in count with the operations that they are for.

    Args:
        captured: The model's graph.
        rules: Operation → rule.
    """
    digest = hashlib.sha256()
    for _, line, _ in _lines(captured, rules):
        digest.update(line.encode())
    return digest.hexdigest()


def difference(
    fitted: CapturedGraph, captured: CapturedGraph, rules: Mapping[str, Rule]
) -> str | None:
    """Return the first operation in which a model differs between two sizes of inputs.

    Numbers that follow from the size of the inputs, such as windows of pooling, slices and
    paddings, may differ where a rule restores the scale of the signal all the same.

    Args:
        fitted: The graph for inputs of the size fitted on.
        captured: The graph for inputs of another size.
        rules: Operation → rule.

    Returns:
        Operation and module path; None if there is no difference.
    """
    for one, other in zip_longest(_lines(fitted, rules), _lines(captured, rules)):
        if one is None or other is None or one[2] != other[2]:
            node, *_ = other or one
            known = isinstance(node.target, torch._ops.OpOverload)
            name = node.target if known else operation(node)
            return f"{name} in {place(node).path or 'the model itself'}"
    return None


def _lines(
    captured: CapturedGraph, rules: Mapping[str, Rule]
) -> Iterator[tuple[fx.Node, str, str]]:
    """Yield what each operation computes.

    Yields:
        The node; how it is set and wired; the same without numbers that may follow from the size of
        the inputs.
    """
    names: dict[fx.Node, str] = {}
    count = 0
    for node in captured.graph.nodes:
        if isinstance(value_of(node), torch.SymInt):
            names[node] = "size"
        elif node.op == "placeholder":
            names[node] = _placeholder(captured.constants.get(node.name, node.name))
        elif node.op == "call_function" and operation(node) in SHAPE and not _scaling_sizes(node):
            names[node] = names[node.all_input_nodes[0]]
        elif node.op == "call_function":
            count += 1
            names[node] = f"%{count}"
            name, rule = str(node.target), rules.get(str(node.target))
            call, args = f"{place(node)} {name}", node.args
            if operation(node) == "chunk":
                call, args = _as_split(node)
            line = f"{names[node]} {call} {_scaling_sizes(node)}"
            line += f" averages {sorted(whole_dims(node))}" if "avg_pool" in operation(node) else ""
            line += _described(rule) if rule is not None and name not in MIPIN else ""
            arguments = fx.map_arg((args, node.kwargs), names.__getitem__)
            # Where a rule restores the scale (a share, a switch), window sizes do not matter.
            loose = arguments
            if rule is not None and rule.restores and not isinstance(rule, Learned):
                loose = pytree.tree_map(lambda a: "size" if type(a) is int else a, arguments)
            yield node, f"{line} {arguments} {_shape(node)}", f"{line} {loose}"


def _as_split(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """Return a chunk as the split that computes the same, which is what saved files name."""
    x: Any = node.args[0]
    count, dim = argument(node, 1, "chunks"), argument(node, 2, "dim", 0)
    size = value_of(x).shape[dim]
    length = -(-size // count) if type(size) is int else size
    return f"{place(node).path or '(model)'}/split aten.split.Tensor", (x, length, dim)


def _placeholder(constant: str | Tensor) -> str:
    if isinstance(constant, str):
        return constant
    return hashlib.sha256(tensor_bytes(constant)).hexdigest()


def _shape(node: fx.Node) -> list[int | str]:
    """Return the shape of a result: changes of shape on the way to it show there."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return []
    return [n if type(n) is int else "batch" for n in value.shape]


def _scaling_sizes(node: fx.Node) -> list[int]:
    """Return the sizes on which the scale of the signal depends.

    These are the sizes over which a value is spread, and those of attention weights.
    """
    rule, value = MIPIN.get(str(node.target)), value_of(node)
    if not isinstance(rule, Passes) or rule.restores or not isinstance(value, Tensor):
        return []
    factors = [n for n in node.all_input_nodes if batched(value_of(n))]
    # Products of matrices sum over their last two dimensions.
    if operation(node) not in _SPREADING:
        return [n for factor in factors for n in value_of(factor).shape[-2:] if type(n) is int]
    spread = [n for n in factors if not _only_gate(n, node)]
    weights = [
        n
        for n in factors
        if operation(node) == "mul" and "softmax" in operation(gate_source(n, _batched))
    ]
    # A softmax over more entries has smaller weights: its sizes count, copied or not.
    copies = [size for n in spread for size in _copies(value_of(n), value)]
    return copies + [size for n in weights for size in value_of(n).shape if type(size) is int]


def _batched(node: Any) -> bool:
    return isinstance(node, fx.Node) and batched(value_of(node))


def _only_gate(node: fx.Node, user: fx.Node) -> bool:
    """Return True if ``user`` takes ``node`` for a gate, to which no signal is sent."""
    if operation(user) == "expand":
        return bool(user.users) and all(_only_gate(user, other) for other in user.users)
    others = [n for n in user.all_input_nodes if n is not node and _batched(n) and not is_gate(n)]
    return operation(user) == "mul" and is_gate(node) and bool(others)


def _copies(value: Tensor, result: Tensor) -> list[int]:
    """Return how often a value is copied along each dimension in which it is broadcast."""
    sizes = (1,) * (result.ndim - value.ndim) + tuple(value.shape)
    pairs = zip(sizes, result.shape, strict=True)
    return [n for m, n in pairs if type(m) is type(n) is int and m == 1 and n != 1]


def _described(rule: Rule) -> str:
    """Return a rule's kind, note and names of functions: the same text in every process."""
    values = [getattr(rule, part.name) for part in fields(rule)]
    names = [
        getattr(value, "__qualname__", type(value).__name__) if callable(value) else str(value)
        for value in values
    ]
    return f"{type(rule).__name__} {names}"
