"""A test that runs one operation on random numbers, to find out if it mixes examples of a batch.

The shapes alone do not show this: batch norm with the statistics of the batch, ``cumsum(0)`` and
``log_softmax(0)`` mix examples, but their results have the same shapes as their arguments.
"""

from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.layout import Layout, folded_batch
from captum_mipin.graph.marks import marks, value_of
from captum_mipin.graph.nodes import is_random, is_size

#: Number of random examples, and the positions of those that are run again, in this order.
_EXAMPLES, _AGAIN = 3, (2, 0)
#: Largest relative difference that counts as a rounding error.
_TOLERANCE = 1e-6


def mixes_examples(node: fx.Node, batch: str) -> bool | None:
    """Return True if the result for an example depends on the other examples of the batch.

    The result is None if the operation cannot be tested: if it is random, has sizes or values that
    mix examples already as arguments, or fails on random numbers.

    Args:
        node: The node of the operation, with its layout marked.
        batch: The symbol of the batch size.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or is_random(node):
        return None
    generator = torch.Generator().manual_seed(0)
    whole, part = dict[fx.Node, Any](), dict[fx.Node, Any]()
    for source in node.all_input_nodes:
        value = value_of(source)
        known = marks(source)
        told = known.depends or known.beside
        mixed = told and known.mixes
        if is_size(source) or mixed or not isinstance(value, Tensor):
            return None
        folded = folded_batch(value, batch)
        sizes = list(value.shape)
        if folded is not None:
            sizes[folded[0]] = folded[1] * _EXAMPLES
        if not all(isinstance(size, int) for size in sizes):
            return None
        whole[source] = part[source] = _random(sizes, value.dtype, generator)
        if folded is not None:
            layout = known.layout if told else Layout(folded[0], 1, folded[1])
            part[source] = _again(layout, whole[source])
    try:
        with torch.no_grad():
            among, alone = _run(node, whole), _run(node, part)
    except Exception:  # of any type: the operation takes no such numbers
        return None
    expected = _again(marks(node).layout, among)
    return not torch.allclose(alone, expected, _TOLERANCE, _TOLERANCE, equal_nan=True)


def _random(sizes: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return random numbers in double precision, or zeros for integer dtypes.

    Args:
        sizes: The shape of the tensor.
        dtype: The dtype of the argument that is replaced.
        generator: The source of the random numbers.
    """
    if dtype.is_complex:
        return torch.randn(sizes, generator=generator, dtype=torch.complex128)
    if not dtype.is_floating_point:
        return torch.zeros(sizes, dtype=dtype)  # integers may be indices, and 0 is a valid one
    return torch.randn(sizes, generator=generator, dtype=torch.float64)


def _again(layout: Layout, x: Tensor) -> Tensor:
    """Return the examples of a tensor at the positions ``_AGAIN``, in this order."""
    return layout.restored(layout.first(x)[list(_AGAIN)])


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    """Return the first result of an operation, run with ``values`` as its arguments."""
    run: Any = node.target
    result = run(*fx.map_arg(node.args, values.get), **fx.map_arg(node.kwargs, values.get))
    first: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return first
