"""The position of the examples of a batch within a tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The dimension of a tensor along which its examples lie.

    Other dimensions may be folded into the same one: its entries are then those of a tensor
    (outer, examples, inner), flattened.

    Attributes:
        dim: Number of the dimension.
        outer: Number of entries of folded dimensions that vary more slowly than the examples.
        inner: Number of entries of folded dimensions that vary faster than the examples.

    Examples:
        >>> Layout(dim=1, inner=2).first(torch.zeros(5, 6, 7)).shape  # 3 examples of 2 windows
        torch.Size([3, 5, 1, 2, 7])
    """

    dim: int = 0
    outer: int = 1
    inner: int = 1

    def part(self, x: Tensor, examples: slice) -> Tensor:
        """Return the selected examples of ``x`` as a tensor with the same layout."""
        if self.outer == self.inner == 1:
            return x[(slice(None),) * self.dim + (examples,)]
        part = self._unfolded(x)[(slice(None),) * (self.dim + 1) + (examples,)]
        return part.flatten(self.dim, self.dim + 2)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the tensor of all examples, joined from parts such as :meth:`part` returns."""
        if len(parts) == 1:
            return parts[0]
        if self.outer == 1:
            return torch.cat(list(parts), self.dim)
        whole = torch.cat([self._unfolded(x) for x in parts], self.dim + 1)
        return whole.flatten(self.dim, self.dim + 2)

    def first(self, x: Tensor) -> Tensor:
        """Return ``x`` with its examples along the first dimension."""
        return self._unfolded(x).movedim(self.dim + 1, 0)

    def restored(self, x: Tensor) -> Tensor:
        """Return ``x`` with its examples moved from the first dimension to this layout.

        It is the inverse of :meth:`first`.
        """
        return x.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 2)

    def _unfolded(self, x: Tensor) -> Tensor:
        unfolded: Tensor = x.unflatten(self.dim, (self.outer, -1, self.inner))
        return unfolded


def batched(value: Any) -> bool:
    """Return True if a traced value is a tensor whose shape depends on the batch size."""
    return isinstance(value, Tensor) and any(isinstance(n, torch.SymInt) for n in value.shape)


def shape_text(value: Tensor, batch: str) -> str:
    """Return the shape of a traced tensor for an error message, with the word batch.

    Args:
        value: The traced tensor.
        batch: The symbol of the batch size.
    """
    sizes = [str(size).replace(batch, "batch") for size in value.shape]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def batch_dimension(value: Tensor, batch: str) -> int | None:
    """Return the dimension whose size is the batch size; None if there is not exactly one."""
    dim, count = folded_batch(value, batch) or (None, 0)
    return dim if count == 1 else None


def folded_batch(value: Tensor, batch: str) -> tuple[int, int] | None:
    """Return the dimension whose size is a multiple of the batch size, and that multiple.

    Args:
        value: A traced tensor; its sizes that depend on the batch are symbolic.
        batch: The symbol of the batch size.

    Returns:
        (dimension, multiple); None if there is not exactly one such dimension.
    """
    dims = [dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
    if len(dims) != 1:
        return None
    # The size must be s0 · n with a whole number n: n entries of folded dimensions per example.
    size: Any = value.shape[dims[0]]
    size = size.node.expr
    symbols = list(size.free_symbols)
    if [str(symbol) for symbol in symbols] != [batch] or not (size / symbols[0]).is_Integer:
        return None
    return dims[0], int(size / symbols[0])
