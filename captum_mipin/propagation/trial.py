"""Tries one operation on random numbers, to see whether it mixes the examples of a batch.

Batch norm with the statistics of the batch, ``cumsum(0)`` or ``log_softmax(0)`` keep the shape, so
that the shapes alone do not tell.
"""

from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.layout import Layout, folded_batch
from captum_mipin.graph.marks import marks, value_of
from captum_mipin.graph.nodes import is_random, is_size

#: Number of examples that are tried, and those of them that are run again, in another order.
_EXAMPLES, _AGAIN = 3, (2, 0)
#: Largest relative difference that is rounding error.
_TOLERANCE = 1e-6


def mixes_examples(node: fx.Node, batch: str) -> bool:
    """Return True if an operation gives an example another value among other examples.

    What cannot be tried counts as False: random operations, sizes as arguments, and operations that
    refuse random numbers.

    Args:
        node: A node that is laid out.
        batch: The symbol of the batch size.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or is_random(node):
        return False
    generator = torch.Generator().manual_seed(0)
    whole, part = dict[fx.Node, Any](), dict[fx.Node, Any]()
    for source in node.all_input_nodes:
        value = value_of(source)
        if is_size(source) or not isinstance(value, Tensor):
            return False
        folded = folded_batch(value, batch)
        sizes = list(value.shape)
        if folded is not None:
            sizes[folded[0]] = folded[1] * _EXAMPLES
        if not all(isinstance(size, int) for size in sizes):
            return False
        whole[source] = part[source] = _random(sizes, value.dtype, generator)
        if folded is not None:
            known = marks(source)
            layout = known.layout if known.depends else Layout(folded[0], 1, folded[1])
            part[source] = _again(layout, whole[source])
    try:
        with torch.no_grad():
            among, alone = _run(node, whole), _run(node, part)
    except Exception:  # of any type: the operation takes no such numbers
        return False
    expected = _again(marks(node).layout, among)
    return not torch.allclose(alone, expected, _TOLERANCE, _TOLERANCE, equal_nan=True)


def _random(sizes: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return random numbers in double precision, or zeros for integers, which may be indices."""
    if dtype.is_complex:
        return torch.randn(sizes, generator=generator, dtype=torch.complex128)
    if not dtype.is_floating_point:
        return torch.zeros(sizes, dtype=dtype)
    return torch.randn(sizes, generator=generator, dtype=torch.float64)


def _again(layout: Layout, x: Tensor) -> Tensor:
    """Return some of the examples of a tensor, in another order."""
    return layout.restored(layout.first(x)[list(_AGAIN)])


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    """Return the first result of an operation on other values."""
    run: Any = node.target
    result = run(*fx.map_arg(node.args, values.get), **fx.map_arg(node.kwargs, values.get))
    first: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return first
