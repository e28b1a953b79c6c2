"""Operations that only rearrange values: their adjoint sends the signal back."""

from captum_mipin.rules.base import Passes
from captum_mipin.rules.linear_maps import among

_PLAIN = (
    "view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints",
    "unflatten.int", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "permute.default",
    "transpose.int", "t.default", "clone.default", "contiguous.default", "alias.default",
    "lift_fresh_copy.default", "select.int", "split.Tensor", "unsafe_split.Tensor",
    "split_with_sizes.default", "chunk.default", "unbind.int", "constant_pad_nd.default",
    "_to_copy.default", "slice.Tensor", "flip.default", "roll.default", "cat.default",
    "stack.default", "pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default",
    "rot90.default", "tril.default", "triu.default",
    "diagonal.default", "diagonal_copy.default", "diag_embed.default",
)  # fmt: skip
#: Operation that replaces a part of its first argument → position of what it puts there.
_REPLACING = {
    "slice_scatter.default": 1, "select_scatter.default": 1, "diagonal_scatter.default": 1,
    "scatter.src": 3, "scatter.value": 0, "index_copy.default": 3, "index_fill.int_Scalar": 0,
}  # fmt: skip

REARRANGEMENT = {
    **{f"aten.{name}": Passes(note="adjoint", exact=True) for name in _PLAIN},
    **{
        f"aten.{name}": Passes(
            note="adjoint, as recorded", carriers=among(0, at), records=True, exact=True
        )
        for name, at in _REPLACING.items()
    },
    "aten.expand.default": Passes(
        note="adjoint: the sum over the copies; its scale is learned", restores=False
    ),
}
