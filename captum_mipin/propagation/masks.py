"""The passes that write masks in one form: ``where(m, x, 0)``, with a boolean m.

Code leaves out elements by ``masked_fill(x, ~m, 0)``, by ``where``, or by a product with m as
numbers 0 and 1. All of them become ``where(m, x, 0)``. In a product, x must have its full shape.
Integers that meet floating numbers are converted first, as in ``x * m.to(x.dtype)``. A step,
``heaviside(x, 0)`` or ``heaviside(x, 1)``, is the comparison x > 0 or x ≥ 0 as numbers.
"""

from typing import Any

import torch
from torch import fx

from captum_mipin.graph.marks import mark, value_of
from captum_mipin.graph.nodes import erase_unused, operation
from captum_mipin.propagation.canonical import leaves_module
from captum_mipin.propagation.constants import known_number, known_value
from captum_mipin.propagation.draft import Draft, is_tensor
from captum_mipin.propagation.forms import SAME_NUMBERS, become, insert
from captum_mipin.propagation.marking import mark_as_varying, mark_varying
from captum_mipin.rules.base import is_floating, varies
from captum_mipin.rules.gates import NEGATIONS

_aten = torch.ops.aten

#: Operation → position of its condition, which stays a boolean.
_CHOOSING = {"where": 0, "masked_fill": 1}


def write_numbers(draft: Draft) -> None:
    """Convert integers before an operation that converts them to floating numbers itself."""
    for node in list(draft.graph.nodes):
        name = operation(node)
        promotes = torch.Tag.pointwise in getattr(node.target, "tags", ()) or name == "cat"
        if not promotes or not is_floating(value_of(node)):
            continue
        chooses = node.args[_CHOOSING[name]] if name in _CHOOSING else None
        for source in node.all_input_nodes:
            whole = is_tensor(source) and varies(source) and not is_floating(value_of(source))
            if whole and source is not chooses and not value_of(source).is_complex():
                kind = {"dtype": value_of(node).dtype}
                number = insert(node, _aten._to_copy.default, source, **kind)
                node.replace_input_with(source, number)
    mark_varying(draft)


def write_masks(draft: Draft) -> None:
    """Rewrite each operation that leaves out elements by a mask."""
    for node in draft.varying():
        if not is_floating(value_of(node)):
            continue
        if operation(node) in ("heaviside", "mul"):
            _write_step(draft, node)
        masked = _masked(draft, node)
        if masked is not None and _is_whole(node, masked[0]):
            become(node, _aten.where.ScalarOther, masked[1], masked[0], 0.0)
    erase_unused(draft.graph, draft.starts)


def _write_step(draft: Draft, node: Any) -> None:
    """Rewrite a step that is 0 or 1 at 0 as a comparison, and the product with another one.

    x heaviside(b, v) is x where b > 0, plus v x where b = 0.
    """
    if operation(node) == "heaviside":
        b, value = node.args
        number = None if varies(value) else known_number(draft, value)
        if number in (0, 1) and str(value_of(b).shape) == str(value_of(node).shape):
            compare = _aten.ge.Scalar if number else _aten.gt.Scalar
            become(node, _aten._to_copy.default, insert(node, compare, b, 0))
            node.kwargs = {"dtype": value_of(node).dtype}
            mark_as_varying(node)
        return
    for x, step in (node.args, node.args[::-1]):
        if operation(step) != "heaviside" or step in draft.starts or varies(step.args[1]):
            continue
        if _is_whole(node, x):
            parts = []
            for compare in (_aten.gt.Scalar, _aten.eq.Scalar):
                mask = insert(node, compare, step.args[0], 0)
                parts.append(insert(node, _aten.where.ScalarOther, mask, x, 0.0))
            parts[1] = insert(node, _aten.mul.Tensor, parts[1], step.args[1])
            become(node, _aten.add.Tensor, *parts)
            return


def _masked(draft: Draft, node: Any) -> tuple[Any, Any] | None:
    """Return x and the boolean m of an operation that computes x where m is true, else 0."""
    name = operation(node)
    if name == "masked_fill" and _is_zero(draft, node.args[2]):
        return node.args[0], _not(node, node.args[1])
    if name == "where" and len(node.args) == 3:
        mask, x, other = node.args
        if _is_zero(draft, other):
            return x, mask
        return (other, _not(node, mask)) if _is_zero(draft, x) else None
    if name == "sub" and operation(node.args[1]) == "where":  # x − where(m, x, 0)
        mask, x, other = node.args[1].args
        kept = node.args[1] in draft.starts or leaves_module(node.args[1])
        if x is node.args[0] and _is_zero(draft, other) and not (kept or node.kwargs):
            return x, _not(node, mask)
    if name == "mul":
        for x, factor in (node.args, node.args[::-1]):
            if varies(x) and (mask := _boolean(node, factor)) is not None:
                return x, mask
    return None


def _is_whole(node: Any, x: Any) -> bool:
    """Return True if x has the shape and dtype of a result."""
    if not isinstance(x, fx.Node) or not varies(x):
        return False
    value, own = value_of(node), value_of(x)
    return str(value.shape) == str(own.shape) and bool(value.dtype == own.dtype)


def _is_zero(draft: Draft, value: Any) -> bool:
    """Return True for the number 0, and for a tensor that the model's code fills with 0."""
    if isinstance(value, (int, float)):
        return value == 0
    if operation(value) in ("zeros", "zeros_like", "new_zeros"):
        return True
    known = None if not isinstance(value, fx.Node) or varies(value) else known_value(draft, value)
    return known is not None and bool((known == 0).all())


def _not(node: fx.Node, mask: Any) -> Any:
    """Return the node of the negation of a boolean tensor."""
    if operation(mask) in NEGATIONS:
        return mask.args[0]
    negated = insert(node, _aten.logical_not.default, mask)
    mark(negated, added=True)
    return negated


def _boolean(node: fx.Node, factor: Any) -> Any:
    """Return the boolean tensor whose values a factor has as numbers 0 and 1; None for others."""
    if not isinstance(factor, fx.Node) or not is_tensor(factor):
        return None
    if value_of(factor).dtype == torch.bool:
        return factor
    name, args = operation(factor), factor.args
    if name == "mul" and 1 in args:  # 1.0 * m
        return _boolean(node, next(n for n in args if isinstance(n, fx.Node)))
    if name in ("rsub", "sub") and args[name == "rsub"] == 1 and not factor.kwargs:  # 1 − m
        mask = _boolean(node, args[name == "sub"])
        return None if mask is None else _not(node, mask)
    if name not in SAME_NUMBERS:
        return None
    mask = _boolean(node, args[0])
    if mask is None or name == "_to_copy":
        return mask
    return insert(node, factor.target, mask, *args[1:], **factor.kwargs)
