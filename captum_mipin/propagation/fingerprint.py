"""The structure of a model's computation: as one hash, and as text with a line per operation.

An inverse stores the hash, to check that it is used with the model that it was fitted to.
"""

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
from captum_mipin.rules.gates import gate_source, is_gate

#: Elementwise operations, which copy a smaller argument along the dimensions of the result.
_SPREADING = ("add", "sub", "rsub", "neg", "mul", "div", "expand")


def structure(captured: CapturedGraph, rules: Mapping[str, Rule]) -> str:
    """Return the SHA-256 of the structure of a model's computation.

    It covers the operations, their modules, their settings and their connections, but not the
    weights. It does not cover changes of shape: their arguments depend on the size of the inputs,
    and hooks add such operations. For an operation with a registered rule, it covers the rule too.

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
    """Return the first operation that differs between two graphs of a model.

    The graphs are for inputs of different sizes. Numbers that depend on this size, such as those of
    pooling windows, slices and paddings, may differ if the operation's rule restores the scale of
    the signal.

    Args:
        fitted: The graph for inputs of the size in the fit.
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
    """Yield a description of each operation.

    Yields:
        The node; a line with its settings and connections; the same line without the numbers that
        may depend on the size of the inputs.
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
            # If a rule restores the scale (a share, a switch), window sizes may differ.
            loose = arguments
            if rule is not None and rule.restores and not isinstance(rule, Learned):
                loose = pytree.tree_map(lambda a: "size" if type(a) is int else a, arguments)
            yield node, f"{line} {arguments} {_shape(node)}", f"{line} {loose}"


def _as_split(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """Return module path, operation and arguments of the split that is equal to a ``chunk``.

    Hashes in saved files were computed with ``split``.
    """
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
    """Return the shape of a result, which also shows changes of shape that have no line."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return []
    return [n if type(n) is int else "batch" for n in value.shape]


def _scaling_sizes(node: fx.Node) -> list[int]:
    """Return the sizes on which the scale of the signal at an operation depends.

    These are the sizes along which a value is copied, the sizes that a matrix product sums over,
    and the sizes of attention weights.
    """
    rule, value = MIPIN.get(str(node.target)), value_of(node)
    if not isinstance(rule, Passes) or rule.restores or not isinstance(value, Tensor):
        return []
    factors = [n for n in node.all_input_nodes if batched(value_of(n))]
    # Matrix products sum over one of the last two dimensions of each factor.
    if operation(node) not in _SPREADING:
        return [n for factor in factors for n in value_of(factor).shape[-2:] if type(n) is int]
    spread = [n for n in factors if not _only_gate(n, node)]
    weights = [
        n
        for n in factors
        if operation(node) == "mul" and "softmax" in operation(gate_source(n, _batched))
    ]
    # A softmax over more entries has smaller weights, so its sizes always count.
    copies = [size for n in spread for size in _copies(value_of(n), value)]
    return copies + [size for n in weights for size in value_of(n).shape if type(size) is int]


def _batched(node: Any) -> bool:
    return isinstance(node, fx.Node) and batched(value_of(node))


def _only_gate(node: fx.Node, user: fx.Node) -> bool:
    """Return True if ``user`` uses ``node`` only as a gate, to which no signal is sent."""
    if operation(user) == "expand":
        return bool(user.users) and all(_only_gate(user, other) for other in user.users)
    others = [n for n in user.all_input_nodes if n is not node and _batched(n) and not is_gate(n)]
    return operation(user) == "mul" and is_gate(node) and bool(others)


def _copies(value: Tensor, result: Tensor) -> list[int]:
    """Return the numbers of copies along the dimensions in which a value is broadcast.

    Args:
        value: The traced value.
        result: The traced result to which it is broadcast.
    """
    sizes = (1,) * (result.ndim - value.ndim) + tuple(value.shape)
    pairs = zip(sizes, result.shape, strict=True)
    return [n for m, n in pairs if type(m) is type(n) is int and m == 1 and n != 1]


def _described(rule: Rule) -> str:
    """Return type, note and function names of a rule, as text that all processes agree on."""
    values = [getattr(rule, part.name) for part in fields(rule)]
    names = [
        getattr(value, "__qualname__", type(value).__name__) if callable(value) else str(value)
        for value in values
    ]
    return f"{type(rule).__name__} {names}"
