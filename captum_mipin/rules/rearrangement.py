"""Operations that move values without mixing them: their adjoint moves the signal back."""

from torch import fx

from captum_mipin.rules.base import Passes, argument


def _along_batch(node: fx.Node) -> str | None:
    dims = argument(node, 1, "dims", argument(node, 1, "dim", 0))
    values = node.meta["val"]
    size = (values[0] if isinstance(values, (tuple, list)) else values).ndim
    if any(dim % size == 0 for dim in (dims if isinstance(dims, (tuple, list)) else [dims])):
        return "it works along the batch, so examples would depend on each other"
    return None


_PLAIN = (
    "view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints", "unflatten.int",
    "unsqueeze.default", "squeeze.dim", "squeeze.dims", "permute.default", "transpose.int",
    "t.default", "clone.default", "contiguous.default", "alias.default", "lift_fresh_copy.default",
    "select.int", "split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int",
    "constant_pad_nd.default", "_to_copy.default",
)  # fmt: skip
_ALONG = ("slice.Tensor", "flip.default")
_MANY = ("cat.default", "stack.default")

REARRANGEMENT = {
    **{f"aten.{name}": Passes(note="adjoint") for name in _PLAIN},
    **{f"aten.{name}": Passes(note="adjoint", refuse=_along_batch) for name in _ALONG},
    **{f"aten.{name}": Passes(note="adjoint", many=True) for name in _MANY},
}
