"""Gates by hand and their complements: x − x σ(q), (1 − σ(q)) x and x relu6(q + 3) / 6.

All of them are x σ(q), x σ(−q) or a multiple of it, where σ is a sigmoid or hard sigmoid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isclose, isfinite
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.propagation.canonical import leaves_module
from captum_mipin.propagation.draft import Draft, number_of
from captum_mipin.propagation.forms import become, insert
from captum_mipin.rules.base import varies
from captum_mipin.rules.gates import is_gate

_aten = torch.ops.aten

_SIGMOIDS: tuple[Any, ...] = (_aten.sigmoid.default, _aten.hardsigmoid.default)
#: Activations f with f(x) − f(−x) = x, but for ReLU, whose difference to x is left as it is.
_HALVES = ("silu", "hardswish", "gelu")
#: Largest difference to a gate, relative to its largest value.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Gate:
    """The gate c σ(q) or c σ(−q).

    Attributes:
        activation: The operation σ.
        negative: Whether it is σ(−q).
        factor: The number c.
    """

    activation: Any
    negative: bool
    factor: float

    def insert(self, draft: Draft, node: fx.Node, q: Any) -> fx.Node:
        """Return the node of the gate of a tensor q, inserted before another node."""
        if self.negative:
            twice = operation(q) == "neg" and q not in draft.starts
            q = q.args[0] if twice else insert(node, _aten.neg.default, q)
        value = insert(node, self.activation, q)
        return value if self.factor == 1 else insert(node, _aten.mul.Tensor, value, self.factor)


def scaled_gate(function: Callable[[Tensor], Tensor]) -> Gate | None:
    """Return the gate c σ(±q) that has the values of a function; None if there is none."""
    points = torch.linspace(-8, 8, 101, dtype=torch.float64)
    try:
        values = function(points)
    except RuntimeError:  # for a dtype that the model names, or a size
        return None
    factor = 2 * float(values[len(points) // 2])  # σ(0) = 1/2
    for activation in _SIGMOIDS if factor and isfinite(factor) else ():
        for negative in (False, True):
            gate = factor * activation(-points if negative else points)
            if torch.allclose(values, gate, rtol=0, atol=_TOLERANCE * abs(factor)):
                return Gate(activation, negative, 1.0 if isclose(factor, 1) else factor)
    return None


def write_complement(draft: Draft, node: Any) -> None:
    """Rewrite a x − b x ⊙ g as x ⊙ (a − b g) for a gate g, and x − f(x) as −f(−x)."""
    terms = [] if node in draft.starts else _terms(node)
    for (one, a), (other, b) in (terms, terms[::-1]) if terms else ():
        product, b = _numbered(draft, other, b)
        if leaves_module(product) or len(product.users) > 1 or product in draft.starts:
            continue
        for x, number in ((one, a), _numbered(draft, one, a)):
            if str(value_of(x).shape) != str(value_of(node).shape):
                continue
            if _write_half(node, x, product, number, b):
                return
            gate, c = _gate_of(draft, product, x)
            if gate is not None and number * b * c < 0:
                _write_product(node, x, number, gate, -b * c)
                return


def _terms(node: Any) -> list[tuple[Any, float]]:
    """Return the two terms of a sum or difference of values of the input, with their factors."""
    if operation(node) not in ("add", "sub", "rsub") or not all(map(varies, node.args)):
        return []
    (u, v), alpha = node.args, node.kwargs.get("alpha", 1)
    if operation(node) == "rsub":
        return [(v, 1.0), (u, -alpha)]
    return [(u, 1.0), (v, alpha if operation(node) == "add" else -alpha)]


def _numbered(draft: Draft, node: Any, factor: float = 1.0) -> tuple[Any, float]:
    """Return x and c for a product of a tensor x and numbers c, times a further factor."""
    while node not in draft.starts and not leaves_module(node):
        if operation(node) == "neg":
            node, factor = node.args[0], -factor
        elif (scaled := number_of(node)) is not None:
            node, factor = scaled[0], factor * scaled[1]
        else:
            break
    return node, factor


def _write_half(node: Any, x: Any, half: Any, a: float, b: float) -> bool:
    """Rewrite x − f(x) as −f(−x), if f is such an activation; return True if rewritten."""
    if operation(half) not in _HALVES or half.args[0] is not x or (a, b) != (1, -1):
        return False
    negated = insert(node, _aten.neg.default, x)
    value = insert(node, half.target, negated, *half.args[1:], **half.kwargs)
    become(node, _aten.neg.default, value)
    return True


def _gate_of(draft: Draft, product: Any, x: Any) -> tuple[Any, float]:
    """Return g and c for a product c x ⊙ g with a gate g; None and 1 for other operations."""
    for factor, gate in (product.args, product.args[::-1]) if operation(product) == "mul" else ():
        if isinstance(gate, fx.Node) and is_gate(gate, varies):
            if factor is x:
                return gate, 1.0
            base, c = _numbered(draft, factor)
            if base is x:
                return gate, c
    return None, 1.0


def _write_product(node: Any, x: Any, a: float, gate: Any, b: float) -> None:
    """Rewrite a node as x ⊙ (a − b g)."""
    gate = gate if b == 1 else insert(node, _aten.mul.Tensor, gate, b)
    become(node, _aten.mul.Tensor, x, insert(node, _aten.rsub.Scalar, gate, a))
