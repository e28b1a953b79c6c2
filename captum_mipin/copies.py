"""Deep copies of models, exported programs included."""

from typing import Any

from torch import fx, nn


def copy_memo(model: nn.Module) -> dict[int, Any]:
    """Return a memo for ``copy.deepcopy``, with which it can copy models with exported programs.

    torch cannot copy the traced values in the graphs of exported programs. With this memo, the
    copy uses the same traced values as the original.
    """
    parts = (part for module in model.modules() for part in vars(module).values())
    graphs = (
        part.graph if isinstance(part, fx.GraphModule) else part
        for part in parts
        if isinstance(part, fx.Graph | fx.GraphModule)
    )
    values = [node.meta.get("val") for graph in graphs for node in graph.nodes]
    return {id(value): value for value in values if value is not None}
