"""What a model computes, as one number and line by line: by which an inverse knows the model it was fitted to."""

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
from captum_mipin.graph.nodes import operation, place
from captum_mipin.propagation.averages import whole_dims
from captum_mipin.propagation.treatments import SHAPE
from captum_mipin.rules import MIPIN, Learned, Passes, Rule
from captum_mipin.rules.base import gate_source, is_gate


def structure(captured: CapturedGraph, rules: Mapping[str, Rule]) -> str:
    """SHA-256 over what a model computes: its operations, where they are, how they are set and wired; not the weights.

    Changes of shape alone do not count: their arguments depend on the size of the inputs, and hooks put some in. Rules that
    are not built in count with the operations that they are for.
    """
    digest = hashlib.sha256()
    for _, line, _ in _lines(captured, rules):
        digest.update(line.encode())
    return digest.hexdigest()


def difference(
    fitted: CapturedGraph, captured: CapturedGraph, rules: Mapping[str, Rule]
) -> str | None:
    """The first operation in which a model computes otherwise for some inputs than for those fitted on; None if all agree.

    Numbers that follow from the size of the inputs may differ where a rule restores the scale of the signal all the same:
    windows of pooling, slices, paddings.
    """
    for one, other in zip_longest(_lines(fitted, rules), _lines(captured, rules)):
        if one is None or other is None or one[2] != other[2]:
            node = (other or one)[0]
            name = (
                node.target if isinstance(node.target, torch._ops.OpOverload) else operation(node)
            )
            return f"{name} in {place(node).path or 'the model itself'}"
    return None


def _lines(
    captured: CapturedGraph, rules: Mapping[str, Rule]
) -> Iterator[tuple[fx.Node, str, str]]:
    """Each operation, how it is set and wired, and the same without the numbers that may follow from the inputs' size."""
    names: dict[fx.Node, str] = {}
    count = 0
    added = rules.keys() - MIPIN.keys()
    for node in captured.graph.nodes:
        if isinstance(value_of(node), torch.SymInt):
            names[node] = "size"
        elif node.op == "placeholder":
            constant = captured.constants.get(node.name, node.name)
            names[node] = (
                constant
                if isinstance(constant, str)
                else hashlib.sha256(tensor_bytes(constant)).hexdigest()
            )
        elif node.op == "call_function" and operation(node) in SHAPE and not _added_up(node):
            names[node] = names[node.all_input_nodes[0]]
        elif node.op == "call_function":
            count += 1
            names[node] = f"%{count}"
            what = f"{names[node]} {place(node)} {node.target} {_added_up(node)}"
            what += f" averages {sorted(whole_dims(node))}" if "avg_pool" in operation(node) else ""
            if str(node.target) in added:
                what += _named(rules[str(node.target)])
            arguments = fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
            rule = rules.get(str(node.target))
            sized = rule is not None and rule.restores and not isinstance(rule, Learned)
            loose = (
                pytree.tree_map(lambda a: "size" if type(a) is int else a, arguments)
                if sized
                else arguments
            )
            yield node, f"{what} {arguments} {_shape(node)}", f"{what} {loose}"


def _shape(node: fx.Node) -> list[int | str]:
    """The shape of a result, by which changes of shape on the way to it are noticed."""
    value = value_of(node)
    return (
        [n if type(n) is int else "batch" for n in value.shape] if isinstance(value, Tensor) else []
    )


def _added_up(node: fx.Node) -> list[int]:
    """Sizes on which the scale of the signal depends: those over which a value is spread, and of attention weights."""
    rule, value = MIPIN.get(str(node.target)), value_of(node)
    if not isinstance(rule, Passes) or rule.restores or not isinstance(value, Tensor):
        return []
    factors = [n for n in node.all_input_nodes if _batched(n)]
    if operation(node) not in ("add", "sub", "rsub", "neg", "mul", "div", "expand"):
        return [n for factor in factors for n in value_of(factor).shape[-2:] if type(n) is int]
    spread = [n for n in factors if not _only_gate(n, node)]
    weights = [
        n
        for n in factors
        if operation(node) == "mul" and "softmax" in operation(gate_source(n, _batched))
    ]
    return [size for n in spread for size in _copies(value_of(n), value)] + [
        size for n in weights for size in value_of(n).shape if type(size) is int
    ]


def _batched(node: Any) -> bool:
    return isinstance(node, fx.Node) and batched(value_of(node))


def _only_gate(node: fx.Node, user: fx.Node) -> bool:
    """Whether ``user`` takes ``node`` for a gate, to which no signal is sent."""
    if operation(user) == "expand":
        return bool(user.users) and all(_only_gate(user, other) for other in user.users)
    others = [n for n in user.all_input_nodes if n is not node and _batched(n) and not is_gate(n)]
    return operation(user) == "mul" and is_gate(node) and bool(others)


def _copies(value: Tensor, result: Tensor) -> list[int]:
    sizes = (1,) * (result.ndim - value.ndim) + tuple(value.shape)
    return [
        n
        for m, n in zip(sizes, result.shape, strict=True)
        if type(m) is type(n) is int and m == 1 and n != 1
    ]


def _named(rule: Rule) -> str:
    """A rule by its kind, its note and the names of its functions: the same in every process."""
    values = [getattr(rule, part.name) for part in fields(rule)]
    names = [
        getattr(value, "__qualname__", type(value).__name__) if callable(value) else str(value)
        for value in values
    ]
    return f"{type(rule).__name__} {names}"
