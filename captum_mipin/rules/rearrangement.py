"""Operations that only rearrange values: their adjoint sends the signal back."""

from torch import fx

from captum_mipin.graph.nodes import argument
from captum_mipin.rules.base import Passes


def _not_constant(node: fx.Node) -> str | None:
    mode = argument(node, 2, "mode", "constant")
    if mode == "constant":
        return None
    return f"padding with mode={mode!r} copies values; expected mode='constant'"


_PLAIN = (
    "view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints",
    "unflatten.int", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "permute.default",
    "transpose.int", "t.default", "clone.default", "contiguous.default", "alias.default",
    "lift_fresh_copy.default", "select.int", "split.Tensor", "unsafe_split.Tensor",
    "split_with_sizes.default", "chunk.default", "unbind.int", "constant_pad_nd.default",
    "_to_copy.default", "slice.Tensor", "flip.default", "roll.default", "cat.default",
    "stack.default", "pixel_shuffle.default", "channel_shuffle.default",
)  # fmt: skip

REARRANGEMENT = {
    **{f"aten.{name}": Passes(note="adjoint", exact=True) for name in _PLAIN},
    "aten.pad.default": Passes(note="adjoint", refuse=_not_constant, exact=True),
    "aten.expand.default": Passes(
        note="adjoint: the sum over the copies; its scale is learned", restores=False
    ),
}
