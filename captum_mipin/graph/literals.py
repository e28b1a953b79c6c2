"""Sizes that follow from numbers in a model's code, in the graph for one example.

Code that packs sequences counts them in tensors, as ``torch.tensor([16, 16])``, and reads sizes and
choices back from these. ``torch.export`` takes such a size for unknown, though it is the same in
each call. Here the tensors are computed, and each operation of unknown size is replaced by one of
known size.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from captum_mipin.graph.marks import set_value, value_of
from captum_mipin.graph.nodes import ancestors, erase_unused, operation

aten = torch.ops.aten

#: Largest number of elements of a tensor that is computed.
_LARGEST = 1 << 20

#: Operations whose number of results depends on values.
_COUNTED = frozenset({"repeat_interleave", "nonzero", "masked_select", "unique"})


def settle_literals(graph: fx.Graph, constants: dict[str, Any]) -> dict[str, Tensor]:
    """Replace the operations whose size follows from numbers in the code, and trace the graph.

    Args:
        graph: A graph for one example, which is changed.
        constants: Name of a placeholder → its path in the model, or the tensor itself.

    Returns:
        The placeholders that are added to the graph, by name, and their tensors.
    """
    known: dict[fx.Node, Any] = {}
    added: dict[str, Tensor] = {}
    settled, needed = False, ancestors([graph.output_node()])
    for node in list(graph.nodes):
        if node.op == "placeholder":
            if isinstance(constants.get(node.name), Tensor):
                known[node] = constants[node.name]
        elif node.op == "call_function" and node in needed:
            _compute(node, known)
            if operation(node) not in _COUNTED and not free_unbacked_symbols(value_of(node)):
                continue
            mask = _mask(node)
            if isinstance(known.get(node), Tensor):
                constant = _placeholder(node, known[node])
                node.replace_all_uses_with(constant)
            elif mask in known and bool(known[mask].all()):
                node.replace_all_uses_with(node.all_input_nodes[0])
                settled = True
                continue
            elif mask in known:
                constant = _placeholder(node, known[mask].nonzero()[:, 0])
                node.args = (node.args[0], [constant])
            else:
                continue
            added[constant.name], settled = value_of(constant), True
    if settled:
        erase_unused(graph, graph.find_nodes(op="placeholder"))
        _trace(graph)
    return added


def _compute(node: fx.Node, known: dict[fx.Node, Any]) -> None:
    """Compute a small integer or boolean value that depends on numbers of the code alone."""
    value = value_of(node)
    whole = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
    if (whole or isinstance(value, torch.SymInt)) and known.keys() >= set(node.all_input_nodes):
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(result, Tensor) or result.numel() <= _LARGEST:
            known[node] = result


def _placeholder(node: fx.Node, tensor: Tensor) -> fx.Node:
    """Add a placeholder for a tensor, behind all others, and return it."""
    graph = node.graph
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        constant = graph.placeholder(f"c_{node.name}")
    set_value(constant, tensor)
    return constant


def _mask(node: fx.Node) -> Any:
    """Return the node of the only mask that chooses elements along the first dimension."""
    if operation(node) != "index":
        return None
    indices: Any = node.args[1]
    masks = [n for n in indices if n is not None and value_of(n).dtype == torch.bool]
    return masks[0] if len(masks) == 1 == len(indices) and value_of(masks[0]).ndim == 1 else None


def _trace(graph: fx.Graph) -> None:
    """Set the traced values of all nodes; no size is unknown."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for node in graph.nodes:
        value = value_of(node)
        if node.op == "placeholder" and isinstance(value, Tensor):
            with mode:
                set_value(node, torch.empty(value.shape, dtype=value.dtype, device=value.device))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
            with mode:
                set_value(node, node.target(*args, **kwargs))
