"""The rewrite of sums in which a tensor occurs several times, alone and beside one gate g.

Such terms are put together, a x + b x ⊙ g = x ⊙ (a + b g), if a and b have different signs or one
of the terms vanishes. So x + g ⊙ (h − x) and x − g ⊙ x + g ⊙ h become x ⊙ (1 − g) + h ⊙ g, and
x − x ⊙ g becomes x ⊙ (1 − g); but x + x ⊙ g stays a branch beside x.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from math import isclose
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.propagation.canonical import leaves_module
from captum_mipin.propagation.complements import Gate, write_half
from captum_mipin.propagation.draft import Draft, number_of
from captum_mipin.propagation.forms import SAME_NUMBERS, become, insert
from captum_mipin.rules.base import varies
from captum_mipin.rules.gates import is_gate

_aten = torch.ops.aten
_SUMS = ("add", "sub", "rsub")
_SMOOTH = {"sigmoid": _aten.sigmoid.default, "hardsigmoid": _aten.hardsigmoid.default}
#: Largest number of terms of a sum.
_LARGEST = 8

#: A number c and a tensor x, for the term c x of a sum.
Term = tuple[float, Any]


@dataclass(frozen=True)
class _Factor:
    """A factor f = a + b g of a product.

    Attributes:
        node: The node of f.
        key: What tells the gate g from others.
        a: The number a.
        b: The number b.
        gate: g as a sigmoid σ(k q) with k > 0; None for other gates.
        q: The node of q.
        moves: The rearrangements behind the sigmoid, in order of execution.
    """

    node: Any
    key: Any
    a: float = 0.0
    b: float = 1.0
    gate: Gate | None = None
    q: Any = None
    moves: tuple[Any, ...] = ()

    def changed(self, node: Any, scale: float = 1.0, shift: float = 0.0) -> "_Factor":
        """Return the factor scale · f + shift, which another node computes."""
        return replace(self, node=node, a=scale * self.a + shift, b=scale * self.b)

    def is_plain(self) -> bool:
        """Return True for f = g and f = 1 − g."""
        return (self.a, self.b) in ((0, 1), (1, -1))

    def smooth(self, draft: Draft, node: fx.Node, sign: float) -> fx.Node:
        """Return the node of σ(k q) or σ(−k q), inserted before another node."""
        assert self.gate is not None  # for mypy
        slope = sign * self.gate.slope
        value = Gate(self.gate.activation, slope).insert(draft, node, self.q)
        for move in self.moves:
            value = insert(node, move.target, value, *move.args[1:], **move.kwargs)
        return value


@dataclass(frozen=True)
class _Joint:
    """The product x ⊙ (a + b g), with the gate g of a factor."""

    x: Any
    factor: _Factor
    a: float
    b: float

    def is_simpler(self) -> bool:
        """Return True if the product is x, x ⊙ g or x ⊙ (1 − g), but for numbers, or x less a part.

        In x ⊙ (1 − tanh(q) / 2), the factor is no gate.
        """
        whole = _same(self.a, 0) or _same(self.b, 0) or _same(self.a, -self.b)
        return whole or (self.a * self.b < 0 and is_gate(self.factor.node, varies))

    def term(self, draft: Draft, node: fx.Node) -> Term:
        """Return the product as a term, inserted before another node."""
        x, f = self.x, self.factor
        if _same(self.b, 0):
            return self.a, x
        if f.gate is not None and _same(self.a, 0):
            return self.b, insert(node, _aten.mul.Tensor, x, f.smooth(draft, node, 1))
        if f.gate is not None and _same(self.a, -self.b):  # a (1 − σ(q)) = a σ(−q)
            return self.a, insert(node, _aten.mul.Tensor, x, f.smooth(draft, node, -1))
        # f = c + d g, hence a + b g = a − c b / d + b f / d
        scale, value = self.b / f.b, f.node
        shift = self.a - f.a * scale
        if _same(shift, 0):
            return scale, insert(node, _aten.mul.Tensor, x, value)
        if abs(scale) != 1:
            value = insert(node, _aten.mul.Tensor, value, abs(scale))
        target = _aten.add.Tensor if scale > 0 else _aten.rsub.Scalar
        return 1.0, insert(node, _aten.mul.Tensor, x, insert(node, target, value, shift))


def _same(a: float, b: float) -> bool:
    """Return True if two numbers are one, but for rounding."""
    return isclose(a, b, rel_tol=1e-12, abs_tol=1e-12)


def write_mixture(draft: Draft, node: Any) -> None:
    """Rewrite a sum with several terms of a tensor, as x + g ⊙ (h − x), and 1 − σ(q) as σ(−q)."""
    if node in draft.starts or operation(node) not in _SUMS or not varies(node):
        return
    if not _is_sum(node):
        factor = None if leaves_module(node) else _factor(draft, node)
        if factor is not None and factor.gate and factor.moves and factor.is_plain():
            node.replace_all_uses_with(factor.smooth(draft, node, factor.b))
        return
    pair = [_plain(draft, term) for term in _summands(node)]
    (c, x), (d, y) = sorted(pair, key=lambda term: term[0] < 0)
    if (c, d) == (1, -1) and _is_inner(draft, y) and write_half(node, x, y):
        return
    terms, changed = _flat(draft, node), False
    while (joined := _joined(draft, node, terms)) is not None:
        terms, changed = joined, True
    if changed:
        c, x = terms[0] if len(terms) == 1 else (1.0, _total(node, terms))
        if c == 1:
            become(node, x.target, *x.args)
        else:
            become(node, _aten.mul.Tensor, x, c)


def _is_sum(node: Any) -> bool:
    """Return True for a sum or difference of two tensors."""
    return operation(node) in _SUMS and all(isinstance(n, fx.Node) for n in node.args)


def _is_inner(draft: Draft, node: Any) -> bool:
    """Return True for a value that no two operations use, and that need not be kept."""
    return len(node.users) < 2 and node not in draft.starts and not leaves_module(node)


def _summands(node: Any) -> list[Term]:
    """Return the two terms of a sum or difference."""
    (u, v), alpha = node.args[:2], node.kwargs.get("alpha", 1)
    if operation(node) == "rsub":
        return [(1.0, v), (-alpha, u)]
    return [(1.0, u), (alpha if operation(node) == "add" else -alpha, v)]


def _flat(draft: Draft, node: Any) -> list[Term]:
    """Return the terms of a sum, also of sums inside it; a few at most."""
    terms = _summands(node)
    while len(terms) < _LARGEST:
        inner = [n for c, n in terms if _is_sum(n) and _is_inner(draft, n) and abs(c) == 1]
        if not inner:
            break
        terms = [
            (c * d, part)
            for c, n in terms
            for d, part in (_summands(n) if n is inner[0] else [(1.0, n)])
        ]
    return terms


def _plain(draft: Draft, term: Term) -> Term:
    """Return c and x for a term c x without numbers in x."""
    c, node = term
    while isinstance(node, fx.Node) and node not in draft.starts and not leaves_module(node):
        if operation(node) == "neg":
            c, node = -c, node.args[0]
        elif (scaled := number_of(node)) is not None:
            c, node = c * scaled[1], scaled[0]
        else:
            break
    return c, node


def _total(node: fx.Node, terms: list[Term]) -> Any:
    """Return the node of a sum of terms, inserted before another node."""
    (c, value), *others = sorted(terms, key=lambda term: term[0] < 0)  # a positive one first
    value = value if c == 1 else insert(node, _aten.mul.Tensor, value, c)
    for c, other in others:
        if abs(c) != 1:
            other = insert(node, _aten.mul.Tensor, other, abs(c))
        value = insert(node, _aten.sub.Tensor if c < 0 else _aten.add.Tensor, value, other)
    return value


def _joined(draft: Draft, node: fx.Node, terms: list[Term]) -> list[Term] | None:
    """Return the terms of a sum after two of them were put together; None if none can be."""
    shape = str(value_of(node).shape)
    for i, j in permutations(range(len(terms)), 2):
        rest = [term for at, term in enumerate(terms) if at not in (i, j)]
        one, other = _plain(draft, terms[i]), _plain(draft, terms[j])
        if not varies(one[1]):
            continue
        if one[1] is other[1] and i < j and one[0] + other[0]:
            return [*rest, (one[0] + other[0], one[1])]
        for joint, more in _joints(draft, one, other):
            if joint.is_simpler() and str(value_of(joint.x).shape) == shape:
                return [*rest, joint.term(draft, node), *_beside(node, more, joint.factor)]
    return None


def _joints(draft: Draft, one: Term, other: Term) -> Iterator[tuple[_Joint, list[Term]]]:
    """Yield what is common to two terms, and terms that the factor multiplies beside it."""
    c, x = one
    own = list(_products(draft, x)) if _is_inner(draft, x) else []
    for e, y, factor in _products(draft, other[1]):
        # c x, or c d x ⊙ f with the same gate, and e y ⊙ f, where y may be a sum with x
        alone = c, x, factor.changed(None, 0.0, 1.0)
        for d, z, f in (alone, *((c * d, z, f) for d, z, f in own if f.key == factor.key)):
            for share, others in _shares(draft, y, z):
                number = other[0] * e * share
                a, b = d * f.a + number * factor.a, d * f.b + number * factor.b
                more = [(other[0] * e * k, n) for k, n in others]
                yield _Joint(z, factor, a, b), more


def _products(draft: Draft, node: Any) -> Iterator[tuple[float, Any, _Factor]]:
    """Yield c, x and f for a product c x ⊙ f with a gate f that nothing else needs."""
    if operation(node) != "mul" or not all(map(varies, node.args)) or not _is_inner(draft, node):
        return
    for x, gate in (node.args, node.args[::-1]):
        if (factor := _factor(draft, gate)) is not None:
            c, x = _plain(draft, (1.0, x))
            yield c, x, factor


def _factor(draft: Draft, node: Any) -> _Factor | None:
    """Return a + b g for a node that a gate g is rearranged, scaled or shifted to."""
    if not varies(node):
        return None
    name, inner = operation(node), None
    if node in draft.starts:
        pass
    elif (scaled := number_of(node)) is not None:
        inner = _factor(draft, scaled[0])
        return inner and inner.changed(node, scaled[1])
    elif name == "neg":
        inner = _factor(draft, node.args[0])
        return inner and inner.changed(node, -1.0)
    elif name in _SUMS and not _is_sum(node) and len(node.args) == 2 and not node.kwargs:
        x, number = node.args if isinstance(node.args[0], fx.Node) else node.args[::-1]
        sign = -1.0 if name == "rsub" or (name == "sub" and x is node.args[1]) else 1.0
        shift = number * (-1.0 if name == "sub" and sign > 0 else 1.0)
        inner = _factor(draft, x)
        return inner and inner.changed(node, sign, shift)
    elif name in SAME_NUMBERS:
        if (inner := _factor(draft, node.args[0])) is not None:
            key = (node.target, inner.key, str((node.args[1:], node.kwargs)))
            return replace(inner, node=node, key=key, moves=(*inner.moves, node))
        return None
    elif name in _SMOOTH or name == "tanh":
        slope, q = _plain(draft, (1.0, node.args[0]))
        slope, smooth = (2 * slope, "sigmoid") if name == "tanh" else (slope, name)
        gate = Gate(_SMOOTH[smooth], abs(slope))
        factor = _Factor(node, (gate, q), 0.0, 1.0, gate, q)
        factor = factor if slope > 0 else factor.changed(node, -1.0, 1.0)  # σ(−q) = 1 − σ(q)
        return (
            factor.changed(node, 2.0, -1.0) if name == "tanh" else factor
        )  # tanh(q) = 2 σ(2 q) − 1
    return _Factor(node, node) if is_gate(node, varies) else None


def _shares(draft: Draft, y: Any, x: Any, depth: int = 3) -> Iterator[tuple[float, list[Term]]]:
    """Yield c and further terms for y = c x + ..., if it has x among the terms of a few sums."""
    if y is x:
        yield 1.0, []
    elif depth and varies(y) and operation(y) in _SUMS and len(y.args) == 2 and _is_inner(draft, y):
        pair: list[Term] = _summands(y)
        for one, other in (pair, pair[::-1]):
            c, part = _plain(draft, one)
            for share, others in _shares(draft, part, x, depth - 1):
                yield c * share, [*((c * d, n) for d, n in others), other]


def _beside(node: fx.Node, terms: list[Term], factor: _Factor) -> list[Term]:
    """Return the terms of (Σ terms) ⊙ f."""
    number = sum(c * n for c, n in terms if not isinstance(n, fx.Node))
    more: list[Term] = [(number, factor.node)] if number else []
    tensors = [(c, n) for c, n in terms if isinstance(n, fx.Node)]
    if not tensors:
        return more
    c, value = tensors[0] if len(tensors) == 1 else (1.0, _total(node, tensors))
    return [(c, insert(node, _aten.mul.Tensor, value, factor.node)), *more]
