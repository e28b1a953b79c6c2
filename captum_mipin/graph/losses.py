"""The cross entropy of each example, written as the operations that it consists of.

A model may return its loss for each example, ``cross_entropy(z, y, reduction="none")``. For a class
y, this is −log softmax(z)_y, and ``nll_loss`` alone is −z_y: the choice of an entry and a minus
sign. Losses with weights of classes, smoothed or soft labels are no such choice, and stay.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from captum_mipin.graph.marks import inherit, set_value, value_of
from captum_mipin.graph.nodes import argument

aten = torch.ops.aten

_LOSSES = (aten.cross_entropy_loss.default, aten.nll_loss_nd.default)


def spell_losses(graph: fx.Graph) -> None:
    """Replace each cross entropy of a class per example by the choice of a log-probability."""
    for node in list(graph.nodes):
        if node.target in _LOSSES and _chooses(node):
            node.replace_all_uses_with(_spelled(graph, node))
            graph.erase_node(node)


def _chooses(node: fx.Node) -> bool:
    """Return True if a loss only chooses an entry for each example."""
    scores, labels = map(value_of, node.all_input_nodes[:2])
    smoothing = argument(node, 5, "label_smoothing", 0.0)
    if argument(node, 2, "weight") is not None or smoothing != 0 or labels.is_floating_point():
        return False
    # the mean and the sum of a single loss are that loss
    single = scores.ndim == 1 or (scores.ndim == 2 and str(scores.shape[0]) == "1")
    return single or argument(node, 3, "reduction", 1) == 0


def _outside_vmap(value: Any) -> Any:
    """Return a traced value; inside ``torch.vmap``, a tensor of the shape of one example."""
    if isinstance(value, FakeTensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _spelled(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Add the operations that a loss consists of, and return the last one."""
    z, labels = node.all_input_nodes[:2]
    dim, ignored = min(value_of(z).ndim - 1, 1), argument(node, 4, "ignore_index", -100)

    mode = getattr(value_of(z), "fake_mode", nullcontext())

    def call(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        with mode, enable_python_dispatcher():
            value: Tensor = target(*fx.map_arg(args, lambda n: _outside_vmap(value_of(n))))
        inherit(new, node)
        set_value(new, value)
        return new

    if node.target is aten.cross_entropy_loss.default:
        z = call(aten.log_softmax.int, z, dim)
    # −z_y, and 0 where the label is to be ignored
    without = call(aten.eq.Scalar, labels, ignored)
    y = call(aten.unsqueeze.default, call(aten.masked_fill.Scalar, labels, without, 0), dim)
    chosen = call(aten.squeeze.dim, call(aten.gather.default, z, dim, y), dim)
    loss = call(aten.masked_fill.Scalar, call(aten.neg.default, chosen), without, 0.0)
    reduced = value_of(loss).ndim > value_of(node).ndim
    return call(aten.squeeze.dim, loss, 0) if reduced else loss
