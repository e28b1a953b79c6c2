"""Operations that select: each element of the result is an element of one of the arguments.

The signal goes to that argument, which is recorded, as by a switch. The norm of a vector is its
component along one direction: this direction is recorded in the same way.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx

from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import argument
from captum_mipin.rules.base import Passes, Recorded, at, depends
from captum_mipin.rules.linear_maps import copied


def _chosen(node: fx.Node) -> tuple[int, ...]:
    return tuple(i for i in (1, 2) if isinstance(node.args[i], fx.Node))


def _spreads(node: fx.Node, arguments: Sequence[Any]) -> str | None:
    """Return the reason to refuse broadcast arguments; None if no argument is broadcast.

    The signals of all copies of a value would be added, and their sum would have the wrong scale.
    """
    shape = str(tuple(value_of(node).shape))
    if all(str(tuple(value_of(n).shape)) == shape for n in arguments if depends(n)):
        return None
    return (
        "it spreads a smaller value over several places: "
        "use expand() before it, whose scale is learned"
    )


def _constants(node: fx.Node) -> str | None:
    if any(map(depends, node.args[1:3])):
        return _spreads(node, node.args[1:3])
    return (
        "it chooses between constants, and the condition that it chooses by gets no signal: the "
        "result carries no signal"
    )


def _bound(node: fx.Node) -> str | None:
    if all(map(depends, node.args[:2])):
        return _spreads(node, node.args[:2])
    return "it compares with a constant, as an activation does: use clamp, or relu"


def _power(node: fx.Node) -> str | None:
    order = argument(node, 1, "ord", 2)
    if order >= 1:
        return None
    return f"it is a norm with ord={order}, expected ord of at least 1"


def _filled(node: fx.Node) -> str | None:
    return _spreads(node, node.args[:1])


_NOTE = "recorded switch: to where each value came from"
#: Operations that select elements along a dimension.
_EXTREME = (
    "max.dim", "min.dim", "amax.default", "amin.default", "sort.default", "sort.stable",
    "topk.default", "kthvalue.default", "median.dim", "nanmedian.dim",
    "mode.default", "cummax.default", "cummin.default",
)  # fmt: skip
_WHERE = Passes(note=_NOTE, carriers=_chosen, records=True, refuse=_constants, exact=True)
_LARGER = Passes(
    note=_NOTE + "; half to each of equals", carriers=at(0, 1), refuse=_bound, exact=True
)
#: Interpolations between two of the sorted elements, which get the signal of the result.
QUANTILES = {
    f"aten.{name}.scalar": Recorded(
        run=copied, note="to the elements that it lies between", several=True, carriers=at(0)
    )
    for name in ("quantile", "nanquantile")
}
SELECTION = {
    **QUANTILES,
    **{
        f"aten.max_unpool{dims}d.default": Passes(
            note="recorded switch: from the places where it put the values",
            carriers=at(0),
            records=True,
            exact=True,
        )
        for dims in (2, 3)
    },
    **{f"aten.where.{form}": _WHERE for form in ("self", "ScalarSelf", "ScalarOther")},
    "aten.masked_fill.Scalar": Passes(note=_NOTE, records=True, refuse=_filled, exact=True),
    **{
        f"aten.{name}": _LARGER
        for name in ("maximum.default", "minimum.default", "max.other", "min.other")
    },
    **{f"aten.{name}": Passes(note=_NOTE, exact=True) for name in _EXTREME},
}
#: Norms: S_x = S ⊙ x / ‖x‖, which is x for S = ‖x‖; other orders alike, by their derivative.
NORMS = {
    "aten.linalg_vector_norm.default": Passes(
        note="recorded direction: the share of each component", carriers=at(0), refuse=_power
    )
}
