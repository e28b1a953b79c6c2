"""The pass that finds where the examples of a batch lie in each tensor.

Every tensor that depends on the input holds its examples along one dimension: (N, C, H, W),
(tokens, N, features), (N · windows, tokens, features). An operation that does anything else lets
examples depend on each other. Of an operation that is not built in, only the shapes are known: it
has to give the examples along the dimension where it takes them. That it keeps them apart is
checked on the data of each fit. Gradients have no fit: there such an operation is tried on random
numbers (:mod:`captum_mipin.propagation.trial`).
"""

import operator
from collections.abc import Collection
from math import prod
from typing import Any

from torch import Tensor, fx

from captum_mipin.graph.layout import Layout, folded_batch
from captum_mipin.graph.marks import mark, marks, original, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.trial import mixes_examples
from captum_mipin.rules import MIPIN, RECORDABLE

_ALONG = "it works along the batch, so examples would depend on each other"

#: Matrix products, and the position of their first factor.
_PRODUCTS = {"matmul": 0, "bmm": 0, "mm": 0, "linear": 0, "addmm": 1, "baddbmm": 1}

_RESHAPES = frozenset({"reshape", "flatten", "unflatten"})

#: Operations that work along dimensions: position, name, default of the argument that says which.
_ALONG_DIMS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("slice", "cat", "unbind"), (1, "dim", 0)),
    **dict.fromkeys(("split", "unsafe_split", "split_with_sizes", "chunk"), (2, "dim", 0)),
    **dict.fromkeys(("softmax", "_softmax", "sum", "mean", "amax", "select"), (1, "dim")),
    "index_select": (1, "dim"),
    "linalg_vector_norm": (2, "dim"),
    "flip": (1, "dims"),
    "roll": (2, "dims"),
    "glu": (1, "dim", -1),
}

#: Operations that take the first dimension for the batch.
_FIRST = frozenset(
    {
        f"{kind}{dims}d"
        for dims in (1, 2, 3)
        for kind in ("conv", "conv_transpose", "max_pool", "avg_pool")
    }
    | {
        f"{kind}_pool{dims}d"
        for dims in (1, 2, 3)
        for kind in ("adaptive_avg", "_adaptive_avg", "adaptive_max")
    }
    | {"_native_batch_norm_legit_no_training", "group_norm", "native_group_norm", "instance_norm"}
    | {"max_pool2d_with_indices", "max_pool3d_with_indices", "pixel_shuffle", "channel_shuffle"}
)


def lay_out_batch(draft: Draft) -> None:
    """Mark where the examples lie in each value that depends on the starts."""
    for node in draft.graph.nodes:
        if not marks(node).depends:
            continue
        lay_out(node, draft.batch, draft.starts)
        # a rule for all other operations says nothing about the batch
        untold = node not in draft.starts and not _is_known(node) and not marks(node).mixes
        if untold and getattr(draft.rules, "other", None) and mixes_examples(node, draft.batch):
            mark(node, mixes=_ALONG)


def lay_out(node: fx.Node, batch: str, starts: Collection[fx.Node] = ()) -> None:
    """Mark where the examples of a node lie, or why they are not kept apart.

    Args:
        node: A node whose arguments are laid out.
        batch: The symbol of the batch size.
        starts: Nodes with the examples along the first dimension.
    """
    layout = Layout() if node in starts else _layout(node, batch)
    mixes = "" if isinstance(layout, Layout) else layout
    mark(node, layout=layout if isinstance(layout, Layout) else Layout(), mixes=mixes)


def _layout(node: fx.Node, batch: str) -> Layout | str:
    value = _tensor(node)
    folded = folded_batch(value, batch) if isinstance(value, Tensor) else None
    if folded is None:
        shape = tuple(map(str, value.shape)) if isinstance(value, Tensor) else value
        return f"it does not keep the batch as one dimension: its result has shape {shape}"
    dim, count = folded
    layouts = set[Layout]()
    for source in node.all_input_nodes:
        if not marks(source).depends or marks(source).mixes:
            continue  # what mixes is refused where it is computed
        x, at = _tensor(source), marks(source).layout
        outer, inner = at.outer, at.inner
        if operation(node) in _RESHAPES:
            # What stands before and after the examples, in order, cannot change in number.
            outer = _quotient(outer * prod(x.shape[: at.dim]), prod(value.shape[:dim]))
            inner = _quotient(inner * prod(x.shape[at.dim + 1 :]), prod(value.shape[dim + 1 :]))
        layout = Layout(dim, outer, inner)
        if outer * inner != count or _works_along(node, source, layout):
            return _ALONG
        if dim != at.dim and not _is_known(node):
            return (
                f"it takes the examples along dimension {at.dim} and gives them along {dim}: "
                "registered operations keep them"
            )
        layouts.add(layout)
    if len(layouts) > 1:  # such as (examples, 2) and (2, examples) folded into one dimension
        return "it takes examples in different orders, so that they would depend on each other"
    return layouts.pop() if layouts else Layout(dim, 1, count)


def _tensor(node: fx.Node) -> Any:
    """Return the traced value of a node, the first one of several."""
    value = value_of(node)
    return value[0] if isinstance(value, (tuple, list)) else value


def _quotient(above: int, below: int) -> int:
    return above // below if above % below == 0 else 0


def _works_along(node: fx.Node, source: fx.Node, layout: Layout) -> bool:
    """Return True if a node works along the dimension in which ``source`` holds the examples."""
    name, at = operation(node), marks(source).layout.dim
    ndim: int = _tensor(source).ndim
    if name in _ALONG_DIMS:  # no dims stands for all of them
        dims = argument(node, *_ALONG_DIMS[name])
        dims = [dims] if isinstance(dims, int) else dims or range(ndim)
        whole = name == "slice" and takes_all(node)
        return not whole and any(dim % ndim == at for dim in dims)
    if name in ("constant_pad_nd", "pad"):
        pads = argument(node, 1, "pad")  # of the last dimension first, two numbers for each
        return any(pads[2 * (ndim - 1 - at) :][:2])
    if (
        name in _PRODUCTS
    ):  # the sum is over the last dimension of the left, the one before of the right
        left, right = node.args[_PRODUCTS[name] :][:2]
        return (left is source and at == ndim - 1) or (right is source and at == ndim - 2)
    if name in ("layer_norm", "rms_norm"):
        normalized: list[int] = argument(node, 1, "normalized_shape")
        return at >= ndim - len(normalized)
    if name == "scaled_dot_product_attention":
        return at >= ndim - 2
    return name in _FIRST and (at != 0 or layout.dim != 0)


def _is_known(node: fx.Node) -> bool:
    return node.target is operator.getitem or str(original(node)) in MIPIN.keys() | RECORDABLE


def takes_all(node: fx.Node) -> bool:
    """Return True if a slice takes all that there is."""
    start, stop = argument(node, 2, "start"), argument(node, 3, "end")
    endless = stop is None or (isinstance(stop, int) and stop >= 2**62)
    return start in (None, 0) and endless and argument(node, 4, "step", 1) == 1
