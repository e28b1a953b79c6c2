"""Where the examples of a batch are.

Every tensor that depends on the input holds its examples along one dimension: (N, C, H, W), (tokens, N, features),
(N · windows, tokens, features). An operation that does anything else lets examples depend on each other. Of an
operation that is not built in, only what its shapes tell is known: it has to give the examples along the dimension where it
takes them. That it keeps them apart is checked on the data of each fit.
"""

import operator
from collections.abc import Collection
from math import prod
from typing import Any

from torch import Tensor, fx

from captum_mipin.graph.layout import Layout, folded_batch
from captum_mipin.graph.marks import mark, marks, original, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.rules import MIPIN, RECORDABLE


def lay_out(node: fx.Node, batch: str, starts: Collection[fx.Node] = ()) -> None:
    """Mark where the examples of a node lie, or why they are not kept apart."""
    layout = Layout() if node in starts else _layout(node, batch)
    mixes = "" if isinstance(layout, Layout) else layout
    mark(node, layout=layout if isinstance(layout, Layout) else Layout(), mixes=mixes)


def _layout(node: fx.Node, batch: str) -> Layout | str:
    """Where the examples of a node are, given where those of its inputs are, or why they are not kept apart."""
    values = value_of(node)
    value = values[0] if isinstance(values, (tuple, list)) else values
    found = folded_batch(value, batch) if isinstance(value, Tensor) else None
    if found is None:
        shape = tuple(map(str, value.shape)) if isinstance(value, Tensor) else value
        return f"it does not keep the batch as one dimension: its result has shape {shape}"
    dim, count = found
    after = set[Layout]()
    for n in node.all_input_nodes:
        if not marks(n).depends or marks(n).mixes:
            continue  # what mixes is refused where it is computed
        at = marks(n).layout
        x = value_of(n)[0] if isinstance(value_of(n), (tuple, list)) else value_of(n)
        outer, inner = at.outer, at.inner
        if operation(node) in _RESHAPES:
            outer = _quotient(outer * prod(x.shape[: at.dim]), prod(value.shape[:dim]))
            inner = _quotient(inner * prod(x.shape[at.dim + 1 :]), prod(value.shape[dim + 1 :]))
        if outer * inner != count or _works_along(
            operation(node), node, n, at, Layout(dim, outer, inner)
        ):
            return "it works along the batch, so examples would depend on each other"
        if dim != at.dim and not _known(node):
            return f"it takes the examples along dimension {at.dim} and gives them along {dim}: registered operations keep them"
        after.add(Layout(dim, outer, inner))
    if len(after) > 1:
        return "it takes examples in different orders, so that they would depend on each other"
    return after.pop() if after else Layout(dim, 1, count)


def _quotient(above: int, below: int) -> int:
    return above // below if above % below == 0 else 0


def _works_along(name: str, node: fx.Node, source: fx.Node, at: Layout, after: Layout) -> bool:
    """Whether the operation ``name`` works along the dimension of its input ``source`` that holds the examples."""
    value = value_of(source)
    x: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    if name in _ALONG_DIMS:
        dims = argument(node, *_ALONG_DIMS[name])
        dims = (
            range(x.ndim)
            if dims is None or dims == []
            else dims
            if isinstance(dims, (tuple, list))
            else [dims]
        )
        whole = name == "slice" and takes_all(node)
        return not whole and any(dim % x.ndim == at.dim for dim in dims)
    if name in ("constant_pad_nd", "pad"):
        pads = argument(node, 1, "pad")
        return any(pads[2 * (x.ndim - 1 - at.dim) :][:2])
    if name in _PRODUCTS:  # what is summed over
        left, right = node.args[_PRODUCTS[name] :][:2]
        return (left is source and at.dim == x.ndim - 1) or (
            right is source and at.dim == x.ndim - 2
        )
    if name in ("layer_norm", "rms_norm"):
        return at.dim >= x.ndim - len(argument(node, 1, "normalized_shape"))
    if name == "scaled_dot_product_attention":
        return at.dim >= x.ndim - 2
    return name in _FIRST and (at.dim != 0 or after.dim != 0)


def _known(node: fx.Node) -> bool:
    return node.target is operator.getitem or str(original(node)) in MIPIN.keys() | RECORDABLE


def takes_all(node: fx.Node) -> bool:
    """Whether a slice takes all there is."""
    start, stop, step = (
        argument(node, 2, "start"),
        argument(node, 3, "end"),
        argument(node, 4, "step", 1),
    )
    return (
        start in (None, 0)
        and (stop is None or (isinstance(stop, int) and stop >= 2**62))
        and step == 1
    )


#: Matrix products, and the position of their first factor.
_PRODUCTS = {"matmul": 0, "bmm": 0, "mm": 0, "linear": 0, "addmm": 1, "baddbmm": 1}

_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "flatten", "unflatten"})

#: Operations that work along dimensions: position and name of the argument that says which, and its default.
_ALONG_DIMS: dict[str, tuple[Any, ...]] = {
    "slice": (1, "dim", 0), "flip": (1, "dims"), "roll": (2, "dims"), "cat": (1, "dim", 0),
    "softmax": (1, "dim"), "_softmax": (1, "dim"), "sum": (1, "dim"), "mean": (1, "dim"), "amax": (1, "dim"),
    "linalg_vector_norm": (2, "dim"), "index_select": (1, "dim"), "split": (2, "dim", 0), "unsafe_split": (2, "dim", 0),
    "chunk": (2, "dim", 0), "glu": (1, "dim", -1),
    "split_with_sizes": (2, "dim", 0), "unbind": (1, "dim", 0), "select": (1, "dim"),
}  # fmt: skip

#: Operations that take the first dimension for the batch.
_FIRST = frozenset(
    {f"{kind}{dims}d" for kind in ("conv", "conv_transpose", "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool",
                                   "_adaptive_avg_pool") for dims in (1, 2, 3)}
    | {"_native_batch_norm_legit_no_training", "group_norm", "native_group_norm", "instance_norm", "max_pool2d_with_indices",
       "max_pool3d_with_indices", "pixel_shuffle", "channel_shuffle"}
)  # fmt: skip
