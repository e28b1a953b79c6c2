"""Switches: each element of the result is one of the arguments', and its signal goes there."""

from torch import fx

from captum_mipin.rules.base import Passes, depends


def _chosen(node: fx.Node) -> tuple[int, ...]:
    return tuple(i for i in (1, 2) if isinstance(node.args[i], fx.Node))


def _constants(node: fx.Node) -> str | None:
    if any(map(depends, node.args[1:3])):
        return None
    return "it chooses between constants, and what it chooses by gets no signal"


def _both(node: fx.Node) -> tuple[int, ...]:
    return (0, 1)


def _bound(node: fx.Node) -> str | None:
    if all(map(depends, node.args[:2])):
        return None
    return "it compares with a constant, as an activation does: use clamp, or relu"


_NOTE = "recorded switch: to where each value came from"
SELECTION = {
    **{
        f"aten.where.{form}": Passes(note=_NOTE, carriers=_chosen, records=True, refuse=_constants, exact=True)
        for form in ("self", "ScalarSelf", "ScalarOther")
    },
    "aten.masked_fill.Scalar": Passes(note=_NOTE, records=True, exact=True),
    **{
        f"aten.{name}": Passes(note=_NOTE + "; half to each of equals", carriers=_both, refuse=_bound, exact=True)
        for name in ("maximum.default", "minimum.default", "max.other", "min.other")
    },
}
