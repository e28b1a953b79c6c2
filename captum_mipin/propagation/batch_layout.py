"""Where the examples of a batch are.

Every tensor that depends on the input holds its examples along one dimension: (N, C, H, W), (tokens, N, features),
(N · windows, tokens, features). An operation that does anything else lets examples depend on each other. Of an
operation that is not built in, only what its shapes tell is known: it has to give the examples along the dimension where it
takes them. That it keeps them apart is checked on the data of each fit.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.rules import MIPIN, RECORDABLE, operation
from captum_mipin.rules.base import argument


@dataclass(frozen=True)
class Layout:
    """The dimension along which the examples lie, as (outer, examples, inner) entries folded into one."""

    dim: int = 0
    outer: int = 1
    inner: int = 1

    def part(self, x: Tensor, examples: slice) -> Tensor:
        """Some of the examples of ``x``."""
        if self.outer == self.inner == 1:
            return x[(slice(None),) * self.dim + (examples,)]
        return self._unfolded(x)[(slice(None),) * (self.dim + 1) + (examples,)].flatten(
            self.dim, self.dim + 2
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor whose parts these are."""
        if len(parts) == 1:
            return parts[0]
        if self.outer == 1:
            return torch.cat(list(parts), self.dim)
        return torch.cat([self._unfolded(x) for x in parts], self.dim + 1).flatten(
            self.dim, self.dim + 2
        )

    def first(self, x: Tensor) -> Tensor:
        """``x`` with its examples along the first dimension."""
        return self._unfolded(x).movedim(self.dim + 1, 0)

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`first`."""
        return x.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 2)

    def _unfolded(self, x: Tensor) -> Tensor:
        unfolded: Tensor = x.unflatten(self.dim, (self.outer, -1, self.inner))
        return unfolded


def first_dimension(value: Any, batch: str) -> bool:
    """Whether the first dimension of a traced tensor, and no other, is the batch."""
    return batch_dimension(value, batch) == 0


def batch_dimension(value: Tensor, batch: str) -> int | None:
    """The one dimension of a traced tensor that is the batch."""
    dim, count = _folded(value, batch) or (None, 0)
    return dim if count == 1 else None


def layout(node: fx.Node, batch: str) -> Layout | str:
    """Where the examples of a node are, given where those of its inputs are, or why they are not kept apart."""
    values = node.meta["val"]
    value = values[0] if isinstance(values, (tuple, list)) else values
    found = _folded(value, batch) if isinstance(value, Tensor) else None
    if found is None:
        shape = tuple(map(str, value.shape)) if isinstance(value, Tensor) else value
        return f"it does not keep the batch as one dimension: its result has shape {shape}"
    inputs = [n for n in node.all_input_nodes if n.meta.get("depends")]
    places = [n.meta.get("layout") for n in inputs]
    dim, count = found
    after = set[Layout]()
    for n, at in zip(inputs, places, strict=True):
        if not isinstance(at, Layout):
            continue  # said where that value was made
        x = n.meta["val"][0] if isinstance(n.meta["val"], (tuple, list)) else n.meta["val"]
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


def _folded(value: Any, batch: str) -> tuple[int, int] | None:
    """The one dimension of a traced tensor whose size is a multiple of the batch's, and that multiple."""
    dims = [dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
    if len(dims) != 1:
        return None
    size = value.shape[dims[0]].node.expr
    symbols = list(size.free_symbols)
    if [str(symbol) for symbol in symbols] != [batch] or not (size / symbols[0]).is_Integer:
        return None
    return dims[0], int(size / symbols[0])


def _quotient(above: int, below: int) -> int:
    return above // below if above % below == 0 else 0


def _works_along(name: str, node: fx.Node, source: fx.Node, at: Layout, after: Layout) -> bool:
    """Whether the operation ``name`` works along the dimension of its input ``source`` that holds the examples."""
    value = source.meta["val"]
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
    return (
        node.target is operator.getitem
        or str(node.meta.get("shown", node.target)) in MIPIN.keys() | RECORDABLE
    )


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
