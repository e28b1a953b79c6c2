"""The pass that finds the dimension of the examples (the layout) in each tensor.

Every tensor that depends on the input must have its examples along one dimension: (N, C, H, W),
(tokens, N, features) or (N · windows, tokens, features), for N examples. If an operation computes
across this dimension, examples influence each other, and the operation is refused.

An operation without a built-in rule is known only by the shapes of its argument and its result: it
must return the examples along the same dimension as in its argument. Each fit also checks on its
data that the operation does not mix examples. Gradients need no fit; for them, and where its result
is recorded, such an operation is tried on random numbers (:mod:`captum_mipin.propagation.trial`).
"""

import operator
from collections.abc import Collection
from math import prod
from typing import Any

from torch import Tensor, fx

from captum_mipin.graph.layout import Layout, folded_batch, shape_text
from captum_mipin.graph.marks import mark, marks, original, value_of
from captum_mipin.graph.nodes import argument, is_size, operation
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.trial import mixes_examples
from captum_mipin.rules import MIPIN, RECORDABLE

#: Reason for the refusal of operations that compute along the dimension of the examples.
ALONG = "it computes along the batch, so that examples would depend on each other"

#: The same, with the way out, for operations that may take an entry of its own for each example.
_CHOSEN = f"{ALONG}; where each example takes an entry of its own, write x.gather(1, y[:, None])"

#: Reason for the refusal of operations on values that have lost the batch. Errors leave them out.
FOLLOWS = "it computes with values that have lost the batch before"

#: Matrix product → position of its first factor among the arguments.
_PRODUCTS = {"matmul": 0, "bmm": 0, "mm": 0, "linear": 0, "addmm": 1}

#: Operations with several results, which are parts of their argument.
_PARTS = frozenset({"split", "unsafe_split", "split_with_sizes", "chunk"})

_RESHAPES = frozenset({"reshape", "flatten", "unflatten"})

#: Operation that computes along some dimensions → position, name and default of the argument that
#: contains these dimensions.
_ALONG_DIMS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("slice", "cat", "unbind"), (1, "dim", 0)),
    **dict.fromkeys(("split", "unsafe_split", "split_with_sizes", "chunk"), (2, "dim", 0)),
    **dict.fromkeys(
        ("softmax", "_softmax", "_safe_softmax", "sum", "mean", "amax", "select"), (1, "dim")
    ),
    **dict.fromkeys(
        ("index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add",
         "index_copy", "index_fill", "amin", "cumsum", "cummax", "cummin", "max.dim", "min.dim",
         "median.dim", "nanmedian.dim", "cumprod", "logcumsumexp", "prod", "logsumexp"),
        (1, "dim"),
    ),
    **dict.fromkeys(("topk", "kthvalue"), (2, "dim", -1)),
    **dict.fromkeys(("sort", "mode", "argsort"), (1, "dim", -1)),
    **dict.fromkeys(("sort.stable", "argsort.stable"), (9, "dim", -1)),  # an argument by name
    **dict.fromkeys(("argmax", "argmin", "any", "all"), (1, "dim")),
    **dict.fromkeys(("slice_scatter", "select_scatter"), (2, "dim", 0)),
    "unfold": (1, "dimension"),
    "weighted_sum": (2, "dims"),
    "linalg_vector_norm": (2, "dim"),
    "flip": (1, "dims"),
    **dict.fromkeys(("roll", "rot90"), (2, "dims", (0, 1))),
    "glu": (1, "dim", -1),
}  # fmt: skip
#: Operation on two dimensions → positions of their numbers among the arguments, and the defaults.
_ALONG_TWO = {
    **dict.fromkeys(("tril", "triu"), (9, 9, -2, -1)),
    **dict.fromkeys(("diagonal", "diagonal_copy"), (2, 3, 0, 1)),
    "diagonal_scatter": (3, 4, 0, 1),
}

#: Operations that put one argument into a part of the other.
_PARTIAL = frozenset(
    {"slice_scatter", "select_scatter", "diagonal_scatter", "scatter", "scatter_add", "index_put",
     "scatter_reduce", "index_add", "index_copy"}
)  # fmt: skip

#: Operations for which the first dimension of their argument is always the batch.
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
    | {"pixel_unshuffle", "im2col", "col2im", "grid_sampler"}
    | {"grid_sampler_2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"}
    | {f"{kind}_pad{dims}d" for kind in ("reflection", "replication") for dims in (1, 2, 3)}
    | {
        f"{kind}{dims}d"
        for kind in ("upsample_nearest", "_upsample_nearest_exact")
        for dims in (1, 2, 3)
    }
    | {f"upsample_{kind}" for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")}
)


def lay_out_batch(draft: Draft) -> None:
    """Mark the layout of each value that depends on the explained nodes."""
    for node in draft.graph.nodes:
        if not marks(node).depends:
            continue
        lay_out(node, draft.batch, draft.starts)
        # Recorded values, and a rule for all other operations (as gradients have), do not show if
        # examples are mixed.
        tried = marks(node).recorded or getattr(draft.rules, "other", None)
        if tried and node not in draft.starts:
            try_out(node, draft.batch)


def try_out(node: fx.Node, batch: str) -> None:
    """Mark an operation that is not known, if it mixes the examples of random numbers.

    What moves the examples to another dimension, and cannot be tried, is taken to mix them.
    """
    if _is_known(node) or marks(node).mixes:
        return
    mixes = mixes_examples(node, batch)
    if mixes is None:
        known = [marks(n).layout for n in node.all_input_nodes if _has_examples(n)]
        mixes = any(layout.dim != marks(node).layout.dim for layout in known)
    if mixes:
        mark(node, mixes=ALONG)


def lay_out(node: fx.Node, batch: str, starts: Collection[fx.Node] = ()) -> None:
    """Mark the layout of a node, or the reason why its operation mixes examples.

    Args:
        node: A node; its arguments must be marked already.
        batch: The symbol of the batch size.
        starts: The explained nodes, whose examples lie along the first dimension.
    """
    layout = Layout() if node in starts else _layout(node, batch)
    mixes = "" if isinstance(layout, Layout) else layout
    mark(node, layout=layout if isinstance(layout, Layout) else Layout(), mixes=mixes)


def _layout(node: fx.Node, batch: str) -> Layout | str:
    """Return the layout of a node, or the reason why its operation mixes examples."""
    value = _tensor(node)
    folded = folded_batch(value, batch) if isinstance(value, Tensor) else None
    if folded is None:
        if any(marks(n).mixes for n in node.all_input_nodes if _has_examples(n)):
            return FOLLOWS
        shape = shape_text(value, batch) if isinstance(value, Tensor) else value
        return (
            f"its result has shape {shape}, expected one dimension that contains the batch: it "
            "mixes the examples, or leaves them out. Let forward keep the dimension of the batch, "
            "without selections such as x[0]"
        )
    dim, count = folded
    if (stacked := _stacked(node, batch)) is not None:
        return stacked if stacked.outer * stacked.inner == count else ALONG
    layouts = set[Layout]()
    for source in node.all_input_nodes:
        if not _has_examples(source) or marks(source).mixes:
            continue  # an argument that mixes examples is refused at its own operation
        x, at = _tensor(source), marks(source).layout
        outer, inner = at.outer, at.inner
        if operation(node) in _RESHAPES:
            # A reshape keeps the order of elements, and so the number of elements that vary more
            # slowly, and that of elements that vary faster, than the examples.
            outer = _quotient(outer * prod(x.shape[: at.dim]), prod(value.shape[:dim]))
            inner = _quotient(inner * prod(x.shape[at.dim + 1 :]), prod(value.shape[dim + 1 :]))
        layout = Layout(dim, outer, inner)
        if outer * inner != count or works_along(node, source, layout):
            return _CHOSEN if operation(node) in ("index", "index_select", "gather") else ALONG
        if dim != at.dim and marks(node).depends and not _is_known(node):
            return (
                f"it takes the examples along dimension {at.dim} and returns them along {dim}; a "
                "registered operation must not move them"
            )
        layouts.add(layout)
    if len(layouts) > 1:  # such as (examples, 2) and (2, examples) folded into one dimension
        return (
            "its arguments have the examples in different orders, so that examples would depend on "
            "each other"
        )
    return layouts.pop() if layouts else Layout(dim, 1, count)


def _stacked(node: fx.Node, batch: str) -> Layout | None:
    """Return the layout of a stack of batches, of its equal parts, or of repeated examples.

    Heads of attention, for instance, may lie behind each other in the dimension of the examples. So
    may the copies of each example, one for each of its windows. Returns None for all other
    operations.
    """
    first: Any = node.args[0] if node.args else None
    if operation(node) == "repeat_interleave" and _has_examples(first) and not marks(first).mixes:
        at, (copies, along) = marks(first).layout, (node.args[1], argument(node, 2, "dim"))
        if isinstance(copies, int) and along is not None and along % value_of(node).ndim == at.dim:
            return Layout(at.dim, at.outer, at.inner * copies)
    if operation(node) == "cat" and len(first) > 1:
        known, along = [marks(part) for part in first], argument(node, 1, "dim", 0)
        same = {(one.layout.dim, one.layout.inner) for one in known}
        if all((one.depends or one.beside) and not one.mixes for one in known) and len(same) == 1:
            ((dim, inner),) = same
            if along % value_of(node).ndim == dim:
                return Layout(dim, sum(one.layout.outer for one in known), inner)
    if operation(node) in _PARTS and _has_examples(first) and not marks(first).mixes:
        at, parts = marks(first).layout, value_of(node)
        along = argument(node, 2, "dim", 0) % parts[0].ndim
        folded = folded_batch(parts[0], batch)
        if along == at.dim and folded and len({str(part.shape) for part in parts}) == 1:
            outer, rest = divmod(folded[1], at.inner)
            return Layout(along, outer, at.inner) if rest == 0 else None
    return None


def _has_examples(node: fx.Node) -> bool:
    """Return True for a value that may differ from example to example."""
    return marks(node).depends or marks(node).beside


def _tensor(node: fx.Node) -> Any:
    """Return the traced value of a node; the first one if there are several."""
    value = value_of(node)
    return value[0] if isinstance(value, (tuple, list)) else value


def _quotient(above: int, below: int) -> int:
    """Return above / below if this is a whole number, else 0."""
    return above // below if above % below == 0 else 0


def works_along(node: fx.Node, source: fx.Node, layout: Layout) -> bool:
    """Return True if an operation computes along the dimension of the examples.

    Args:
        node: The operation.
        source: One of its argument nodes.
        layout: The layout of the result that follows from this argument.
    """
    name, at = operation(node), marks(source).layout.dim
    ndim: int = _tensor(source).ndim
    parts: Any = node.args[0] if name == "cat" else value_of(node)
    if name in ("cat", "chunk", "split", "split_with_sizes") and len(parts) == 1:
        return False  # the only part is the whole
    if name in _PARTIAL:  # their dimensions are those of the result, of which it may be a part
        at, ndim = layout.dim, _tensor(node).ndim
    along = _ALONG_DIMS.get(str(node.target).removeprefix("aten."), _ALONG_DIMS.get(name))
    if along is not None:  # without the argument, an operation is along all dimensions
        dims = argument(node, *along)
        dims = [dims] if isinstance(dims, int) else dims or range(ndim)
        whole = name in ("slice", "slice_scatter") and takes_all(node)
        return not whole and any(dim % ndim == at for dim in dims)
    if name in _ALONG_TWO:
        *positions, one, other = _ALONG_TWO[name]
        pairs = zip(positions, (one, other), strict=True)
        return at in [argument(node, position, "", dim) % ndim for position, dim in pairs]
    if name in ("index", "_unsafe_index", "index_put"):
        indices: Any = node.args[1]
        return at < len(indices) and not (indices[at] is None or _counts(indices[at], layout))
    if name in ("constant_pad_nd", "pad", "_pad_circular"):
        pads = argument(node, 1, "pad")  # two numbers per dimension, last dimension first
        return any(pads[2 * (ndim - 1 - at) :][:2])
    if name in _PRODUCTS:
        # A product sums over the last dimension of the left factor, the last but one of the right.
        left, right = node.args[_PRODUCTS[name] :][:2]
        return (left is source and at == ndim - 1) or (right is source and at == ndim - 2)
    if name in ("layer_norm", "rms_norm"):
        normalized: list[int] = argument(node, 1, "normalized_shape")
        return at >= ndim - len(normalized)
    if name == "scaled_dot_product_attention":
        return at >= ndim - 2
    if name == "diag_embed":
        return at == ndim - 1
    return name in _FIRST and (at != 0 or layout.dim != 0)


#: Operations that leave the order of the entries of an index.
_SAME_ENTRIES = ("unsqueeze", "view", "reshape", "alias", "clone", "_to_copy")


def _counts(index: fx.Node, layout: Layout) -> bool:
    """Return True if an index is 0, 1, ..., n − 1 for n examples: example i takes row i.

    Args:
        index: The node of the index, for the dimension of the examples.
        layout: The layout of the operation's result.
    """
    while operation(index) in _SAME_ENTRIES or (operation(index) == "slice" and takes_all(index)):
        index = index.all_input_nodes[0]
    if operation(index) != "arange" or layout.outer * layout.inner != 1:
        return False
    bounds: Any = (0, *index.args)[-2:] if len(index.args) < 3 else index.args
    start, end, step = (*bounds, 1)[:3]
    return (start, step) == (0, 1) and isinstance(end, fx.Node) and is_size(end)


def _is_known(node: fx.Node) -> bool:
    return node.target is operator.getitem or str(original(node)) in MIPIN.keys() | RECORDABLE


def takes_all(node: fx.Node) -> bool:
    """Return True if a slice, or what is put in its place, has all entries of its dimension."""
    at = 3 if operation(node) == "slice_scatter" else 2
    start, stop = argument(node, at, "start"), argument(node, at + 1, "end")
    endless = stop is None or (isinstance(stop, int) and stop >= 2**62)
    return start in (None, 0) and endless and argument(node, at + 2, "step", 1) == 1
